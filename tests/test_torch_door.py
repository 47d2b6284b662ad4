"""Torch modules as graphs: names, dimensions, numbers, and what is refused."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from helpers import session
from torch_checks import check

from qexport.errors import BuildFailed, DataInvalid, UsageError
from qexport.exporter.doors.inputs import parse_inputs
from qexport.exporter.doors.torch_modules.module import TorchOptions, load_torch

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

NETWORKS = """
import torch
from collections import namedtuple
from torch import nn

class Colliding(nn.Module):
    '''Inputs called like operators, outputs like inputs, shared weights, one tensor twice, a weight.'''

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.two = nn.Linear(4, 5), nn.Linear(4, 5)
        self.two.weight = self.one.weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, relu):
        h = self.dropout(self.conv1(x)).relu().mean((2, 3))
        return {
            "x": x, "one.weight": self.one(h), "pair": (self.two(h), self.one.weight),
            "conv2d": h.shape[0] * torch.ones(2), "nothing": None, "same": h, "again": h,
            "twice": torch.cat([relu, relu]),
        }

class F(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x):
        return self.function(self, x)

Pair = namedtuple("Pair", "left right")

def colliding(): return Colliding()
def pair(): return F(lambda self, x: Pair(x + self.weight, [x * 2, x * 3]))
def with_examples(): return F(lambda self, x: (x * 2, x.sum())), (torch.arange(8.0).reshape(2, 4),)
def named_examples(): return Colliding(), {"x": torch.randn(1, 3, 8, 8), "relu": torch.randn(1)}
def brain(): return F(lambda self, x: x * self.weight.bfloat16())
def reshaped(): return F(lambda self, x: x.reshape(2, 2, 2) * 1)
def short(): return F(lambda self, x: torch.zeros(10, 4)[: x.shape[0]] + x)
def hidden_branch(): return F(lambda self, x: x * 2 if x.shape[0] > 2 else x * 3)
def on_values(): return F(lambda self, x: x * 2 if x.sum() > 0 else x)
def random(): return F(lambda self, x: x + torch.rand(4))
def dropout(): return F(lambda self, x: torch.dropout(x, 0.5, train=True))
def fails(): return F(lambda self, x: x @ torch.ones(5, 5))
def number(): return F(lambda self, x: (x, 3))
def empty(): return F(lambda self, x: {})
def unknown_operator(): return F(lambda self, x: torch.linalg.eigh(x.T @ x)[0])
def chatty():
    import warnings
    def noisy(self, x):
        warnings.warn("noise"); print("noise")
        return x * self.weight
    return F(noisy)
def no_module(): return 3
def scripted():
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Two(), (torch.ones(2), torch.ones(2)))
def bad_example(): return F(lambda self, x: x), (3,)

class Two(nn.Module):
    def forward(self, left, right, *, scale=None):
        return left - right

def two(): return Two()
"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "door_networks.py"
    path.write_text(NETWORKS)
    return path


@pytest.fixture
def load(networks):
    def load(name, *inputs, **options):
        return load_torch(f"{networks}:{name}", TorchOptions(parse_inputs(inputs), **options))

    return load


@pytest.fixture(scope="module")
def colliding(networks):
    asked = parse_inputs(["x:float32[batch,3,16,width]", "relu:float32[batch]"])
    return load_torch(f"{networks}:colliding", TorchOptions(asked))


# ---------------------------------------------------------------- the graph


def test_every_name_is_unique_and_the_one_asked_for(colliding):
    proto = check(colliding)
    assert [value.name for value in proto.graph.input] == ["x", "relu"]
    outputs = [value.name for value in proto.graph.output]
    assert outputs == ["x_out", "one.weight", "pair_0", "pair_1", "conv2d", "same", "again", "twice"]
    made = [name for node in proto.graph.node for name in node.output]
    names = [*made, *(value.name for value in (*proto.graph.input, *proto.graph.initializer))]
    assert len(set(names)) == len(names)
    nodes = [node.name for node in proto.graph.node]
    assert len(set(nodes)) == len(nodes)
    assert {"conv1/Conv", "one/Gemm", "two/Gemm"} <= set(nodes)


