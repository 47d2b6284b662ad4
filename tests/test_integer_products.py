"""Integer products that scale their sums and add their bias themselves."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qexport
from qexport.exporter.looking.inspect import inspect_model
from qexport.exporter.options import BuildOptions
from qexport.exporter.precision.lab import Question, open_lab
from qexport.exporter.precision.layers import measure_groups, open_probe
from qexport.passes.integer_products import IntegerProducts
from qexport.passes.numbers.range import RANGE_KEY, Range
from qexport.passes.quantize import Quantize

RNG = np.random.default_rng(0)
K, N = 32, 24
FUSED = "MatMulIntegerToFloat"
READ = "q = QuantizeLinear(x, sx, zx)  d = DequantizeLinear(q, sx, zx)  w = DequantizeLinear <axis = 1> (wq, sw, zw)"
TURNED = READ.replace("axis = 1> (wq", "axis = 0> (wt")
FIRES = {
    "a bias": f"{READ}  m = MatMul(d, w)  y = Add(m, b)",
    "a bias first": f"{READ}  m = MatMul(d, w)  y = Add(b, m)",
    "a wide bias": f"{READ}  m = MatMul(d, w)  y = Add(m, b3)",
    "no bias": f"{READ}  m = MatMul(d, w)  y = Relu(m)",
    "a sum with one number": f"{READ}  m = MatMul(d, w)  y = Add(m, one)",
    "read twice": f"{READ}  m = MatMul(d, w)  n = Add(m, b)  y = Mul(n, m)",
    "an axis from behind": f"{READ.replace('axis = 1', 'axis = -1')}  m = MatMul(d, w)  y = Add(m, b)",
    "no zero point of the weight": f"{READ.replace('sw, zw', 'sw')}  m = MatMul(d, w)  y = Add(m, b)",
    "one scale for the weight": f"{READ.replace('sw, zw', 's1')}  m = MatMul(d, w)  y = Add(m, b)",
    "integers read in float too": f"{READ}  m = MatMul(d, w)  n = Add(m, b)  e = ReduceSum(d)  y = Add(n, e)",
}
GEMMS = {
    "plain": f"{READ}  y = Gemm(d, w, b)",
    "no bias": f"{READ}  y = Gemm(d, w)",
    "one number": f"{READ}  y = Gemm(d, w, one)",
    "one row": f"{READ}  y = Gemm(d, w, b2)",
    "transposed": f"{TURNED}  y = Gemm <transB = 1> (d, w, b)",
    "scaled": f"{TURNED}  y = Gemm <transB = 1, alpha = 0.5, beta = -2.0> (d, w, b)",
}
STAYS = {
    "it is not computed in float32": f"{READ}  m = MatMul(d, w)  y = Add(m, bh)".replace("sx", "sh").replace(
        "sw", "swh"
    ),
    "its input is not uint8": f"{READ}  m = MatMul(d, w)  y = Add(m, b)".replace("zx", "zs"),
    "its input has several scales, or computed ones": (
        f"{READ}  m = MatMul(d, w)  y = Add(m, b)".replace("sx", "sk").replace("zx", "zk")
    ),
    "its weight is not symmetric in float32": f"{READ}  m = MatMul(d, w)  y = Add(m, b)".replace("zw", "za"),
    "the scales of its weight are not those of output channels": (
        f"{READ}  m = MatMul(d, w)  y = Add(m, b)".replace("axis = 1", "axis = 0").replace("sw, zw", "sk")
    ),
    "its weight is no stored int8 matrix": f"{READ}  t = Transpose <perm = [0, 2, 1]> (d)  y = MatMul(d, t)"
    + "  e = QuantizeLinear(t, sx, zx)  f = DequantizeLinear(e, sx, zx)  z = MatMul(d, f)",
    "its bias is computed, or no vector": f"{READ}  c = Abs(b)  y = Gemm(d, w, c)",
    "transposed activation": f"{READ}  y = Gemm <transA = 1> (d, w, b)",
}
CONSTANTS = {
    "sx": np.float32(0.03),
    "sh": np.float16(0.03),
    "sk": np.full(K, 0.03, np.float32),
    "zx": np.uint8(120),
    "zs": np.int8(3),
    "zk": np.full(K, 120, np.uint8),
    "wq": RNG.integers(-127, 128, (K, N)).astype(np.int8),
    "wt": RNG.integers(-127, 128, (N, K)).astype(np.int8),
    "sw": RNG.uniform(0.001, 0.02, N).astype(np.float32),
    "swh": np.full(N, 0.01, np.float16),
    "s1": np.float32(0.01),
    "zw": np.zeros(N, np.int8),
    "za": np.ones(N, np.int8),
    "b": RNG.standard_normal(N).astype(np.float32),
    "b2": RNG.standard_normal((1, N)).astype(np.float32),
    "b3": RNG.standard_normal((1, 1, N)).astype(np.float32),
    "one": np.array([0.7], np.float32),
}


def model_from(body, shape="n, 5, 32", **replaced):
    kind = "float16" if "swh" in body else "float"
    ends = "float z" if " z = " in body else f"{kind} y"
    text = f'<ir_version: 10, opset_import: ["" : 21]> net ({kind}[{shape}] x) => ({ends}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    read = {name for node in proto.graph.node for name in node.input}
    for name, array in {**CONSTANTS, **replaced}.items():
        if name in read:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        node.name = f"node {node.outputs[0].name}"
    return model


def session(model, *, plain=True, path=""):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.optimized_model_filepath = str(path)
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, x, **how):
    return session(model, **how).run(None, {"x": x})[0]


def ops(model):
    return [node.op_type for node in model.graph]


def activations(*shape):
    return (2 * RNG.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("case", FIRES)
def test_a_product_and_its_bias_become_one_operator_with_the_same_numbers(case):
    model, x = model_from(FIRES[case]), activations(3, 5, K)
    before = run(model, x)
    result = IntegerProducts()(model)
    assert result.modified
    assert ops(model).count(FUSED) == 1
    assert "MatMul" not in ops(model)
    assert model.opset_imports["com.microsoft"] == 1
    assert [node.name for node in model.graph if node.op_type == FUSED] == ["node m"]
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-4)
    assert not IntegerProducts()(model).modified


@pytest.mark.parametrize("case", GEMMS)
def test_a_gemm_becomes_the_same_operator_with_the_same_numbers(case):
    model, x = model_from(GEMMS[case], "n, 32"), activations(7, K)
    before = run(model, x)
    assert IntegerProducts()(model).modified
    assert ops(model) == ["QuantizeLinear", FUSED]
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-4)
    assert not IntegerProducts()(model).modified


@pytest.mark.parametrize("case", STAYS)
def test_what_the_operator_does_not_read_stays_with_a_reason(case):
    model = model_from(STAYS[case], "32, 32" if "Gemm" in STAYS[case] else "n, 5, 32")
    before = ops(model)
    result = IntegerProducts()(model)
    assert not result.modified
    assert {(d.action, d.reason) for d in result.decisions} == {("skipped", case)}
    assert ops(model) == before


@pytest.mark.parametrize("addend", ["read", "wrong"])
def test_only_a_bias_of_one_number_a_column_is_taken(addend):
    bodies = {"read": f"{READ}  m = MatMul(d, w)  r = Relu(m)  y = Add(m, r)", "wrong": FIRES["a wide bias"]}
    model = model_from(bodies[addend], "1, 24, 32", b3=RNG.standard_normal((1, N, 1)).astype(np.float32))
    x = activations(1, 24, K)
    before = run(model, x)
    assert IntegerProducts()(model).modified
    assert ops(model).count("Add") == 1
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-4)


def test_a_bias_that_raises_the_rank_stays_an_addition():
    model, x = model_from(FIRES["a wide bias"], "n, 32"), activations(4, K)
    before = run(model, x)
    assert IntegerProducts()(model).modified
    assert ops(model).count("Add") == 1
    after = run(model, x)
    assert after.shape == before.shape == (1, 4, N)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 255), st.floats(1e-3, 1.0), st.integers(0, 2**32 - 1))
def test_the_operator_computes_what_the_equation_says(zero, scale, seed):
    rng = np.random.default_rng(seed)
    wq = rng.integers(-127, 128, (K, N)).astype(np.int8)
    model = model_from(FIRES["a bias"], zx=np.uint8(zero), sx=np.float32(scale), wq=wq)
    assert IntegerProducts()(model).modified
    x = (100 * scale * rng.standard_normal((1, 5, K))).astype(np.float32)
    integers = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255).astype(np.int64)
    sums = (integers - zero) @ wq.astype(np.int64)
    expected = sums * (np.float64(np.float32(scale)) * CONSTANTS["sw"]) + CONSTANTS["b"]
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-4 * scale)


def test_products_of_one_activation_share_its_integers_and_a_shared_weight_is_kept_once():
    body = f"{READ}  m = MatMul(d, w)  n = Add(m, b)  o = MatMul(d, w)  p = Add(o, b)  y = Mul(n, p)"
    model, x = model_from(body), activations(2, 5, K)
    before = run(model, x)
    assert IntegerProducts()(model).modified
    assert sorted(ops(model)) == [FUSED, FUSED, "Mul", "QuantizeLinear"]
    assert set(model.graph.initializers) == {"sx", "zx", "wq", "sw", "b"}
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "ort-cuda"])
def test_other_targets_keep_their_quantizers(target):
    model = model_from(FIRES["a bias"])
    assert not IntegerProducts(target=target)(model).modified
    assert FUSED not in ops(model)


def test_a_float_model_has_nothing_to_merge():
    model = model_from("y = MatMul(x, x)", "5, 5")
    result = IntegerProducts()(model)
    assert not result.modified
    assert not result.decisions


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_onnxruntime_leaves_no_bias_and_no_float_product_of_what_quantize_makes(op, tmp_path):
    end = "m = MatMul(x, f)  y = Add(m, b)" if op == "MatMul" else "y = Gemm(x, f, b)"
    model = model_from(end, "n, 32", f=RNG.standard_normal((K, N)).astype(np.float32))
    model.graph.inputs[0].meta[RANGE_KEY] = Range(-4.0, 5.0)
    Quantize(target="ort-cpu")(model)
    x = activations(6, K)
    session(model, plain=False, path=tmp_path / "before.onnx")
    left = {node.op_type for node in onnx.load(tmp_path / "before.onnx").graph.node}
    assert left & {"Add", "Gemm"}  # the fault that the pass is for
    before = run(model, x)
    assert IntegerProducts()(model).modified
    np.testing.assert_allclose(run(model, x, plain=False, path=tmp_path / "after.onnx"), before, rtol=1e-5, atol=1e-4)
    assert [node.op_type for node in onnx.load(tmp_path / "after.onnx").graph.node] == ["QuantizeLinear", FUSED]


def test_inspect_and_sensitivity_see_the_merged_products(tmp_path):
    weights = {"f": RNG.standard_normal((K, K)).astype(np.float32) / 10, "b": np.ones(K, np.float32)}
    body = "m = MatMul(x, f)  n = Add(m, b)  t = Tanh(n)  o = MatMul(t, f)  y = Add(o, b)"
    onnx.save(ir.to_proto(model_from(body, **weights)), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=activations(24, 5, K))
    steps = "".join(f'[[step]]\npass = "{name}"\n' for name in ("calibrate", "quantize", "integer-products"))
    (tmp_path / "recipe.toml").write_text(steps)
    data, asked = tmp_path / "data.npz", BuildOptions(target="ort-cpu")
    lab = open_lab(Question(tmp_path / "model.onnx", tmp_path / "recipe.toml", data, data, asked, samples=8))
    assert inspect_model(lab.product.model).precision == {"uint8 x int8": 2}
    probe = open_probe(lab.product, lab.excerpt, lab.target)
    assert probe.unreached == ()
    assert all(0 < score.error < 1e-2 for score in measure_groups(probe, [["node m"], ["node o"]]))


def test_a_stack_of_layers_is_built_though_a_last_bit_moves_codes_behind_it(tmp_path):
    layers, rng = 6, np.random.default_rng(0)
    body = "".join(f"h{i} = Gemm(r{i}, w{i}, b{i})  r{i + 1} = Relu(h{i})  " for i in range(layers))
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[n, 64] r0) => (float[n, 64] y) {{ {body} y = Abs(r6) }}'
    proto = onnx.parser.parse_model(text)
    for i in range(layers):
        for name, array in (("w", rng.standard_normal((64, 64)) * np.sqrt(2 / 64)), ("b", rng.standard_normal(64))):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), f"{name}{i}"))
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", r0=rng.standard_normal((48, 64)).astype(np.float32))
    asked = BuildOptions(output=tmp_path / "out", set=("export.never_worse=false",))
    result = qexport.build(
        tmp_path / "model.onnx", recipe="int8", calib=tmp_path / "calib.npz", target="ort-cpu", options=asked
    )
    (step,) = (step for step in result.steps if step.name == "integer-products")
    assert step.modified
    assert [d.action for d in step.decisions] == ["fused"] * layers
    assert result.quality.sqnr > 20  # of the float model, which is what every output is compared with
    (file,) = (tmp_path / "out").glob("*.onnx")
    assert [node.op_type for node in onnx.load(file).graph.node].count(FUSED) == layers
