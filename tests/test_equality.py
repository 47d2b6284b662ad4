from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.errors import BuildFailed
from qexport.exporter.proof.equality import EqualityProof, distance
from qexport.passes.base import Outcome, Pass
from qexport.passes.cleanup import Cleanup
from qexport.passes.pipeline import run

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 4] x) => (float[n, 4] y) { a = Identity(x)  h = Mul(a, c)  y = Relu(h) }"""


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply a constant."""

    factor: float = 1.0

    def call(self, model):
        value = model.graph.initializers["c"]
        value.const_value = ir.tensor(value.const_value.numpy() * value.dtype.numpy().type(self.factor), name="c")
        return Outcome(model, True)


@dataclass(frozen=True)
class Lossy(Scale):
    """Multiply a constant on purpose."""

    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Break(Pass):
    """Give a constant a shape that does not fit."""

    def call(self, model):
        value = model.graph.initializers["c"]
        value.const_value, value.shape = ir.tensor(np.ones(3, np.float32), name="c"), ir.Shape([3])
        return Outcome(model, True)


def model():
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([1, 2, 3, 4]), "c"))
    return ir.from_proto(proto)


def proof():
    return EqualityProof([{"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}])


def test_an_exact_pass_that_changes_a_number_stops_the_build():
    with pytest.raises(BuildFailed, match=r"step 2 \(scale\).*1\.0e-03 relative"):
        run(model(), [("cleanup", Cleanup()), ("scale", Scale(1.001))], [proof()])


def test_rounding_is_not_a_change():
    watcher = proof()
    run(model(), [("cleanup", Cleanup()), ("scale", Scale(1 + 2e-7))], [watcher])
    assert watcher.errors[0] == 0
    assert watcher.errors[1] < 1e-6


def test_a_pass_that_changes_numbers_on_purpose_is_not_held_to_them_but_the_next_one_is():
    steps = [("lossy", Lossy(2.0)), ("cleanup", Cleanup())]
    watcher = proof()
    run(model(), steps, [watcher])
    assert watcher.errors == [None, 0.0]
    with pytest.raises(BuildFailed, match="step 2"):
        run(model(), [("lossy", Lossy(2.0)), ("scale", Scale(1.1))], [proof()])


def test_the_model_before_the_first_inexact_pass_is_kept():
    watcher = proof()
    run(model(), [("cleanup", Cleanup()), ("lossy", Lossy(2.0)), ("lossy", Lossy(2.0))], [watcher])
    kept = watcher.before_inexact
    assert kept.graph.num_nodes() == 2
    np.testing.assert_array_equal(kept.graph.initializers["c"].const_value.numpy(), [1, 2, 3, 4])


def test_made_up_inputs_that_the_model_refuses_prove_nothing_and_are_told():
    feeds = [{"x": np.ones((1, 5), np.float32)}]
    watcher = EqualityProof(feeds, made_up=True)
    run(model(), [("cleanup", Cleanup()), ("scale", Scale(1.001))], [watcher])
    assert watcher.errors == [None, None]
    assert len(watcher.warnings) == 1
    assert "equality was not proven" in watcher.warnings[0]
    with pytest.raises(BuildFailed):
        run(model(), [("cleanup", Cleanup())], [EqualityProof(feeds)])


def test_made_up_inputs_that_the_model_takes_prove_as_real_ones_do():
    feeds = [{"x": np.ones((1, 5), np.float32)}, {"x": np.ones((1, 4), np.float32)}]
    watcher = EqualityProof(feeds, made_up=True)
    with pytest.raises(BuildFailed, match=r"1\.0e-03 relative"):
        run(model(), [("cleanup", Cleanup()), ("scale", Scale(1.001))], [watcher])
    assert watcher.warnings == []


def test_made_up_inputs_that_a_pass_breaks_fail_the_build():
    with pytest.raises(BuildFailed):
        run(model(), [("break", Break())], [EqualityProof([{"x": np.ones((1, 4), np.float32)}], made_up=True)])


def test_a_result_that_is_not_a_number_is_infinitely_far():
    one, other = {"y": np.array([1.0, 2.0])}, {"y": np.array([1.0, np.nan])}
    assert distance(one, other) == float("inf")
    assert distance(other, other) == 0.0
    assert distance(one, {"y": np.zeros(3)}) == float("inf")
    assert distance(one, {"y": np.array([1.0, 2.2])}) == pytest.approx(0.2 / np.sqrt(5))


@pytest.mark.parametrize("mask", [-1e9, -1e4, float(np.finfo(np.float32).min), 1e30])
def test_what_a_mask_put_there_hides_no_change_of_the_others(mask):
    before, after = {"y": np.array([mask, 1.0, 2.0])}, {"y": np.array([mask, 90.0, -70.0])}
    assert distance(before, after) == pytest.approx(np.hypot(89, 72) / np.sqrt(5))
    assert distance(before, before) == 0.0
    assert distance(before, {"y": np.array([mask, 1.0, 2.0 + 1e-6])}) == pytest.approx(1e-6 / np.sqrt(5))
    assert distance(before, {"y": np.array([1.01 * mask, 1.0, 2.0])}) == pytest.approx(0.01)
    assert distance(before, {"y": np.array([0.0, 1.0, 2.0])}) == pytest.approx(1.0)


def test_huge_numbers_that_are_no_masks_are_what_rounding_is_relative_to():
    computed = np.array([3e5, 1e6, 2e-2, 0.0])
    rounded = np.array([3e5, 1e6 * (1 + 1e-7), 3e-2, 1e-3])  # cancellation leaves what the large ones lost
    assert distance({"y": computed}, {"y": rounded}) < 1e-6
    assert distance({"y": np.array([5000.0, 1e-3])}, {"y": np.array([5000.0, 1.1e-3])}) < 1e-6
    assert distance({"y": np.array([2e4, 900.0])}, {"y": np.array([2e4, 900.01])}) == pytest.approx(5e-7, rel=0.01)


@given(st.lists(st.floats(-9e3, 9e3), min_size=1, max_size=6), st.floats(-1e-3, 1e-3))
def test_without_masks_the_distance_is_that_of_the_norms_to_the_last_bit(numbers, change):
    x = np.array(numbers)
    y = x * (1 + change)
    expected = float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(x)), 1e-30)
    assert distance({"y": x}, {"y": y}) == expected


def test_a_wrong_fold_of_a_model_with_masked_logits_stops_the_build():
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 4] x, bool[n, 4] mask) => (float[n, 4] y) {
        h = Mul(x, c)  y = Where(mask, h, low) }"""
    proto = onnx.parser.parse_model(text)
    for name, array in {"c": np.float32([1, 2, 3, 4]), "low": np.float32(-1e9)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    feeds = [{"x": np.ones((2, 4), np.float32), "mask": np.array([[True, True, False, True]] * 2)}]
    run(ir.from_proto(proto), [("scale", Scale(1 + 2e-7))], [EqualityProof(feeds)])
    with pytest.raises(BuildFailed, match=r"1\.0e-03 relative"):
        run(ir.from_proto(proto), [("scale", Scale(1.001))], [EqualityProof(feeds)])


def test_a_model_in_half_precision_may_round_as_float16_does_but_no_more():
    proto = onnx.parser.parse_model(TEXT.replace("float[n, 4]", "float16[n, 4]"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float16([1, 2, 3, 4]), "c"))
    feeds = [{"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float16)}]
    watcher = EqualityProof(feeds)
    run(ir.from_proto(proto), [("scale", Scale(1.001))], [watcher])
    assert 1e-4 < watcher.errors[0] < 2e-3
    with pytest.raises(BuildFailed, match="allowed 5e-03"):
        run(ir.from_proto(proto), [("scale", Scale(1.02))], [EqualityProof(feeds)])


def test_positions_that_the_mask_hides_do_not_count(monkeypatch):
    text = """g (float[b, s, 2] x, int64[b, s] attention_mask) => (float[b, s, 2] y) { y = Identity(x) }"""
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}'))
    feed = {"x": np.ones((1, 3, 2), np.float32), "attention_mask": np.array([[1, 1, 0]])}

    @dataclass(frozen=True)
    class Spoil(Pass):
        where: int

        def call(self, model: ir.Model) -> Outcome:
            noise = np.zeros((1, 3, 2), np.float32)
            noise[0, self.where] = 1e-3
            node = model.graph.node(0)
            value = ir.Value(name="noise", const_value=ir.tensor(noise, name="noise"))
            model.graph.register_initializer(value)
            model.graph.remove(node)
            add = ir.node("Add", [node.inputs[0], value])
            add.outputs[0].name, model.graph.outputs[0].name = "y", "old"
            add.outputs[0].type, add.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            model.graph.append(add)
            model.graph.outputs[0] = add.outputs[0]
            return Outcome(model, True)

    proof = EqualityProof([feed])
    run(model, [("spoil", Spoil(2))], [proof])
    assert proof.errors == [0.0]
    with pytest.raises(BuildFailed, match="changed the outputs"):
        run(model, [("spoil", Spoil(1))], [EqualityProof([feed])])
