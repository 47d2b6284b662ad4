import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.passes.numbers.range import RANGE_KEY, Range
from qexport.passes.quantize import Quantize
from qexport.passes.widen_bias import WidenBias

RNG = np.random.default_rng(0)
FIRES = {
    "bias last": "m = MatMul(x, w)  y = Add(m, b)",
    "bias first": "m = MatMul(x, w)  y = Add(b, m)",
}
STAYS = {
    "of rank two": ("float[n, 32] x", "m = MatMul(x, w)  y = Add(m, b)"),
    "read elsewhere": ("float[4, 8, 32] x", "m = MatMul(x, w)  n = Add(m, b)  y = Add(n, m)"),
    "without a bias": ("float[4, 8, 32] x", "m = MatMul(x, w)  y = Add(m, x)"),
    "wide already": ("float[4, 8, 32] x", "m = MatMul(x, w)  y = Add(m, wide)"),
    "of two activations": ("float[4, 32, 32] x", "m = MatMul(x, x)  y = Add(m, b)"),
}


def model_from(body, inputs="float[4, 8, 32] x"):
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => (float y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    weights = {
        "w": RNG.standard_normal((32, 32)),
        "b": RNG.standard_normal(32),
        "wide": RNG.standard_normal((1, 1, 32)),
    }
    for name, array in weights.items():
        if name in text.replace("(", " ").replace(")", " ").replace(",", " ").split():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def session(model, options=None):
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("case", FIRES)
def test_the_bias_gets_the_rank_of_the_product_and_the_numbers_stay(case):
    model, x = model_from(FIRES[case]), RNG.standard_normal((4, 8, 32)).astype(np.float32)
    before = session(model).run(None, {"x": x})[0]
    assert WidenBias()(model).modified
    (add,) = (node for node in model.graph if node.op_type == "Add")
    assert sorted(len(value.shape) for value in add.inputs) == [3, 3]
    assert "b" not in model.graph.initializers
    np.testing.assert_allclose(session(model).run(None, {"x": x})[0], before, rtol=1e-6, atol=1e-5)
    assert not WidenBias()(model).modified


@pytest.mark.parametrize("case", STAYS)
def test_other_additions_stay_as_they_are(case):
    inputs, body = STAYS[case]
    model = model_from(body, inputs)
    assert not WidenBias()(model).modified


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_onnxruntime_keeps_a_quantized_product_of_static_size_a_product(target, tmp_path):
    model = model_from(FIRES["bias last"])
    model.graph.inputs[0].meta[RANGE_KEY] = Range(-4.0, 4.0)
    WidenBias()(model)
    Quantize(target=target)(model)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session(model, options)
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "Gemm" not in kinds
    assert "Reshape" not in kinds
    assert target != "ort-cpu" or kinds & {"MatMulIntegerToFloat", "QLinearMatMul"}
