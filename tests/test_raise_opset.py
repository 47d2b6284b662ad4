from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.errors import UsageError
from qexport.passes.raise_opset import RaiseOpset

REDUCE = """net (float[B, 4] x) => (float[B, 1] y) {
    size = Size(x) some = Greater(size, zero) y = If(some) <
    then_branch = yes () => (float[B, 1] a) { a = ReduceMean<axes=[-1]>(x) },
    else_branch = no () => (float[B, 1] b) { b = ReduceMax<axes=[1]>(x) }>
}"""


def build(opset: int, body: str = REDUCE, ir_version: int = 8) -> ir.Model:
    body = body.replace("{", "<int64 zero = {0}> {", 1)
    return ir.from_onnx_text(f'<ir_version: {ir_version}, opset_import: ["": {opset}]> {body}')


def run(model: ir.Model) -> list[np.ndarray]:
    shape = [2 if not isinstance(dim, int) else dim for dim in model.graph.inputs[0].shape]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize("before", [11, 13, 17])
@pytest.mark.parametrize("after", [18, 20, 23])
def test_operators_that_changed_are_rewritten_in_branches_too(before, after):
    model = build(before)
    old = run(model)
    result = RaiseOpset(after)(model)
    assert result.modified
    assert result.decisions[0].reason == f"opset {before} to {after}"
    assert model.opset_imports[""] == after
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_allclose(run(model)[0], old[0], rtol=1e-6)
    assert not RaiseOpset(after)(model).modified


def test_a_newer_opset_is_never_lowered():
    model = build(17)
    result = RaiseOpset(13)(model)
    assert not result.modified
    assert result.decisions == ()
    assert model.opset_imports[""] == 17


def test_the_version_of_the_format_rises_with_it_and_never_falls():
    low = ir.from_onnx_text('<ir_version: 4, opset_import: ["": 13]> g (float[B] x) => (float[B] y) { y = Neg(x) }')
    high = ir.from_onnx_text('<ir_version: 12, opset_import: ["": 13]> g (float[B] x) => (float[B] y) { y = Neg(x) }')
    for model in (low, high):
        RaiseOpset(20)(model)
    assert (low.ir_version, high.ir_version) == (9, 12)


def test_a_node_whose_meaning_changed_between_newer_opsets_is_rewritten():
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 18]> net (float[1, 1, 4, 4] x) => (float[1, 1, 2, 2] y)
        <float[1, 2, 2, 2] grid = {-1, -1, 0, 0.5, 0.25, 0, 1, 1}> { y = GridSample<mode="bilinear">(x, grid) }"""
    )
    assert RaiseOpset(20)(model).modified
    sample = next(node for node in model.graph if node.op_type == "GridSample")
    assert sample.attributes.get_string("mode") == "linear"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_group_normalization_across_its_change_is_refused_before_any_edit():
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 18]> net (float[B, C, 2] x) => (float[B, C, 2] y)
        <float[2] g = {1, 2}> { y = GroupNormalization<num_groups=2>(x, g, g) }"""
    )
    before = str(model)
    result = RaiseOpset(23)(model)
    assert not result.modified
    assert str(model) == before
    assert [d.action for d in result.decisions] == ["skipped"]
    assert RaiseOpset(20)(model).modified


def test_what_no_converter_can_carry_over_is_refused_and_stays():
    model = ir.from_onnx_text(
        """<ir_version: 4, opset_import: ["": 8]> net (float[1, 1, 2, 2] x) => (float[1, 1, H, W] y)
        { y = Upsample<scales=[1.0, 1.0, 2.0, 2.0], mode="unknown">(x)
          z = Scan<body = b () => () {}, num_scan_inputs = 0>() }"""
    )
    before = str(model)
    result = RaiseOpset(23)(model)
    assert not result.modified
    assert str(model) == before
    assert [d.action for d in result.decisions] == ["skipped"]


def test_an_opset_beyond_the_converters_is_a_usage_error():
    with pytest.raises(UsageError, match="cannot raise to opset 99"):
        RaiseOpset(99)(build(17))


def test_sizes_are_followed_through_computed_shapes_afterwards():
    body = """net (float[B, S, 8] x) => (float[K, L, M, N] y) {
        shape = Shape(x) i = Constant<value_ints=[0]>() j = Constant<value_ints=[1]>() h = Constant<value_ints=[2, 4]>()
        b = Gather(shape, i) s = Gather(shape, j) all = Concat<axis=0>(b, s, h) r = Reshape(x, all) y = Neg(r)
    }"""
    model = build(13, body)
    RaiseOpset(23)(model)
    reshape = next(node for node in model.graph if node.op_type == "Reshape")
    assert [dim if isinstance(dim, int) else dim.value for dim in reshape.outputs[0].shape] == ["B", "S", 2, 4]


def test_weights_inputs_outputs_and_names_survive():
    text = """<ir_version: 8, opset_import: ["": 13]>
        net (float[B, 4] x, float[B, 4] unused) => (float[B, 2] y, float[B, 4] z)
        <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = MatMul(x, w) z = Neg(x) }"""
    model = ir.from_onnx_text(text)
    RaiseOpset(23)(model)
    assert [value.name for value in model.graph.inputs] == ["x", "unused"]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert model.graph.initializers["w"].const_value.numpy().tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert Counter(node.op_type for node in model.graph) == {"MatMul": 1, "Neg": 1}