def test_dimensions_have_the_names_asked_for(colliding):
    shapes = {
        value.name: [str(dim) for dim in value.shape]
        for value in (*colliding.model.graph.inputs, *colliding.model.graph.outputs)
    }
    assert shapes["x"] == shapes["x_out"] == ["batch", "3", "16", "width"]
    assert shapes["relu"] == ["batch"]
    assert shapes["same"] == ["batch", "4"]
    assert shapes["twice"] == ["2*batch"]
    every = (str(dim) for node in colliding.model.graph for value in node.outputs for dim in value.shape or ())
    assert not [dim for dim in every if re.search(r"\b[su]\d+\b", dim)]


def test_trials_have_a_batch_of_one_and_of_several(colliding):
    sizes = [feeds["x"].shape for feeds in colliding.trials]
    assert {size[0] for size in sizes} == {1, 2, 3}
    assert len({size[3] for size in sizes}) == 3
    assert colliding.trials[0] is colliding.feeds


def test_weights_are_there_once_and_share_memory_with_nobody_of_torch(colliding):
    weights = colliding.model.graph.initializers
    assert sum(value.shape == [5, 4] for value in weights.values()) == 1
    assert {"conv1.weight", "conv1.bias", "one.bias", "two.bias"} <= set(weights)
    assert all(type(value.const_value) is ir.Tensor for value in weights.values())


def test_nothing_tells_of_the_machine(colliding, networks):
    data = ir.to_proto(colliding.model).SerializeToString()
    for word in (str(networks.parent), "site-packages", ".py", "pkg.torch", "door_networks", "File "):
        assert word.encode() not in data
    assert not colliding.notes


@pytest.mark.parametrize("opset", [20, 21, 23, 24])
def test_the_opset_is_the_one_asked_for(load, opset):
    source = load("pair", "x:float32[n,4]", opset=opset)
    proto = check(source)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", opset)]
    assert proto.ir_version == (11 if opset > 22 else 10)
    assert [value.name for value in proto.graph.output] == ["left", "right_0", "right_1"]


def test_other_opsets_are_refused(load):
    with pytest.raises(UsageError, match=r"opset 17.*20 to 24"):
        load("pair", "x:float32[n,4]", opset=17)


def test_examples_of_the_callable_describe_the_inputs(load):
    source = load("with_examples")
    check(source)
    assert [str(one) for one in source.inputs] == ["x:float32[batch,4]"]
    np.testing.assert_array_equal(source.feeds["x"], np.arange(8.0).reshape(2, 4))
    assert list(source.reference(source.feeds)) == ["output_0", "output_1"]


def test_one_example_is_no_batch_of_one_for_ever(load):
    source = load("named_examples")
    check(source)
    assert source.feeds["x"].shape == (1, 3, 8, 8)
    assert max(len(feeds["x"]) for feeds in source.trials) > 1


def test_a_description_goes_before_what_examples_say(load):
    source = load("with_examples", "anything:float32[rows,4]")
    assert source.model.graph.inputs[0].name == "anything"
    np.testing.assert_array_equal(source.feeds["anything"], np.arange(8.0).reshape(2, 4))


