"""Integer-only operators between quantizers."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from qexport.errors import UsageError
from qexport.exporter.load import load_source
from qexport.exporter.opening import choose_recipe
from qexport.exporter.options import BuildOptions
from qexport.exporter.product import run_recipe
from qexport.exporter.recipe_files import load_recipe
from qexport.exporter.samples import open_samples
from qexport.passes.numbers.range import RANGE_KEY, Range
from qexport.passes.qlinear import QLinear
from qexport.passes.quantize import Quantize

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model_from(text, opset=20, **weights):
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    proto = onnx.parser.parse_model(header + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def quantized(text, spans, **weights):
    """A model for ort-cpu with Q/DQ pairs at the values of ``spans``."""
    model = model_from(text, **weights)
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    for name, (low, high) in spans.items():
        values[name].meta[RANGE_KEY] = Range(low, high)
    for node in model.graph:
        node.name = node.outputs[0].name
    assert Quantize(target="ort-cpu")(model).modified
    return model


def run(model, *, plain=False, **feeds):
    """onnxruntime; ``plain`` runs every node as it is written."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def ops(model):
    return [node.op_type for node in model.graph]


def reasons(result):
    return {decision.node: decision.reason for decision in result.decisions if decision.action == "skipped"}


def pairs(text, kinds="uint8", opset=20, **weights):
    """A model whose text names quantizers itself: ``s*`` scales, ``z`` a zero point of ``kinds``."""
    scales = {"sx": np.float32(0.02), "sy": np.float32(0.3), "sw": np.full(24, 0.01, np.float32)}
    zeros = {"z": np.array(0, kinds), "m": np.array(128, kinds) if kinds == "uint8" else np.array(3, kinds)}
    integers = {"wq": RNG.integers(-127, 128, (32, 24)).astype(np.int8), "wz": np.zeros(24, np.int8)}
    everything = {**scales, **zeros, **integers, **weights}
    return model_from(text, opset, **{name: array for name, array in everything.items() if name in text})


PRODUCT = """g (float[n, 32] x) => (float[n, 24] y) {
    q = QuantizeLinear(x, sx, m)  d = DequantizeLinear(q, sx, m)  w = DequantizeLinear <axis = 1> (wq, sw, wz)
    p = MatMul(d, w)  BEHIND  o = QuantizeLinear(r, sy, z)  y = DequantizeLinear(o, sy, z) }"""


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255), st.booleans())
def test_the_integers_are_those_of_the_integer_matmul_equation(seed, zx, zy, biased):
    """Y_q = z_Y + s_b / s_Y b_q + s_X s_W / s_Y [X_q W_q - z_W sum X_q - z_X sum W_q + p z_X z_W], with z_W = 0."""
    rng = np.random.default_rng(seed)
    w, b = rng.integers(-127, 128, (32, 24)).astype(np.int8), rng.standard_normal(24).astype(np.float32)
    sw, sx, sy = rng.uniform(0.005, 0.02, 24).astype(np.float32), np.float32(0.02), np.float32(0.05)
    product = "p = Gemm(d, w, b)" if biased else "p = MatMul(d, w)"
    text = f"""g (float[n, 32] x) => (uint8[n, 24] o) {{
        q = QuantizeLinear(x, sx, zx)  d = DequantizeLinear(q, sx, zx)  w = DequantizeLinear <axis = 1> (wq, sw, wz)
        {product}  o = QuantizeLinear(p, sy, zy) }}"""
    held = {"sx": sx, "sw": sw, "sy": sy, "wq": w, "wz": np.zeros(24, np.int8)}
    model = model_from(text, **held, zx=np.uint8(zx), zy=np.uint8(zy), **({"b": b} if biased else {}))
    literal = ReferenceEvaluator(ir.to_proto(model))
    assert QLinear()(model).modified
    assert ops(model) == ["QuantizeLinear", "QGemm" if biased else "QLinearMatMul"]
    x = (rng.standard_normal((7, 32)) * 1.5).astype(np.float32)
    xq = np.clip(np.rint(x / sx) + zx, 0, 255).astype(np.int64)
    sums = xq @ w.astype(np.int64) - zx * w.astype(np.int64).sum(axis=0)
    steps = np.rint(b.astype(np.float64) / (sx.astype(np.float64) * sw)) if biased else 0
    exact = zy + (sums + steps) * (sx.astype(np.float64) * sw / sy)
    (found,) = run(model, x=x)
    assert found.dtype == np.uint8
    assert np.abs(found - np.clip(np.rint(exact), 0, 255)).max() <= (np.abs(exact % 1 - 0.5).min() < 1e-3)
    (float_way,) = literal.run(None, {"x": x})
    assert np.abs(found.astype(int) - float_way.astype(int)).max() <= 1


