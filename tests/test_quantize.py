import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from qexport.errors import UsageError
from qexport.passes.half import Half
from qexport.passes.numbers.range import RANGE_KEY, SQNR_KEY, Range, integers_for
from qexport.passes.placement import plan
from qexport.passes.quantize import Quantize, quantized_nodes
from qexport.passes.target import TARGETS, find_target

RNG = np.random.default_rng(0)


def model_from(text, **weights):
    header = f'<ir_version: 10, opset_import: ["" : {weights.pop("opset", 20)}, "com.microsoft" : 1]>\n'
    proto = onnx.parser.parse_model(header + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def calibrated(model, **spans):
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    for name, span in spans.items():
        values[name].meta[RANGE_KEY] = Range(*span)
    return model


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def mlp():
    text = "g (float[n, 32] x) => (float[n, 16] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    return calibrated(model_from(text, w=normal(32, 24), v=normal(24, 16)), x=(-3.0, 3.0), r=(0.0, 20.0))


def ops(model):
    return [node.op_type for node in model.graph]


def run(model, **feeds):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def by_hand(x, w, span, kind):
    """The quantized product in numpy, from the definitions; int8 targets compute the rest in float16."""
    scale = np.abs(w).max(axis=0) / 127
    if kind == "int8":
        half = scale.astype(np.float16)
        scale = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half).astype(np.float64)
    return integers_for(span, kind).apply(x) @ (np.clip(np.rint(w / scale), -127, 127) * scale)


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_a_quantized_product_computes_what_the_formula_says(target):
    w = normal(32, 24)
    text = "g (float[n, 32] x) => (float[n, 24] y) { y = MatMul(x, w) }"
    model = calibrated(model_from(text, w=w), x=(-2.0, 3.0))
    assert Quantize(target=target)(model).modified
    x = normal(50, 32)
    expected = by_hand(x, w, Range(-2.0, 3.0), find_target(target).activation)
    (reference,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(reference, expected, atol=1e-4)
    np.testing.assert_allclose(run(model, x=x)[0], expected, atol=1e-3)


def test_the_file_holds_integers_and_no_float_copy_of_the_weights():
    model = mlp()
    Quantize()(model)
    kinds = {value.name: value.const_value.dtype for value in model.graph.initializers.values()}
    assert kinds["w/int8"] == ir.DataType.INT8
    assert "w" not in kinds
    assert (
        max(t.const_value.size for t in model.graph.initializers.values() if t.const_value.dtype == ir.DataType.FLOAT)
        < 32
    )


def test_a_second_run_changes_nothing():
    model = mlp()
    assert Quantize()(model).modified
    before = ir.to_proto(model).SerializeToString()
    result = Quantize()(model)
    assert not result.modified
    assert [(d.action, d.reason) for d in result.decisions] == [("skipped", "already quantized")]
    assert ir.to_proto(model).SerializeToString() == before


QUANTIZED = {
    "QuantizeLinear": "q = QuantizeLinear(x, s, i)  y = DequantizeLinear(q, s, i)",
    "DynamicQuantizeLinear": "q, t, o = DynamicQuantizeLinear(x)  y = DequantizeLinear(q, t, o)",
    "MatMulInteger": "q = Cast <to = 3> (x)  r = MatMulInteger(q, i8)  y = Cast <to = 1> (r)",
    "QLinearMatMul": "q = Cast <to = 3> (x)  r = QLinearMatMul(q, s, i, i8, s, i, s, i)  y = Cast <to = 1> (r)",
    "MatMulNBits": "y = com.microsoft.MatMulNBits <K = 32, N = 32, bits = 4, block_size = 32> (x, b4, s4)",
}


@pytest.mark.parametrize("op", sorted(QUANTIZED))
def test_a_quantized_model_is_found_and_left_alone_whatever_it_was_quantized_with(op):
    text = f"g (float[n, 32] x) => (float[n, 24] z) {{ {QUANTIZED[op]}  z = MatMul(y, w) }}"
    model = calibrated(model_from(text, w=normal(32, 24)), y=(-3.0, 3.0))
    assert quantized_nodes(model)[0].op_type == op
    result = Quantize()(model)
    assert not result.modified
    assert [d.reason for d in result.decisions] == ["already quantized"]


def test_quantized_nodes_of_branches_are_found_and_a_float_model_has_none():
    text = """g (bool c, float[n, 32] x) => (float[n, 32] y) {
        y = If (c) <then_branch = t () => (float[n, 32] a) { q = QuantizeLinear(x, s)  a = DequantizeLinear(q, s) },
                    else_branch = e () => (float[n, 32] b) { b = Relu(x) }> }"""
    assert len(quantized_nodes(model_from(text, s=np.float32(0.1)))) == 2
    assert quantized_nodes(mlp()) == []


def test_names_that_the_model_has_already_are_not_used_again():
    text = """g (float[n, 32] x) => (float[n, 16] y) {
        h = MatMul(x, w)  r = Relu(h)  t = Neg(r)  u = Abs(t)  v = Identity(u)  y = MatMul(v, k) }"""
    plain = model_from(text, w=normal(32, 24), k=normal(24, 16))
    taken = ["x/quantized", "w/dequantized", "x/scale", "k/int8"]
    for node, name in zip(plain.graph, taken, strict=False):
        node.outputs[0].name = name
    for node, name in zip(plain.graph, ["w/DequantizeLinear", "x/QuantizeLinear", "x/DequantizeLinear"], strict=False):
        node.name = name
    for index, node in enumerate(list(plain.graph)[3:]):
        node.name = f"node {index}"
    model = calibrated(plain.clone(), x=(-3.0, 3.0), v=(0.0, 20.0))
    assert Quantize()(model).modified
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    for items in (values, list(model.graph)):
        names = [item.name for item in items]
        assert len(set(names)) == len(names)
    x = normal(5, 32).clip(-3, 3)
    np.testing.assert_allclose(run(model, x=x)[0], run(plain, x=x)[0], atol=2)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_each_target_gets_its_own_activation_type_with_a_positive_scale(name):
    model = mlp()
    Quantize(target=name)(model)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = (value.const_value.numpy() for value in node.inputs[1:])
            assert zero.dtype == TARGETS[name].activation
            assert scale > 0
            assert TARGETS[name].activation == "uint8" or zero == 0


def test_a_tensor_is_quantized_for_its_product_only_and_not_for_the_add_and_the_norm_that_read_it_too():
    text = """g (float[n, 32] x) => (float[n, 32] y, float[n, 32] z) {
        a = Relu(x)  m = MatMul(a, w)  y = Add(m, a)  z = LayerNormalization(a, s) }"""
    model = calibrated(model_from(text, w=normal(32, 32), s=np.ones(32, np.float32)), a=(0.0, 3.0))
    Quantize()(model)
    readers = {node.op_type: node.inputs for node in model.graph}
    assert readers["MatMul"][0].producer().op_type == "DequantizeLinear"
    assert readers["Add"][1].name == "a"
    assert readers["LayerNormalization"][0].name == "a"


def test_consumers_of_one_tensor_share_one_pair():
    text = "g (float[n, 32] x) => (float[n, 32] p, float[n, 32] q) { a = Relu(x)  p = MatMul(a, w)  q = MatMul(a, v) }"
    model = calibrated(model_from(text, w=normal(32, 32), v=normal(32, 32)), a=(0.0, 3.0))
    Quantize()(model)
    assert ops(model).count("QuantizeLinear") == 1


def test_a_weight_shared_by_two_products_is_stored_once_and_survives_a_float_reader():
    text = "g (float[n, 32] x) => (float[n, 32] q, float[32, 32] f) { p = MatMul(x, w)  q = MatMul(p, w)  f = Relu(w) }"
    w = normal(32, 32)
    model = calibrated(model_from(text, w=w), x=(-1.0, 1.0), p=(-9.0, 9.0))
    Quantize()(model)
    assert (
        sum(
            value.const_value.dtype == ir.DataType.INT8 and value.const_value.size > 32
            for value in model.graph.initializers.values()
        )
        == 1
    )
    np.testing.assert_array_equal(run(model, x=normal(2, 32))[1], np.maximum(w, 0))


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_has_its_channels_where_trans_b_says(trans_b):
    w = normal(24, 32) if trans_b else normal(32, 24)
    text = f"g (float[n, 32] x) => (float[n, 24] y) {{ y = Gemm <transB = {trans_b}> (x, w, b) }}"
    b = normal(24)
    model = calibrated(model_from(text, w=w, b=b), x=(-2.0, 3.0))
    Quantize()(model)
    x = normal(20, 32)
    expected = by_hand(x, w.T if trans_b else w, Range(-2.0, 3.0), "int8") + b
    np.testing.assert_allclose(run(model, x=x)[0], expected, atol=1e-3)
    assert all(node.inputs[2].name == "b" for node in model.graph if node.op_type == "Gemm")


def test_a_convolution_is_quantized_per_output_channel():
    w = normal(20, 16, 3, 3) * np.logspace(-2, 1, 20).astype(np.float32)[:, None, None, None]
    text = "g (float[n, 16, 8, 8] x) => (float[n, 20, 6, 6] y) { y = Conv(x, w) }"
    model = calibrated(model_from(text, w=w), x=(-3.0, 3.0))
    Quantize()(model)
    x = normal(2, 16, 8, 8).clip(-3, 3)
    exact = run(model_from(text, w=w), x=x)[0]
    noise = np.square(run(model, x=x)[0] - exact).mean(axis=(0, 2, 3)) / np.square(exact).mean(axis=(0, 2, 3))
    assert noise.max() < 1e-3  # with one scale for all channels the small ones would be lost


REFUSED = {
    "attention product": (
        "g (float[n, 32] x, float[32, 32] k) => (float[n, 32] y) { y = MatMul(x, k) }",
        {},
        "attention",
    ),
    "small K": ("g (float[n, 8] x) => (float[n, 32] y) { y = MatMul(x, w) }", {"w": normal(8, 32)}, "below 16"),
    "small N": ("g (float[n, 32] x) => (float[n, 3] y) { y = MatMul(x, w) }", {"w": normal(32, 3)}, "below 16"),
    "weight left": (
        "g (float[32, n] x) => (float[32, n] y) { y = MatMul(w, x) }",
        {"w": normal(32, 32)},
        "on the left",
    ),
    "batched": (
        "g (float[2, n, 32] x) => (float[2, n, 32] y) { y = MatMul(x, w) }",
        {"w": normal(2, 32, 32)},
        "matrix",
    ),
    "vector": ("g (float[1, 32] x) => (float[1, 32] y) { y = MatMul(x, w) }", {"w": normal(32, 32)}, "matrix-vector"),
    "first conv": (
        "g (float[n, 3, 8, 8] x) => (float[n, 16, 6, 6] y) { y = Conv(x, w) }",
        {"w": normal(16, 3, 3, 3)},
        "channels",
    ),
    "depthwise": (
        "g (float[n, 32, 8, 8] x) => (float[n, 32, 6, 6] y) { y = Conv <group = 32> (x, w) }",
        {"w": normal(32, 1, 3, 3)},
        "depthwise",
    ),
    "transA": (
        "g (float[32, n] x) => (float[n, 32] y) { y = Gemm <transA = 1> (x, w) }",
        {"w": normal(32, 32)},
        "transposed",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_does_not_pay_stays_in_float_with_its_reason(case):
    text, weights, reason = REFUSED[case]
    model = model_from(text, **weights)
    before = ops(model)
    result = Quantize()(model)
    assert not result.modified
    assert ops(model) == before
    assert any(reason in decision.reason for decision in result.decisions)


def test_a_product_in_a_branch_is_refused():
    text = """g (bool c, float[n, 32] x) => (float[n, 32] y) {
        y = If (c) <then_branch = t () => (float[n, 32] a) { a = MatMul(x, w) },
                    else_branch = e () => (float[n, 32] b) { b = Relu(x) }> }"""
    result = Quantize()(model_from(text, w=normal(32, 32)))
    assert [decision.reason for decision in result.decisions] == ["inside a control-flow branch"]


@pytest.mark.parametrize("step", [Quantize(keep=("matmul",)), Half(keep=("matmul",))])
def test_a_name_to_keep_that_no_node_has_is_a_usage_error_with_the_nearest(step):
    model = mlp()
    model.graph[0].name = "matmul_0"
    with pytest.raises(UsageError, match="did you mean 'matmul_0'"):
        step(model)


def attention(heads=32):
    text = f"""g (float[n, s, {heads}] q, float[n, {heads}, s] k) => (float[n, s, s] y) {{ y = MatMul(q, k) }}"""
    return calibrated(model_from(text), q=(-3.0, 3.0), k=(-4.0, 4.0))


def test_attention_products_are_quantized_on_both_sides_when_asked_for():
    model = attention()
    assert not Quantize()(model).modified
    assert Quantize(attention=True)(model).modified
    q, k = normal(1, 5, 32).clip(-3, 3), normal(1, 32, 5).clip(-4, 4)
    expected = integers_for(Range(-3.0, 3.0), "int8").apply(q) @ integers_for(Range(-4.0, 4.0), "int8").apply(k)
    np.testing.assert_allclose(run(model, q=q, k=k)[0], expected, atol=1e-4)


@pytest.mark.parametrize("heads", [8, 1024])
def test_attention_products_of_sizes_without_int8_kernels_stay_in_float(heads):
    assert not Quantize(attention=True)(attention(heads)).modified


def test_a_node_is_kept_by_name_by_sensitivity_and_for_want_of_samples():
    model = mlp()
    first, _, second = model.graph
    first.name, second.name = "first", "second"
    second.meta[SQNR_KEY] = 10.0
    reasons = {d.node: d.reason for d in Quantize(min_sqnr=20, keep=(first.name,))(model).decisions}
    assert reasons == {first.name: "kept in float by name", second.name: "output SQNR below 20 dB"}
    model = mlp()
    model.graph[2].name = "second"
    del model.graph[2].inputs[0].meta[RANGE_KEY]
    assert "not calibrated" in {d.node: d.reason for d in Quantize()(model).decisions}["second"]


def test_a_model_that_was_never_calibrated_is_a_usage_error():
    text = "g (float[n, 32] x) => (float[n, 24] y) { y = MatMul(x, w) }"
    with pytest.raises(UsageError, match="no tensor has a calibrated range"):
        Quantize()(model_from(text, w=normal(32, 24)))
    text = "g (float[n, 32] x) => (float[n, n] z) { y = MatMul(x, w)  t = Transpose(y)  z = MatMul(y, t) }"
    with pytest.raises(UsageError, match="no tensor has a calibrated range"):
        Quantize()(model_from(text, w=normal(32, 24)))


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_an_embedding_table_becomes_integer_rows_with_a_scale_each(target):
    table = normal(2048, 64) * np.logspace(-2, 1, 2048).astype(np.float32)[:, None]
    text = "g (int64[n] ids) => (float[n, 64] y) { y = Gather(table, ids) }"
    model = model_from(text, table=table)
    assert Quantize(target=target)(model).modified
    ids = np.arange(0, 2048, 7)
    (found,) = run(model, ids=ids)
    step = np.abs(table[ids]).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(found - table[ids]) <= 0.501 * step * 1.001 + 2.0**-15)
    held = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    assert held < table.nbytes / 3.5


def test_a_small_table_is_left_alone():
    text = "g (int64[n] ids) => (float[n, 64] y) { y = Gather(table, ids) }"
    assert not Quantize()(model_from(text, table=normal(100, 64))).modified


@pytest.mark.parametrize(
    ("target", "quantized"), [("tensorrt", [False, True]), ("ort-cpu", [True, True]), ("tensorrt-rtx", [False, False])]
)
def test_each_target_says_which_inputs_of_a_residual_add_are_quantized(target, quantized):
    text = """g (float[n, 16, 8, 8] x) => (float[n, 16, 8, 8] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w)  r = Relu(a)  b = Conv <pads = [1, 1, 1, 1]> (r, v)
        s = Add(b, x)  y = Relu(s) }"""
    weights = {"w": normal(16, 16, 3, 3), "v": normal(16, 16, 3, 3)}
    model = calibrated(model_from(text, **weights), x=(-3.0, 3.0), r=(0.0, 9.0), b=(-30.0, 30.0))
    Quantize(target=target)(model)
    (add,) = (node for node in model.graph if node.op_type == "Add")
    makers = [value.producer() for value in add.inputs]
    assert [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers] == quantized


def residual(*float_nodes, shortcut="s = Conv(x, u)"):
    """A block of two convolutions and a shortcut; which inputs of the Add are quantized."""
    text = f"""g (float[n, 16, 8, 8] x) => (float[n, 16, 8, 8] y) {{
        a = Conv <pads = [1, 1, 1, 1]> (x, w)  r = Relu(a)  b = Conv <pads = [1, 1, 1, 1]> (r, v)
        {shortcut}  y = Add(b, s) }}"""
    weights = {"w": normal(16, 16, 3, 3), "v": normal(16, 16, 3, 3), "u": normal(16, 16, 1, 1)}
    model = calibrated(model_from(text, **weights), x=(-3.0, 3.0), r=(0.0, 9.0), b=(-30.0, 30.0), s=(-9.0, 9.0))
    for node in model.graph:
        node.name = node.outputs[0].name
    Quantize(target="tensorrt", keep=float_nodes)(model)
    (add,) = (node for node in model.graph if node.op_type == "Add")
    return [value.producer().op_type == "DequantizeLinear" for value in add.inputs]


def test_the_skip_is_quantized_only_where_the_convolution_to_fuse_with_was():
    slices = "s = Abs(x)"
    assert residual() == [False, True]
    assert residual("s") == [False, True]  # the float shortcut is still the skip of a quantized convolution
    assert residual("b") == [True, False]  # now the shortcut is what the Add fuses with
    assert residual("b", "s") == [False, False]
    assert residual(shortcut=slices) == [False, True]
    assert residual("b", shortcut=slices) == [False, False]
    assert residual("y") == [False, False]


def test_calibration_measures_what_any_choice_of_convolutions_needs():
    text = "g (float[n, 16, 8, 8] x) => (float[n, 16, 8, 8] y) { b = Conv(x, w)  s = Conv(x, v)  y = Add(b, s) }"
    found = plan(model_from(text, w=normal(16, 16, 1, 1), v=normal(16, 16, 1, 1)), find_target("tensorrt"))
    assert {value.name for site in found.sites for value in site.values} == {"x", "b", "s"}


def test_a_residual_add_of_a_transformer_is_left_alone():
    text = "g (float[n, 32] x) => (float[n, 32] y) { m = MatMul(x, w)  y = Add(m, x) }"
    found = plan(model_from(text, w=normal(32, 32)), find_target("tensorrt"))
    assert [site.node.op_type for site in found.sites] == ["MatMul"]