def test_data_is_what_is_verified_with(load):
    data = {"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}
    source = load("pair", "x:float32[n,4]", data=data)
    np.testing.assert_array_equal(source.feeds["x"], data["x"])
    check(source)
    with pytest.raises(DataInvalid, match="takes x:float32"):
        load("pair", "x:float32[n,4]", data={"x": data["x"].astype(np.float64)})


def test_bfloat16_goes_in_and_out(load):
    source = load("brain", "x:bfloat16[n,4]")
    assert source.reference(source.feeds)["output_0"].dtype == ml_dtypes.bfloat16
    assert source.model.graph.outputs[0].dtype == ir.DataType.BFLOAT16


def test_inputs_go_by_name_or_in_order(load):
    feeds = {"left": np.ones((2, 4), np.float32), "right": np.zeros((2, 4), np.float32)}
    swapped = load("two", "right:float32[n,4]", "left:float32[n,4]")
    np.testing.assert_array_equal(swapped.reference(feeds)["output_0"], np.ones((2, 4)))
    check(swapped)
    other = load("two", "a:float32[n,4]", "b:float32[n,4]")
    np.testing.assert_array_equal(
        other.reference({"a": feeds["left"], "b": feeds["right"]})["output_0"], np.ones((2, 4))
    )
    with pytest.raises(UsageError, match=r"no input 'rihgt'.*did you mean 'right'"):
        load("two", "left:float32[n,4]", "rihgt:float32[n,4]")
    with pytest.raises(UsageError, match="does not fit the inputs: missing a required argument: 'right'"):
        load("two", "left:float32[n,4]")


def test_an_export_is_quiet(load, capfd, recwarn):
    check(load("chatty", "x:float32[n,4]"))
    assert capfd.readouterr().out == ""
    assert [str(one.message) for one in recwarn] == []


# ---------------------------------------------------------------- refusals


def test_a_dimension_that_torch_would_fix_is_refused(load):
    with pytest.raises(
        BuildFailed, match=r"dimension 'n' became fixed at 2: .*specialized it to be a constant \(2\)"
    ) as caught:
        load("reshaped", "x:float32[n,4]")
    assert "write 2 in the place of n" in str(caught.value)
    check(load("reshaped", "x:float32[2,4]"))


def test_a_branch_on_small_sizes_is_refused(load):
    data = {"x": np.ones((5, 4), np.float32)}
    with pytest.raises(BuildFailed, match="'n' would have to be 3 or more"):
        load("hidden_branch", "x:float32[n,4]", data=data)


def test_a_limit_is_told(load):
    source = load("short", "x:float32[n,4]")
    assert source.notes == ("dimension 'n' is at most 10",)
    check(source)


def test_dimensions_that_must_be_equal_need_one_name(load):
    with pytest.raises(BuildFailed, match=r"the module fails on .*dimensions that must be equal need one name"):
        load("two", "left:float32[n,4]", "right:float32[m,4]")


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("on_values", BuildFailed, "torch cannot trace it: Could not guard on data-dependent"),
        ("random", BuildFailed, "output 'output_0' differs from one call to the next"),
        ("dropout", BuildFailed, "output 'output_0' differs from one call to the next"),
        ("fails", BuildFailed, r"the module fails on x \[2, 4\]: RuntimeError: mat1 and mat2"),
        ("number", BuildFailed, "output 'output_1' is of type 'int', not a tensor"),
        ("empty", BuildFailed, "returns no tensors"),
        ("unknown_operator", BuildFailed, "torch cannot convert it: .*linalg_eigh"),
        ("no_module", UsageError, "returns 'int', not a torch.nn.Module"),
        ("scripted", UsageError, "returns a scripted module"),
        ("bad_example", UsageError, "example 'x' is of type 'int'"),
    ],
)
def test_what_cannot_be_exported_is_told(load, name, error, said):
    with pytest.raises(error, match=said):
        load(name, "x:float32[n,4]")


def test_inputs_that_nobody_described_are_asked_for(load):
    with pytest.raises(UsageError, match=r"nothing says what its inputs are.*forward takes x, relu"):
        load("colliding")


# ---------------------------------------------------------------- real models


def test_the_sample_network_answers_as_its_file(samples):
    folder = samples / "resnet20"
    source = load_torch(f"{folder}/network.py:resnet20", TorchOptions(parse_inputs(["input:float32[batch,3,32,32]"])))
    with np.load(folder / "test.npz") as held:
        images, labels = held["images"][:64], held["labels"][:64]
    scaled = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    feeds = {"input": scaled.transpose(0, 3, 1, 2).astype(np.float32)}
    truth = session(ir.load(folder / "resnet20.onnx")).run(None, feeds)[0]
    found = session(source.model).run(["logits"], feeds)[0]
    np.testing.assert_allclose(found, truth, rtol=0, atol=5e-5)
    np.testing.assert_array_equal(found.argmax(1), truth.argmax(1))
    assert (found.argmax(1) == labels).mean() > 0.85
    np.testing.assert_allclose(found, source.reference(feeds)["logits"], rtol=0, atol=5e-5)