def chain():
    text = """g (float[n, 16, 8, 8] x) => (float[n, 16, 4, 4] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w, b)  r = Relu(a)
        c = Conv <pads = [1, 1, 1, 1]> (r, v, d)  s = Add(c, r)  t = Relu(s)
        e = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (t, u)  y = Tanh(e) }"""
    weights = {"w": normal(16, 16, 3, 3), "v": normal(16, 16, 3, 3) / 8, "u": normal(16, 16, 3, 3) / 8}
    spans = {"x": (-3, 3), "r": (0, 20), "c": (-30, 30), "t": (0, 35)}
    return quantized(text, spans, **weights, b=normal(16), d=normal(16))


def test_a_chain_of_convolutions_and_a_residual_stays_in_integers_between_its_ends():
    model = chain()
    before = model.clone()
    result = QLinear()(model)
    assert result.modified
    assert [op for op in ops(model) if op != "DequantizeLinear"] == [
        "QuantizeLinear", "QLinearConv", "QLinearConv", "QLinearAdd", "Conv", "Tanh"
    ]  # fmt: skip
    assert reasons(result) == {"e": "its output is read in float"}
    assert {d.node: d.reason for d in result.decisions if d.action == "fused"} == {
        "a": "QLinearConv",
        "c": "QLinearConv",
        "s": "QLinearAdd",
    }
    assert not {"w", "b", "d"} & set(model.graph.initializers)
    biases = [node.inputs[8].const_value.dtype for node in model.graph if node.op_type == "QLinearConv"]
    assert biases == [ir.DataType.INT32] * 2
    x = normal(3, 16, 8, 8)
    (found,), (literal,) = run(model, plain=True, x=x), run(before, plain=True, x=x)
    assert np.square(found - literal).sum() < 1e-4 * np.square(literal).sum()  # another step now and then
    np.testing.assert_array_equal(run(model, x=x)[0], found)


def test_a_second_run_changes_nothing():
    model = chain()
    QLinear()(model)
    before = ir.to_proto(model).SerializeToString()
    assert not QLinear()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_a_bias_is_off_by_at_most_half_a_step_of_its_channel():
    model = chain()
    biases = {name: model.graph.initializers[name].const_value.numpy() for name in ("b", "d")}
    QLinear()(model)
    for node, name in zip([n for n in model.graph if n.op_type == "QLinearConv"], ("b", "d"), strict=True):
        sx, sw, held = (node.inputs[index].const_value.numpy().astype(float) for index in (1, 4, 8))
        assert np.all(np.abs(held * sx * sw - biases[name]) <= sx * sw * 0.5001)


@pytest.mark.parametrize(
    ("behind", "kept"),
    [
        ("r = Relu(p)", []),
        ("r = Clip(p, low, high)", []),
        ("r = Clip(p)", []),
        ("t = Transpose <perm = [1, 0]> (p)  u = Relu(t)  r = Transpose <perm = [1, 0]> (u)", ["Transpose"] * 2),
        ("t = Reshape(p, shape)  u = Relu(t)  r = Flatten(u)", ["Reshape", "Flatten"]),
        ("r = Identity(p)", ["Identity"]),
    ],
)
def test_what_stands_before_the_quantizer_is_dropped_where_saturation_does_it_or_works_on_integers(behind, kept):
    extra = {"low": np.float32(0), "high": np.float32(80), "shape": np.array([-1, 24, 1], np.int64)}
    text = PRODUCT.replace("BEHIND", behind)
    model = pairs(text, **extra)
    before = model.clone()
    assert QLinear()(model).modified
    assert ops(model) == ["QuantizeLinear", "QLinearMatMul", *kept, "DequantizeLinear"]
    x = normal(9, 32)
    (found,), (literal,) = run(model, plain=True, x=x), run(before, plain=True, x=x)
    assert np.abs(found - literal).max() <= 0.301
    assert (found != literal).mean() < 0.02
    assert found.max() > 0


