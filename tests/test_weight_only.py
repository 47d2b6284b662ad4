import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

import qexport
from qexport.errors import UsageError
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.exporter.options import BuildOptions
from qexport.passes.half import Half
from qexport.passes.numbers.groups import CODES_KEY, Codes, Grid, quantize_groups
from qexport.passes.weight_only import WeightOnly
from qexport.passes.writing.stored import kernel_block, pack_nbits

RNG = np.random.default_rng(0)
PRODUCT = "g (float[n, {k}] x) => (float[n, 48] y) {{ y = MatMul(x, w) }}"
MLP = "g (float[n, 128] x) => (float[n, 48] y) { h = MatMul(x, w)  r = Relu(h)  y = Gemm <transB = 1> (r, v, b) }"


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model_from(text, opset=21, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        node.name = node.name or f"{node.op_type.lower()}_{node.outputs[0].name}"
    return model


def product(k=128):
    w = normal(k, 48)
    return model_from(PRODUCT.format(k=k), w=w), w


def mlp():
    weights = {"w": normal(128, 64), "v": normal(48, 64), "b": normal(48)}
    return model_from(MLP, **weights), weights


def run(model, **feeds):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # otherwise onnxruntime puts MatMulNBits with 8-bit activations where it sees blocks
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def ops(model):
    return [node.op_type for node in model.graph]


def stored(model):
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def by_definition(w, grid, *, half=False):
    return quantize_groups(w, grid, half=half).dequantize()


GRIDS = [(bits, group, symmetric) for bits in (8, 4, 3) for group in (0, 32, 128) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
@pytest.mark.parametrize("k", [128, 384])
def test_the_kernel_of_onnxruntime_multiplies_with_the_weights_that_the_codes_stand_for(bits, group, symmetric, k):
    model, w = product(k)
    step = WeightOnly(target="ort-cpu", bits=bits, group=group, symmetric=symmetric, accuracy_level=0)
    assert step(model).modified
    assert ops(model) == ["MatMulNBits"]
    x = normal(9, k)
    np.testing.assert_allclose(run(model, x=x), x @ by_definition(w, Grid(bits, group, symmetric)), atol=2e-4)


@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_dequantize_linear_reads_the_weights_that_the_codes_stand_for(bits, group, symmetric):
    model, weights = mlp()
    group = min(group, 64)
    step = WeightOnly(target="ort-cuda", bits=bits, group=group, symmetric=symmetric, format="dequantize")
    assert step(model).modified
    assert sorted(ops(model)) == ["DequantizeLinear", "DequantizeLinear", "Gemm", "MatMul", "Relu"]
    grid, x = Grid(bits, group, symmetric), normal(9, 128)
    w, v = by_definition(weights["w"], grid, half=True), by_definition(weights["v"].T, grid, half=True)
    np.testing.assert_allclose(run(model, x=x), np.maximum(x @ w, 0) @ v + weights["b"], atol=1e-3)


def test_the_reference_implementation_reads_blocks_and_channels_alike():
    for group in (0, 32):
        model, w = product()
        WeightOnly(bits=8, group=group)(model)
        x = normal(5, 128)
        (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
        np.testing.assert_allclose(found, x @ by_definition(w, Grid(8, group), half=True), atol=1e-4)


@pytest.mark.parametrize("k", [100, 131, 1000])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_a_channel_needs_no_size_that_blocks_divide(k, symmetric):
    model, w = product(k)
    WeightOnly(target="ort-cpu", group=0, symmetric=symmetric, accuracy_level=0)(model)
    x = normal(4, k)
    np.testing.assert_allclose(run(model, x=x), x @ by_definition(w, Grid(4, 0, symmetric)), atol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_larger_than_the_kernels_blocks_repeat_their_scale_and_zero_point(symmetric):
    w = normal(2048, 48) + np.linspace(-2, 2, 2048, dtype=np.float32)[:, None]
    model = model_from(PRODUCT.format(k=2048), w=w)
    WeightOnly(target="ort-cpu", group=1024, symmetric=symmetric, accuracy_level=0)(model)
    (node,) = model.graph
    assert node.attributes.get_int("block_size") == 256
    assert node.inputs[2].const_value.size == 48 * 8
    x = normal(4, 2048)
    np.testing.assert_allclose(run(model, x=x), x @ by_definition(w, Grid(4, 1024, symmetric)), atol=5e-3)


@pytest.mark.parametrize(("k", "block"), [(384, 128), (96, 32), (100, 0)])
def test_engines_get_blocks_for_four_bits_with_one_scale_a_channel(k, block):
    model, w = product(k)
    WeightOnly(group=0)(model)
    node = model.graph[0]
    assert node.attributes.get_int("block_size", 0) == block
    x = normal(4, k)
    np.testing.assert_allclose(run(model, x=x), x @ by_definition(w, Grid(4), half=True), atol=1e-3)


def test_blocks_divide_the_group_and_pad_the_least():
    found = {(group, k): kernel_block(Grid(4, group), k) for group, k in [(0, 384), (0, 100), (48, 96), (1024, 2048)]}
    assert found == {(0, 384): 128, (0, 100): 16, (48, 96): 16, (1024, 2048): 256}
    assert kernel_block(Grid(4, 24), 96) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_can_be_unpacked_again_byte_by_byte(bits):
    k, n, block = 80, 5, 32
    codes = quantize_groups(normal(k, n), Grid(bits, 0, symmetric=False))
    packed = pack_nbits(codes, block)
    for column in range(n):
        for row in range(k):
            blob = packed["codes"][column, row // block]
            at = row % block
            code = blob[at] if bits == 8 else blob[at // 2] >> (4 * (at % 2)) & 15
            assert int(code) - 2 ** (bits - 1) == codes.values[row, column]
    assert packed["codes"].shape == (n, 3, block * bits // 8)
    zeros = packed["zero_point"].reshape(n, -1)
    assert zeros.shape == (n, 3 if bits == 8 else 2)
    first = zeros[:, 0] if bits == 8 else zeros[:, 0] & 15
    np.testing.assert_array_equal(first.astype(int) - 2 ** (bits - 1), codes.zero[0])


def test_eight_bit_activations_cost_little():
    errors = []
    for level in (0, 4):
        model, w = product(384)
        WeightOnly(target="ort-cpu", accuracy_level=level)(model)
        x = np.random.default_rng(1).standard_normal((64, 384)).astype(np.float32)
        exact = x @ by_definition(w, Grid(4, 128))
        errors.append(np.linalg.norm(run(model, x=x) - exact) / np.linalg.norm(exact))
    assert errors[0] < 1e-5 < errors[1] < 0.02


def test_the_bias_and_the_name_of_a_gemm_survive_the_kernel():
    model, weights = mlp()
    WeightOnly(target="ort-cpu", group=32, accuracy_level=0)(model)
    assert ops(model) == ["MatMulNBits", "Relu", "MatMulNBits", "Add"]
    assert model.graph[0].name == "matmul_h"
    assert next(iter(model.graph.outputs)).name == "y"
    x, grid = normal(6, 128), Grid(4, 32)
    inner = np.maximum(x @ by_definition(weights["w"], grid), 0)
    expected = inner @ by_definition(weights["v"].T, grid) + weights["b"]
    np.testing.assert_allclose(run(model, x=x), expected, atol=2e-3)


BYTES = {(8, 0): 1 + 4 / 1024, (4, 128): 0.5 + 4 / 128, (4, 32): 0.5 + 4 / 32, (3, 32): 0.5 + 4 / 32}


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
@pytest.mark.parametrize(("bits", "group"), sorted(BYTES))
def test_the_file_holds_what_the_arithmetic_says_and_no_float_copy(target, bits, group):
    model = model_from("g (float[n, 1024] x) => (float[n, 64] y) { y = MatMul(x, w) }", w=normal(1024, 64))
    WeightOnly(target=target, bits=bits, group=group)(model)
    assert stored(model) / (1024 * 64) == pytest.approx(BYTES[bits, group], rel=0.015)
    assert len(ir.to_proto(model).SerializeToString()) < stored(model) + 1000


def test_a_second_run_changes_nothing():
    for target in ("tensorrt-rtx", "ort-cpu"):
        model, _ = mlp()
        step = WeightOnly(target=target, group=32)
        assert step(model).modified
        before = ir.to_proto(model).SerializeToString()
        assert not step(model).modified
        assert ir.to_proto(model).SerializeToString() == before


def test_a_shared_weight_is_stored_once():
    text = "g (float[n, 64] x) => (float[n, 64] z) { y = MatMul(x, w)  z = MatMul(y, w) }"
    for target in ("tensorrt-rtx", "ort-cpu"):
        w = normal(64, 64)
        model = model_from(text, w=w)
        WeightOnly(target=target, group=32, accuracy_level=0)(model)
        assert stored(model) == 64 * 64 * (0.5 + 4 / 32)
        x, codes = normal(3, 64), by_definition(w, Grid(4, 32), half=target != "ort-cpu")
        np.testing.assert_allclose(run(model, x=x), x @ codes @ codes, rtol=1e-3, atol=1e-2)


REFUSED = {
    "attention": ("g (float[n, 64] x, float[64, 64] k) => (float[n, 64] y) { y = MatMul(x, k) }", "both inputs"),
    "on the left": ("g (float[64, n] x) => (float[64, n] y) { y = MatMul(w, x) }", "on the left"),
    "batched": ("g (float[2, n, 64] x) => (float[2, n, 64] y) { y = MatMul(x, w3) }", "not a matrix"),
    "small": ("g (float[n, 64] x) => (float[n, 8] y) { y = MatMul(x, w8) }", "K or N below 32"),
    "transA": ("g (float[64, n] x) => (float[n, 64] y) { y = Gemm <transA = 1> (x, w) }", "transposed"),
    "vector": ("g (float[64] x) => (float[64] y) { y = MatMul(x, w) }", "vector"),
    "tied": (
        "g (float[n, 64] x, int64[m] i) => (float[n, 64] y, float[m, 64] z) { y = MatMul(x, w)  z = Gather(w, i) }",
        "something else reads",
    ),
    "branch": (
        """g (bool c, float[n, 64] x) => (float[n, 64] y) {
            y = If (c) <then_branch = t () => (float[n, 64] a) { a = MatMul(x, w) },
                        else_branch = e () => (float[n, 64] b) { b = Relu(x) }> }""",
        "control-flow",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_no_product_with_a_weight_of_its_own_stays_as_it_is_with_its_reason(case):
    text, reason = REFUSED[case]
    weights = {"w": normal(64, 64), "w3": normal(2, 64, 64), "w8": normal(64, 8)}
    model = model_from(
        text, **{name: array for name, array in weights.items() if f"{name})" in text or f"{name}," in text}
    )
    before = ir.to_proto(model).SerializeToString()
    result = WeightOnly(group=32)(model)
    assert not result.modified
    assert [reason in decision.reason for decision in result.decisions] == [True]
    assert ir.to_proto(model).SerializeToString() == before


def test_a_scaled_gemm_has_no_kernel_of_its_own_but_reads_blocks():
    text = "g (float[n, 64] x) => (float[n, 48] y) { y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) }"
    w, b, x = normal(64, 48), normal(48), normal(3, 64)
    model = model_from(text, w=w, b=b)
    assert [d.reason for d in WeightOnly(target="ort-cpu", group=32)(model).decisions] == [
        "a Gemm whose alpha or beta is not 1"
    ]
    assert WeightOnly(target="ort-cpu", group=32, format="dequantize")(model).modified
    np.testing.assert_allclose(run(model, x=x), 0.5 * x @ by_definition(w, Grid(4, 32)) + 2 * b, rtol=1e-3, atol=1e-2)


def test_nodes_stay_in_float_by_name_and_the_head_on_request():
    for options in ({"keep": ("gemm_y",)}, {"head": False}):
        model, _ = mlp()
        reasons = {d.node: d.action for d in WeightOnly(group=32, **options)(model).decisions}
        assert reasons == {"matmul_h": "quantized", "gemm_y": "skipped"}
    model = model_from(
        "g (float[n, 64] x) => (float[n, 48] y) { m = MatMul(x, w)  y = Add(m, b) }", w=normal(64, 48), b=normal(48)
    )
    assert not WeightOnly(group=32, head=False)(model).modified


def test_codes_that_an_earlier_pass_chose_are_stored_as_they_are():
    for target in ("tensorrt-rtx", "ort-cpu"):
        model, _ = mlp()
        values = RNG.integers(-4, 4, (64, 48)).astype(np.int8)
        chosen = Codes(values, np.full((2, 48), 0.125, np.float32), None, Grid(3, 32))
        model.graph.initializers["v"].meta[CODES_KEY] = chosen  # the Gemm reads it transposed
        w = model.graph.initializers["w"].const_value.numpy()
        done = WeightOnly(target=target, bits=8, group=0, accuracy_level=0)(model).decisions
        assert [d.reason for d in done] == [
            "weight in 8 bits, one scale an output channel",
            "weight in 3 bits, groups of 32",
        ]
        x = normal(5, 128)
        h = np.maximum(x @ by_definition(w, Grid(8), half=target != "ort-cpu"), 0)
        bias = model.graph.initializers["b"].const_value.numpy()
        np.testing.assert_allclose(run(model, x=x), h @ (values * 0.125) + bias, rtol=1e-3, atol=1e-2)


WRONG = {
    "group": ({"group": 96}, "group 96 does not divide the 128 inputs of node 'matmul_h'"),
    "engine and zero points": ({"symmetric": False, "group": 32}, "node 'matmul_h': target tensorrt-rtx takes no zero"),
    "no int4": ({"target": "tensorrt", "group": 32}, "node 'matmul_h': target tensorrt does not read int4"),
    "no blocks": ({"target": "tensorrt", "group": 32, "bits": 8}, "node 'matmul_h': groups of weights need opset 21"),
    "no kernel": ({"format": "nbits", "group": 32}, "target tensorrt-rtx does not read nbits"),
    "no such node": ({"keep": ("matmul_g",)}, "did you mean 'matmul_h'"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_what_cannot_be_read_is_a_usage_error_that_names_the_node_before_anything_is_changed(case):
    options, words = WRONG[case]
    model, _ = mlp()
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(UsageError) as caught:
        WeightOnly(**options)(model)
    assert words in str(caught.value)
    assert caught.value.hint
    assert ir.to_proto(model).SerializeToString() == before


def test_a_group_that_no_kernel_block_divides_is_a_usage_error():
    model, _ = product(96)
    with pytest.raises(UsageError, match="no block that divides a group of 24"):
        WeightOnly(target="ort-cpu", group=24)(model)
    assert WeightOnly(target="ort-cpu", group=24, format="dequantize")(model).modified


@pytest.mark.parametrize("group", [-1, 1, 15])
def test_a_group_smaller_than_any_kernel_takes_is_refused_at_once(group):
    with pytest.raises(ValueError, match="at least 16"):
        WeightOnly(group=group)


def test_an_old_model_is_left_alone_with_the_opset_it_needs():
    for options, need in (({"group": 32}, 21), ({"bits": 8, "group": 0}, 13)):
        model = model_from(PRODUCT.format(k=64), opset=need - 1, w=normal(64, 48))
        result = WeightOnly(**options)(model)
        assert not result.modified
        assert [d.reason for d in result.decisions] == [f"needs opset {need}, model has {need - 1}"]


def test_weights_that_float16_scales_cannot_hold_stay_in_float():
    model = model_from(PRODUCT.format(k=64), w=normal(64, 48) * np.float32(1e-6))
    assert [d.reason for d in WeightOnly(group=32)(model).decisions] == ["weights too small for float16 scales"]
    assert WeightOnly(target="ort-cpu", group=32)(model).modified


def test_half_precision_covers_the_scales_too():
    model, weights = mlp()
    WeightOnly(group=32)(model)
    Half()(model)
    kinds = {node.op_type: [v.dtype for v in node.inputs] for node in model.graph if node.op_type == "DequantizeLinear"}
    assert kinds == {"DequantizeLinear": [ir.DataType.INT4, ir.DataType.FLOAT16]}
    x = normal(6, 128)
    w, v = (by_definition(m, Grid(4, 32), half=True) for m in (weights["w"], weights["v"].T))
    expected = np.maximum(x @ w, 0) @ v + weights["b"]
    np.testing.assert_allclose(run(model, x=x), expected, atol=0.01 * np.abs(expected).max())


# ------------------------------------------------------------ engines and recipes, for real


@pytest.mark.rtx
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 0), (4, 1024), (3, 128), (8, 0)])
def test_engines_are_built_with_weights_as_small_as_promised(bits, group):
    module = pytest.importorskip("tensorrt_rtx")
    k, n = 2048, 256
    model = model_from(
        f"g (float16[n, {k}] x) => (float16[n, {n}] y) {{ y = MatMul(x, w) }}", w=normal(k, n).astype("f2")
    )
    assert WeightOnly(bits=bits, group=group)(model).modified
    options = EngineOptions(profiles=({"x": ([1, k], [8, k], [32, k])},))
    plan = build_engine(ir.to_proto(model).SerializeToString(), module, options).plan
    codes, scales = k * n * (1.0 if bits == 8 else 0.5), 2 * n * (k // group if group else 1)
    assert codes + scales < len(plan) < codes + scales + 200_000  # float16 weights alone take 1,048,576


@pytest.fixture
def small(tmp_path):
    model, _ = mlp()
    (tmp_path / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    np.savez(tmp_path / "eval.npz", x=normal(20, 128))
    return tmp_path


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
@pytest.mark.parametrize(
    ("recipe", "cosine"), [("int8-weights", 0.9999), ("int4-weights", 0.985), ("int3-weights", 0.93)]
)
def test_a_recipe_needs_no_data_and_its_result_is_close(small, recipe, cosine, target):
    group = ["weight-only.group=32"] if recipe != "int8-weights" else []
    options = BuildOptions(output=small / "out", set=("export.engine=false", *group))
    result = qexport.build(small / "model.onnx", recipe=recipe, eval=small / "eval.npz", target=target, options=options)
    assert result.quality is not None
    assert result.quality.outputs["y"].cosine_mean > cosine
    assert sum(decision.action == "quantized" for step in result.steps for decision in step.decisions) == 2
    bare = BuildOptions(output=small / "bare", set=("export.engine=false", *group))
    assert qexport.build(small / "model.onnx", recipe=recipe, target=target, options=bare).quality is None


def test_a_recipe_whose_group_does_not_fit_publishes_nothing(small):
    options = BuildOptions(output=small / "out", set=("weight-only.group=48",))
    with pytest.raises(UsageError, match="does not divide the 128 inputs"):
        qexport.build(small / "model.onnx", recipe="int4-weights", options=options)
    assert not (small / "out").exists()
