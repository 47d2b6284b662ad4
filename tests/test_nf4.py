from statistics import NormalDist

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qexport
from qexport.errors import UsageError
from qexport.exporter.options import BuildOptions
from qexport.passes.nf4 import LEVELS, NF4, quantize_magnitudes, quantize_nf4
from qexport.passes.numbers.groups import Grid, quantize_groups
from qexport.passes.target import TARGETS

RNG = np.random.default_rng(0)
PRODUCT = "g (float[n, {k}] x) => (float[n, {n}] y) {{ y = MatMul(x, w) }}"
# the 4-bit floats of the same authors' library: sign, 2 bits of exponent, 1 of mantissa
FP4 = np.array([0, 0.0052083333, 0.1666667, 0.25, 0.3333333, 0.5, 0.6666667, 1.0])


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model_from(text, opset=21, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model, **feeds):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def nearest(w, levels, block):
    """Blockwise absmax, the nearest level by exhaustion, in float64; magnitudes are not quantized."""
    flat = w.T.reshape(-1).astype(np.float64)
    found = np.empty_like(flat)
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        largest = np.abs(part).max()
        choice = np.abs(part[:, None] / largest - levels[None]).argmin(axis=1)
        found[start : start + block] = levels[choice] * largest
    return found.reshape(w.T.shape).T


def noise(w, found):
    return float(np.square(found - w).mean() / np.square(w).mean())


def test_the_levels_are_the_quantiles_that_the_paper_defines():
    # equation 4: quantiles of N(0, 1) at evenly spaced probabilities, 8 on the positive side, 7 on the other, and zero
    quantile, outermost = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    levels = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(LEVELS, levels / levels.max(), atol=1e-6)


def test_a_weight_takes_4_127_bits():
    expected = 4 + 8 / 64 + 32 / (64 * 256)
    assert round(expected, 3) == 4.127
    assert quantize_nf4(normal(2048, 512)).bits == pytest.approx(expected, abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 90), st.integers(1, 9), st.sampled_from([16, 64]))
def test_numbers_are_the_nearest_levels_but_for_the_rounding_of_the_magnitudes(seed, k, n, block):
    w = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)
    found = quantize_nf4(w, block)
    assert found.levels.max() <= 15
    spread = np.repeat(found.magnitudes.dequantize(), block)[: w.size].reshape(n, k).T
    choices = LEVELS[:, None, None] * spread
    best = np.abs(choices - w).min(axis=0)
    np.testing.assert_allclose(np.abs(found.dequantize() - w), best, atol=1e-6)


def test_double_quantization_costs_next_to_nothing():
    w = normal(1024, 256)
    single, double = noise(w, nearest(w, LEVELS, 64)), noise(w, quantize_nf4(w).dequantize())
    assert double < 1.005 * single


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 1000), st.floats(1e-6, 1e6))
def test_magnitudes_are_within_half_a_step(seed, count, size):
    magnitudes = np.random.default_rng(seed).lognormal(0, 0.3, count).astype(np.float32) * np.float32(size)
    held = quantize_magnitudes(magnitudes)
    assert held.values.dtype == np.int8
    steps = np.repeat(held.scale, 256)[:count]
    assert np.all(np.abs(held.dequantize() - magnitudes) <= steps / 2 + 1e-6 * magnitudes.max())


def test_magnitudes_are_centred_before_they_are_rounded():
    magnitudes = RNG.uniform(2.0, 2.5, 512).astype(np.float32)
    assert quantize_magnitudes(magnitudes).scale.max() < 0.26 / 127


def test_normal_weights_are_closer_than_in_int4_and_fp4_with_the_same_blocks():
    w = normal(1024, 256)
    found = noise(w, quantize_nf4(w).dequantize())
    integers = noise(w, quantize_groups(w, Grid(4, 64)).dequantize())
    absmax = noise(w, nearest(w, np.arange(-7, 8) / 7, 64))
    floats = noise(w, nearest(w, np.concatenate([-FP4, FP4]), 64))
    assert found < 0.85 * min(integers, absmax)
    assert found < 0.65 * floats


def test_evenly_spread_weights_are_better_off_in_int4():
    w = RNG.uniform(-1, 1, (1024, 64)).astype(np.float32)
    assert noise(w, quantize_nf4(w).dequantize()) > noise(w, quantize_groups(w, Grid(4, 64)).dequantize())


def test_blocks_of_zeros_stay_zero():
    w = normal(64, 40)
    w[:, 3] = 0
    found = quantize_nf4(w).dequantize()
    assert not found[:, 3].any()
    assert not quantize_nf4(np.zeros((64, 40), np.float32)).dequantize().any()


