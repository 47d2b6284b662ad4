import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.passes.half import LARGEST, Half
from qexport.passes.quantize import Quantize
from qexport.passes.range import RANGE_KEY, Range

RNG = np.random.default_rng(0)
F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


def model_from(text, opset=20, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def run(model, **feeds):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def mlp():
    text = "g (float[n, 32] x) => (float[n, 16] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    return model_from(text, w=normal(32, 24), v=normal(24, 16))


def test_inner_values_and_weights_become_half_and_the_borders_keep_their_types():
    model = mlp()
    assert Half()(model).modified
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [F32, F32]
    assert model.graph.outputs[0].name == "y"
    assert {value.const_value.dtype for value in model.graph.initializers.values()} == {F16}
    assert all(node.outputs[0].dtype == F16 for node in model.graph if node.op_type in ("MatMul", "Relu"))


def test_numbers_agree_to_half_precision():
    model, x = mlp(), normal(40, 32)
    (before,) = run(model, x=x)
    Half()(model)
    (after,) = run(model, x=x)
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, atol=0.1, rtol=0.01)
    assert np.abs(after - before).max() > 0


def test_the_model_it_was_cloned_from_stays_in_float32():
    model = mlp()
    clone = model.clone()
    Half()(clone)
    assert {value.dtype for node in model.graph for value in node.outputs} == {F32}


def test_a_second_run_changes_nothing():
    model = mlp()
    Half()(model)
    before = ir.to_proto(model).SerializeToString()
    assert not Half()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_targets_that_compute_in_float32_are_left_alone():
    result = Half(target="ort-cpu")(mlp())
    assert not result.modified
    assert "computes in float32" in result.decisions[0].reason


def test_scales_of_quantizers_become_half_without_changing_value():
    model = mlp()
    for value in (model.graph.inputs[0], model.graph[1].outputs[0]):
        value.meta[RANGE_KEY] = Range(-4.0, 4.0)
    Quantize(min_sqnr=0)(model)
    before = {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith("/scale")}
    Half()(model)
    for name, scale in before.items():
        half = model.graph.initializers[f"{name}/half"].const_value.numpy()
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half.astype(np.float32), scale)
    run(model, x=normal(3, 32))


def test_old_quantizers_are_refused():
    model = model_from("g (float[n, 32] x) => (float[n, 24] y) { y = MatMul(x, w) }", opset=17, w=normal(32, 24))
    model.graph.inputs[0].meta[RANGE_KEY] = Range(-4.0, 4.0)
    Quantize()(model)
    result = Half()(model)
    assert not result.modified
    assert "needs opset 19" in result.decisions[0].reason


def test_long_sums_stay_in_float32_between_casts():
    text = "g (float[n, 32] x) => (float[n] y) { h = Relu(x)  s = ReduceSum <keepdims = 0> (h, axes)  y = Sqrt(s) }"
    model, x = model_from(text, axes=np.array([1])), np.full((2, 32), 3000.0, np.float32)
    result = Half()(model)
    assert [decision.reason for decision in result.decisions] == ["sums many elements"]
    np.testing.assert_allclose(run(model, x=x)[0], np.sqrt(32 * 3000.0), rtol=2e-3)  # 96000 is beyond float16


def test_a_node_with_a_weight_beyond_the_range_is_kept():
    model = model_from(
        "g (float[n, 4] x) => (float[n, 4] y) { h = Relu(x)  y = Mul(h, w) }", w=np.float32([1e6, 1, 1, 1])
    )
    result = Half()(model)
    assert [d.reason for d in result.decisions] == ["a weight is beyond the float16 range"]
    np.testing.assert_allclose(run(model, x=np.ones((1, 4), np.float32))[0][0, 0], 1e6)


@pytest.mark.parametrize("masked", [-1e9, np.finfo(np.float32).min])
def test_masks_are_clamped_and_still_hide(masked):
    text = "g (float[n, 4] x, float[n, 4] m) => (float[n, 4] y) { h = Mul(m, c)  s = Add(x, h)  y = Softmax(s) }"
    model = model_from(text, c=np.array(masked, np.float32))
    Half()(model)
    (y,) = run(model, x=normal(1, 4), m=np.float32([[0, 0, 1, 1]]))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[0, 2:], 0)
    assert all(np.abs(v.const_value.numpy()).max() <= LARGEST for v in model.graph.initializers.values())


def test_casts_to_float_become_casts_to_half():
    model = model_from("g (int64[n] x) => (float[n] y) { f = Cast <to = 1> (x)  y = Relu(f) }")
    Half()(model)
    assert [node.op_type for node in model.graph] == ["Cast", "Relu", "Cast"]
    np.testing.assert_array_equal(run(model, x=np.array([1, 2]))[0], [1, 2])


def test_an_operator_without_a_half_form_is_kept():
    text = "g (float[1, 1, 4, 4] x) => (float[1, 1, 8, 8] y) { h = Relu(x)  y = Resize(h, roi, scales) }"
    model = model_from(text, roi=np.zeros(0, np.float32), scales=np.float32([1, 1, 2, 2]))
    Half()(model)
    run(model, x=normal(1, 1, 4, 4))


def test_an_output_that_is_read_inside_as_well_keeps_its_name():
    model = model_from("g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) { y = Relu(x)  z = Neg(y) }")
    Half()(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    x = normal(3, 4)
    y, z = run(model, x=x)
    np.testing.assert_allclose(y, np.maximum(x, 0), atol=2e-3)
    np.testing.assert_allclose(z, -y)


def test_control_flow_is_left_alone_with_a_reason():
    text = """g (bool c, float[n] x) => (float[n] y) {
        y = If (c) <then_branch = t () => (float[n] a) { a = Relu(x) },
                    else_branch = e () => (float[n] b) { b = Neg(x) }> }"""
    result = Half()(model_from(text))
    assert not result.modified
    assert "control flow" in result.decisions[0].reason