def test_pooling_compares_integers_and_gives_the_same_ones():
    text = """g (float[n, 16, 8, 8] x) => (float[n, 16, 4, 4] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w)  r = Relu(a)  p = MaxPool <kernel_shape = [3, 3], strides = [2, 2],
        pads = [1, 1, 1, 1]> (r)  c = Conv(p, v)  y = Tanh(c) }"""
    spans = {"x": (-3, 3), "p": (0, 40)}
    model = quantized(text, spans, w=normal(16, 16, 3, 3), v=normal(16, 16, 1, 1) / 16)
    before = model.clone()
    QLinear()(model)
    found = [node for node in model.graph if node.op_type == "MaxPool"]
    assert found[0].inputs[0].dtype == found[0].outputs[0].dtype == ir.DataType.UINT8
    x = normal(2, 16, 8, 8)
    (integers,), (literal,) = run(model, plain=True, x=x), run(before, plain=True, x=x)
    assert np.abs(integers - literal).max() < 0.05


@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_gemm_takes_the_integer_form_in_both_layouts(trans_b):
    text = f"""g (float[n, 32] x) => (float[n, 16] y) {{
        h = Gemm <transB = {trans_b}> (x, w, b)  r = Relu(h)  y = MatMul(r, v) }}"""
    w = normal(24, 32) if trans_b else normal(32, 24)
    model = quantized(text, {"x": (-3, 3), "r": (0, 20)}, w=w, b=normal(24), v=normal(24, 16))
    before = model.clone()
    QLinear()(model)
    assert "QGemm" in ops(model)
    x = normal(20, 32)
    (found,), (literal,) = run(model, x=x), run(before, plain=True, x=x)
    np.testing.assert_allclose(found, literal, atol=0.4)
    assert np.square(found - literal).sum() < 1e-5 * np.square(literal).sum()