@pytest.mark.parametrize(("k", "n"), [(256, 96), (33, 35), (100, 50)])
@pytest.mark.parametrize("block", [16, 64, 256])
def test_the_kernel_multiplies_with_what_the_levels_stand_for(k, n, block):
    w, x = normal(k, n), normal(7, k)
    model = model_from(PRODUCT.format(k=k, n=n), w=w)
    assert NF4(block=block)(model).modified
    assert model.graph[-1].op_type == "MatMulBnb4"
    assert next(iter(model.graph.outputs)).name == "y"
    np.testing.assert_allclose(run(model, x=x), x @ quantize_nf4(w, block).dequantize(), atol=1e-4)


def test_the_graph_reads_back_as_many_magnitudes_as_there_are_blocks():
    for k, n in ((100, 50), (128, 128)):
        w = normal(k, n)
        model = model_from(PRODUCT.format(k=k, n=n), w=w)
        NF4()(model)
        model.graph.outputs[0] = model.graph[-1].inputs[2]
        np.testing.assert_array_equal(run(model, x=normal(1, k)), quantize_nf4(w).magnitudes.dequantize())


def test_a_gemm_keeps_its_bias_and_a_shared_weight_is_stored_once():
    text = """g (float[n, 64] x) => (float[n, 64] y) {
        h = Gemm <transB = 1> (x, w, b)  r = Relu(h)  y = Gemm <transB = 1> (r, w) }"""
    w, b, x = normal(64, 64), normal(64), normal(5, 64)
    model = model_from(text, w=w, b=b)
    result = NF4()(model)
    assert [d.reason for d in result.decisions] == ["weight in NF4, blocks of 64"] * 2
    assert [node.op_type for node in model.graph].count("DequantizeLinear") == 1
    held = quantize_nf4(w.T).dequantize()
    np.testing.assert_allclose(run(model, x=x), np.maximum(x @ held + b, 0) @ held, rtol=1e-4, atol=1e-2)
    before = ir.to_proto(model).SerializeToString()
    assert not NF4()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_the_file_holds_a_little_more_than_4_bits_a_weight():
    model = model_from(PRODUCT.format(k=2048, n=512), w=normal(2048, 512))
    NF4()(model)
    assert 8 * len(ir.to_proto(model).SerializeToString()) / (2048 * 512) < 4.127 + 0.02


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"ort-cpu"}))
def test_targets_without_a_kernel_are_a_usage_error_that_names_the_one_that_has_it(name):
    model = model_from(PRODUCT.format(k=64, n=64), w=normal(64, 64))
    with pytest.raises(UsageError, match="does not read nf4") as caught:
        NF4(target=name)(model)
    assert caught.value.hint == "targets that read it: ort-cpu"
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_what_the_kernel_cannot_do_stays_in_float_with_its_reason():
    w = normal(64, 64)
    half = "g (float16[n, 64] x) => (float16[n, 64] y) { y = MatMul(x, w) }"
    scaled = "g (float[n, 64] x) => (float[n, 64] y) { y = Gemm <alpha = 2.0> (x, w) }"
    plain = PRODUCT.format(k=64, n=64)
    for text, opset, weight, reason in [
        (half, 21, w.astype(np.float16), "computes in float32 only"),
        (scaled, 21, w, "alpha or beta"),
        (plain, 12, w, "needs opset 13, model has 12"),
        (plain, 21, np.full_like(w, np.inf), "not finite"),
    ]:
        result = NF4()(model_from(text, opset, w=weight))
        assert not result.modified
        assert [reason in decision.reason for decision in result.decisions] == [True]


@pytest.mark.parametrize("block", [0, 48, 512])
def test_a_block_that_the_kernel_does_not_have_is_refused_at_once(block):
    with pytest.raises(ValueError, match="block must be one of"):
        NF4(block=block)


def test_the_recipe_needs_no_data_and_its_result_is_close(tmp_path):
    text = "g (float[n, 64] x) => (float[n, 48] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    model = model_from(text, w=normal(64, 96), v=normal(96, 48))
    (tmp_path / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    np.savez(tmp_path / "eval.npz", x=normal(20, 64))
    options = BuildOptions(output=tmp_path / "out")
    result = qexport.build(tmp_path / "model.onnx", recipe="nf4-weights", eval=tmp_path / "eval.npz", options=options)
    assert result.quality is not None
    assert 0.985 < result.quality.outputs["y"].cosine_mean < 0.9999
