from __future__ import annotations

import sys
import types

import onnx
import onnx_ir as ir
import pytest

from qexport.errors import EnvironmentMismatch, UsageError
from qexport.exporter.engines.engine import run_support
from qexport.exporter.engines.frozen import freeze
from qexport.exporter.engines.messages import Messages, Phases, fraction, listed, readable
from qexport.exporter.engines.rules import find_faults
from qexport.runtime.backends.artefact import load_module
from qexport.runtime.backends.gpus import find_gpus, read_gpus

# ------------------------------------------------------------ messages and progress


def test_nested_phases_add_up():
    assert fraction([]) == 0
    assert fraction([(1, 4)]) == 0.25
    assert fraction([(1, 4), (1, 2), (1, 5)]) == pytest.approx(0.25 + 0.125 + 0.025)
    assert fraction([(9, 4)]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('creator && "Plugin not found, are the name and version correct?"', "no such operator"),
        ("Assertion failed: a == A::b || c: it is so", "it is so"),
        ("Invalid Node - n\nfirst\n[x::catchCudaError::250] cudaError 35", "first"),
    ],
)
def test_messages_of_the_library_become_readable(text, words):
    assert readable(text).endswith(words) or words in readable(text)
    assert "\n" not in readable(text)
    assert "cudaError" not in readable(text)


# ------------------------------------------------------------ modules, devices, plans


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")])
def test_a_missing_module_says_what_to_install(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentMismatch, match=f"{name} is not installed") as caught:
        load_module(name)
    assert f"qexport[{extra}]" in caught.value.hint


def test_only_engine_builders_are_loaded():
    with pytest.raises(UsageError, match="'antigravity'"):
        load_module("antigravity")


class Driver:
    """The functions of the CUDA driver interface, for one GPU of compute capability 8.9 or none."""

    def __init__(self, status=0, count=1, capability=(8, 9)):
        self.status, self.count, self.capability = status, count, capability

    def cuInit(self, flags):  # noqa: N802 the driver's name
        return self.status

    def cuDeviceGetCount(self, count):  # noqa: N802 the driver's name
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device, index):  # noqa: N802 the driver's name
        return 0

    def cuDeviceGetName(self, name, size, device):  # noqa: N802 the driver's name
        name.value = b"NVIDIA Test"
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):  # noqa: N802 the driver's name
        memory._obj.value = 8 << 30
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802 the driver's name
        value._obj.value = self.capability[attribute - 75]
        return 0


def test_a_gpu_is_described_by_the_driver():
    (gpu,) = read_gpus(Driver())
    assert (gpu.name, gpu.capability, gpu.memory) == ("NVIDIA Test", "8.9", 8 << 30)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(Driver(100), "finds no GPU"), (Driver(count=0), "finds no GPU"), (Driver(803), "versions"), (Driver(7), "7")],
)
def test_a_driver_without_gpu_says_why(driver, reason):
    with pytest.raises(EnvironmentMismatch, match=reason):
        read_gpus(driver)


def test_run_support_is_the_reason_of_the_driver(monkeypatch):
    module = types.ModuleType("tensorrt")
    for driver, word in ((Driver(100), "finds no GPU"), (Driver(capability=(6, 1)), "6.1")):
        monkeypatch.setattr("ctypes.CDLL", lambda name, driver=driver: driver)
        assert word in run_support(module)
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver())
    assert run_support(module) is None


def test_a_machine_without_driver_says_so(monkeypatch):
    monkeypatch.setattr("qexport.runtime.backends.gpus._LIBRARY", "libno-such-driver.so")
    with pytest.raises(EnvironmentMismatch, match="no NVIDIA driver: libno-such-driver"):
        find_gpus()


def test_only_errors_are_kept_and_not_the_noise_a_missing_gpu_adds():
    messages = Messages(kept=2)
    for severity, text in [("ERROR", "old"), ("WARNING", "w"), ("INTERNAL_ERROR", "a"), ("ERROR", "b")]:
        messages.add(severity, text)
    messages.add("ERROR", "[checkMacros.cpp::catchCudaError::250] cudaError 35")
    assert messages.errors == ["a", "b"]


def test_a_phase_that_ends_early_never_takes_progress_back():
    seen = []
    phases = Phases(lambda name, done: seen.append(done))
    phases.start("build", 4)
    phases.step("build", 0)
    phases.start("inner", 2)
    phases.step("inner", 1)
    phases.finish("inner")
    phases.start("other", 0)
    assert phases.step("build", 1)
    assert seen == [0, 0.25, 0.25, 0.5, 0.5, 0.5]


def test_one_detail_stands_on_the_line_and_long_names_are_cut():
    assert listed("refused", ["a"]) == "refused: a"
    assert listed("refused", ["a", "b"]) == "refused (2):\n- a\n- b"
    assert len(listed("refused", ["a" * 10**6])) < 300


# ------------------------------------------------------------ what is looked at before the parser


def attention(*extra, **attributes):
    """An Attention of opset 24 over a cache of ten columns, with more inputs and attributes as they are given."""
    node = onnx.helper.make_node("Attention", ["q", "k", "v", *extra], ["y"], name="att", **attributes)
    shapes = {"q": [1, 2, 3, 16], "k": [1, 2, 10, 16], "v": [1, 2, 10, 16], "lengths": ["batch"], "m": [3, 10]}
    kinds = {"lengths": onnx.TensorProto.INT64}
    inputs = [
        onnx.helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT16), shapes[name])
        for name in node.input
        if name
    ]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, [1, 2, 3, 16])
    graph = onnx.helper.make_graph([node], "g", inputs, [output])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=11)


LENGTHS = ("", "", "", "lengths")


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_causal_attention_with_lengths_is_a_fault_because_parsers_drop_the_lengths(module):
    ((node, reason),) = find_faults(ir.from_proto(attention(*LENGTHS, is_causal=1)), module)
    assert node.name == "att"
    assert "nonpad_kv_seqlen with is_causal" in reason


@pytest.mark.parametrize(
    ("extra", "attributes"),
    [
        (LENGTHS, {}),
        (LENGTHS, {"is_causal": 0}),
        ((), {"is_causal": 1}),
        (("", "", "", ""), {"is_causal": 1}),
        (("m",), {}),
    ],
)
def test_lengths_or_causality_alone_are_no_fault(extra, attributes):
    assert not list(find_faults(ir.from_proto(attention(*extra, **attributes)), "tensorrt_rtx"))


def test_causal_attention_with_lengths_is_found_in_a_branch():
    inner = attention(*LENGTHS, is_causal=1).graph
    del inner.input[:]
    node = onnx.helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    outer = onnx.helper.make_graph([node], "o", [], [])
    assert len(list(find_faults(ir.from_proto(onnx.helper.make_model(outer)), "tensorrt"))) == 2


def test_a_frozen_size_is_a_number_wherever_it_was_a_name():
    model = freeze(attention(*LENGTHS), {"batch": 4})
    assert [dim.dim_value for dim in model.graph.input[3].type.tensor_type.shape.dim] == [4]
    assert not any(dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [({"bach": 4}, "did you mean 'batch'"), ({"x": 4}, "dynamic sizes: batch"), ({"batch": 0}, "at least 1")],
)
def test_sizes_that_cannot_be_frozen_are_usage_errors(sizes, told):
    with pytest.raises(UsageError, match=told):
        freeze(attention(*LENGTHS), sizes)