def test_without_onnxruntime_s_own_operators_only_those_of_the_standard_are_used():
    model = chain()
    del model.opset_imports["com.microsoft"]
    result = QLinear(contrib=False)(model)
    assert reasons(result)["s"] == "it has no integer form"
    assert {node.domain for node in model.graph} == {""}
    assert "com.microsoft" not in model.opset_imports
    x = normal(3, 16, 8, 8)
    (reference,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(run(model, plain=True, x=x)[0], reference, atol=0.05)


def test_the_domain_of_onnxruntime_is_imported_where_it_is_used():
    model = chain()
    del model.opset_imports["com.microsoft"]
    QLinear()(model)
    assert model.opset_imports["com.microsoft"] == 1
    run(model, x=normal(1, 16, 8, 8))


def test_scales_in_half_precision_become_the_same_ones_in_single():
    text = PRODUCT.replace("BEHIND", "r = Relu(p)").replace("float[", "float16[")
    half = {name: np.asarray(value, np.float16) for name, value in {"sx": 0.02, "sy": 0.3, "sw": [0.01] * 24}.items()}
    model = pairs(text, **half)
    before = model.clone()
    assert QLinear()(model).modified
    x = normal(9, 32).astype(np.float16)
    (found,), (literal,) = run(model, x=x), run(before, plain=True, x=x)
    np.testing.assert_allclose(found.astype(float), literal.astype(float), atol=0.31)


BLOCK = "w = DequantizeLinear <axis = 1> (wq, sw, wz)"
REFUSED = {
    "read in float": ("r = Relu(p)  t = Tanh(r)", {}, "its output is read in float"),
    "two quantizers": ("r = Relu(p)  t = QuantizeLinear(r, sx, z)", {}, "its output is read in float"),
    "an operator between": ("r = Tanh(p)", {}, "its output is read in float"),
    "a clip inside the range": ("r = Clip(p, low, high)", {"high": np.float32(6)}, "does not stand for"),
    "a floor inside the range": ("r = Clip(p, low, high)", {"low": np.float32(1)}, "does not stand for"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_no_integer_operator_stands_for_is_left_alone_with_its_reason(case):
    behind, extra, reason = REFUSED[case]
    extra = {"low": np.float32(0), "high": np.float32(80), **extra}
    model = pairs(PRODUCT.replace("BEHIND", behind), **extra)
    before = ir.to_proto(model).SerializeToString()
    result = QLinear()(model)
    assert not result.modified
    assert any(reason in found for found in reasons(result).values())
    assert ir.to_proto(model).SerializeToString() == before


EDITS = {
    "a float weight": (BLOCK, "w = Abs(f)", "an input is in float"),
    "scales of input channels": ("<axis = 1> (wq, sw, wz)", "<axis = 0> (wq, sk, wzk)", "not those of output channels"),
    "fp8": ("q = QuantizeLinear(x, sx, m)  d = DequantizeLinear(q, sx, m)", "d = Abs(x)", "an input is in float"),
    "no zero point": ("DequantizeLinear(q, sx, m)", "DequantizeLinear(q, sx)", "quantized in another way"),
    "several zero points": (", wz)", ", wv)", "several zero points"),
}


@pytest.mark.parametrize("case", sorted(EDITS))
def test_inputs_that_are_quantized_in_another_way_are_refused(case):
    old, new, reason = EDITS[case]
    text = PRODUCT.replace("BEHIND", "r = Relu(p)").replace(old, new)
    extra = {"f": normal(32, 24), "sk": np.full(32, 0.01, np.float32), "wzk": np.zeros(32, np.int8)}
    extra["wv"] = np.arange(24).astype(np.int8)
    assert new in text
    result = QLinear()(pairs(text, **extra))
    assert not result.modified
    assert any(reason in found for found in reasons(result).values())


def test_a_relu_behind_a_symmetric_quantizer_is_no_saturation():
    model = pairs(PRODUCT.replace("BEHIND", "r = Relu(p)"), "int8")
    assert reasons(QLinear()(model)) == {"": "its quantizer does not stand for the activation"}


def test_a_bias_beyond_32_bits_is_refused():
    text = PRODUCT.replace("MatMul(d, w)", "Gemm(d, w, b)").replace("BEHIND", "r = Relu(p)")
    assert "its bias does not fit 32 bits" in reasons(QLinear()(pairs(text, b=np.full(24, 1e9, np.float32)))).values()
    assert QLinear()(pairs(text, b=np.full(24, 1e5, np.float32))).modified


@pytest.mark.parametrize("attributes", ["alpha = 2.0", "beta = 0.5"])
def test_a_scaled_gemm_is_refused(attributes):
    text = PRODUCT.replace("MatMul(d, w)", f"Gemm <{attributes}> (d, w, b)").replace("BEHIND", "r = Relu(p)")
    assert "alpha or beta is not 1" in reasons(QLinear()(pairs(text, b=normal(24)))).values()


def test_a_float_model_has_nothing_to_merge():
    model = model_from("g (float[n, 32] x) => (float[n, 24] y) { y = MatMul(x, w) }", w=normal(32, 24))
    result = QLinear()(model)
    assert not result.modified
    assert result.decisions == ()


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt", "ort-cuda"])
def test_a_target_without_integer_operators_is_a_usage_error_that_names_one_with_them(target):
    model = chain()
    before = ops(model)
    with pytest.raises(UsageError, match="does not read qlinear") as caught:
        QLinear(target=target)(model)
    assert "ort-cpu" in caught.value.hint
    assert ops(model) == before


def test_resnet20_in_integers_chooses_as_in_pairs(samples):
    folder = samples / "resnet20"
    recipe = choose_recipe(folder / "int8.toml", BuildOptions(target="ort-cpu", set=("calibrate.samples=32",)))
    source = load_source(folder / "resnet20.onnx")
    data = open_samples(source, recipe, folder / "calibration.npz", folder / "test.npz")
    pairs = run_recipe(source, recipe, data, BuildOptions()).model
    integers = pairs.clone()
    QLinear()(integers)
    assert ops(integers).count("QLinearConv") == 18
    assert ops(integers).count("QLinearAdd") == 6
    images = np.stack([sample["input"] for sample, _ in zip(data.judge.data, range(200), strict=False)])
    (found,), (literal,) = run(integers, plain=True, input=images), run(pairs, plain=True, input=images)
    assert (found.argmax(axis=1) == literal.argmax(axis=1)).mean() >= 0.99
    assert np.square(found - literal).sum() < 1e-3 * np.square(literal).sum()


def test_the_recipe_puts_the_step_behind_all_that_change_weights_and_names_its_target():
    recipe = load_recipe("int8-qlinear")
    names = [step.pass_ for step in recipe.step]
    assert names.index("qlinear") == names.index("correct-bias") + 1
    assert recipe.export.target == "ort-cpu"
