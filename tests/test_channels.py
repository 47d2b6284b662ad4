"""A scale for each channel is folded into the constants around a value: which folds there are, and that they hold."""

import numpy as np
import pytest
from channel_models import build, give_shapes, value_named
from helpers import feeds_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.running.execute import open_model
from qexport.passes.folding.channels import Fold, find_fold
from qexport.passes.match import array

SIZES = {"k": 8, "n": 6, "h": 4, "d": 2}
RNG = np.random.default_rng(0)


def prove(model, name="x", axis=-1, scale=None, tolerance=1e-5):
    """Fold a scale, and compare all outputs and the value itself with what they were; returns the fold."""
    value = value_named(model, name)
    count = value.shape[axis]
    fold = find_fold(value, axis, count)
    assert isinstance(fold, Fold), fold
    wanted = fold.largest(np.exp2(np.random.default_rng(2).uniform(-3, 3, count)) if scale is None else scale)
    feeds = feeds_of(model)
    before = open_model(model, taps=[name]).run(feeds)
    fold.apply(wanted)
    after = open_model(model, taps=[name]).run(feeds)
    along = wanted.reshape([-1] + [1] * (value.shape.rank() - 1 - axis % value.shape.rank()))
    after[name] = after[name] * along
    assert not np.allclose(before[name], after[name] / along, rtol=0.05)  # it was divided
    for key, truth in before.items():
        gap = np.linalg.norm(truth.astype(np.float64) - after[key]) / np.linalg.norm(truth.astype(np.float64))
        assert gap < tolerance, (key, gap)
    return fold


W = {"w": "8x6"}
ROOT = {"two": np.float32(2), "eps": np.float32(1e-5), "last": np.array([-1])}
RMS = "p = Pow(a, two) m = ReduceMean(p, last) e = Add(m, eps) r = Sqrt(e) "
FOLDS = {
    "layer_norm": ("x = LayerNormalization<axis=-1>(a, g, c) out = MatMul(x, w)", {"g": "8", "c": "8", **W}),
    "layer_norm_without_bias": ("x = LayerNormalization(a, g) out = MatMul(x, w)", {"g": "8", **W}),
    "layer_norm_by_positive_axis": ("x = LayerNormalization<axis=2>(a, g) out = MatMul(x, w)", {"g": "8", **W}),
    "rms_norm": ("x = RMSNormalization(a, g) out = MatMul(x, w)", {"g": "8", **W}),
    "rms_norm_in_small_operators": (RMS + "n = Div(a, r) x = Mul(g, n) out = MatMul(x, w)", {"g": "8", **ROOT, **W}),
    "rms_norm_shared_by_three": (
        "x = RMSNormalization(a, g) p = MatMul(x, w) q = MatMul(x, w) t = MatMul(x, v) s = Add(p, q) out = Add(s, t)",
        {"g": "8", "v": "8x6", **W},
    ),
    "scalar_factor": ("x = Mul(a, g) out = MatMul(x, w)", {"g": np.float32(3), **W}),
    "factors": ("x = Mul(g, a) out = MatMul(x, w)", {"g": "8", **W}),
    "wide_factors": ("x = Mul(a, g) out = MatMul(x, w)", {"g": "1x1x8", **W}),
    "shared_factors": (
        "x = Mul(a, g) y = Mul(a, g) z = Mul(y, g) o = MatMul(z, w) p = MatMul(x, w) out = Add(o, p)",
        {"g": "8", **W},
    ),
    "division": ("x = Div(a, g) out = MatMul(x, w)", {"g": "8", **W}),
    "read_by_a_factor": ("x = Mul(a, g) out = Mul(x, f)", {"g": "8", "f": np.float32(2)}),
    "read_by_a_division": ("x = Mul(a, g) out = Div(x, f)", {"g": "8", "f": "8"}),
    "bias": ("y = MatMul(a, v) x = Add(y, c) out = MatMul(x, w)", {"v": "8x8", "c": "8", **W}),
    "scalar_bias": ("y = MatMul(a, v) x = Add(c, y) out = MatMul(x, w)", {"v": "8x8", "c": np.float32(1), **W}),
    "minus": ("y = MatMul(a, v) x = Sub(y, c) out = MatMul(x, w)", {"v": "8x8", "c": "8", **W}),
    "from_a_constant_minus": ("y = MatMul(a, v) x = Sub(c, y) out = MatMul(x, w)", {"v": "8x8", "c": "8", **W}),
    "relu": ("y = MatMul(a, v) z = Add(y, c) x = Relu(z) out = MatMul(x, w)", {"v": "8x8", "c": "8", **W}),
    "leaky_relu": ("y = MatMul(a, v) x = LeakyRelu<alpha=0.3>(y) out = MatMul(x, w)", {"v": "8x8", **W}),
    "falling_relu": ("y = MatMul(a, v) x = LeakyRelu<alpha=-0.3>(y) out = MatMul(x, w)", {"v": "8x8", **W}),
    "prelu": ("y = MatMul(a, v) x = PRelu(y, c) out = MatMul(x, w)", {"v": "8x8", "c": "8", **W}),
    "neg_abs": ("y = MatMul(a, v) z = Neg(y) x = Abs(z) out = MatMul(x, w)", {"v": "8x8", **W}),
    "batched_kernels": ("y = MatMul(a, v) x = Relu(y) out = MatMul(x, w)", {"v": "2x8x8", "w": "2x8x6"}),
    "cast": ("y = MatMul(a, v) z = Cast<to=11>(y) x = Cast<to=1>(z) out = MatMul(x, w)", {"v": "8x8", **W}),
    "dropout": ("y = MatMul(a, v) x, mask = Dropout(y) out = MatMul(x, w)", {"v": "8x8", **W}),
    "sum_of_two": ("p = MatMul(a, v) q = MatMul(a, u) x = Add(p, q) out = MatMul(x, w)", {"v": "8x8", "u": "8x8", **W}),
    "embeddings": (
        "e = Gather(t, i) x = Add(e, a0) out = MatMul(x, w)",
        {"t": "9x8", "i": np.array([[1, 4, 1]]), "a0": "3x8", **W},
    ),
    "gate_as_silu": (
        "g = MatMul(a, v) u = MatMul(a, v) s = Sigmoid(g) l = Mul(g, s) x = Mul(l, u) out = MatMul(x, w)",
        {"v": "8x8", **W},
    ),
    "gate_as_swish": (
        "g = MatMul(a, v) u0 = MatMul(a, v) u = Add(u0, c) l = Swish(g) x = Mul(u, l) out = MatMul(x, w)",
        {"v": "8x8", "c": "8", **W},
    ),
    "gate_as_gelu": (
        "g = MatMul(a, v) u = MatMul(a, v) l = Gelu(g) x = Mul(l, u) out = MatMul(x, w)",
        {"v": "8x8", **W},
    ),
    "gate_that_divides": (
        "g = MatMul(a, v) u = MatMul(a, v) l = Exp(g) x = Div(u, l) out = MatMul(x, w)",
        {"v": "8x8", **W},
    ),
    "slices": (
        "y = MatMul(a, v) x = Slice(y, start, end, axis, step) z = Neg(x) out = MatMul(z, w)",
        {"v": "8x16", "start": [15], "end": [-20], "axis": [-1], "step": [-2], **W},
    ),
    "gathered_channels": (
        "y = MatMul(a, v) x = Gather<axis=2>(y, i) out = MatMul(x, w)",
        {"v": "8x9", "i": [*range(8)], **W},
    ),
    "a_channel_gathered_twice": (
        "y = MatMul(a, v) x = Gather<axis=-1>(y, i) out = MatMul(x, w)",
        {"v": "8x5", "i": [0, 0, -1, 1, 2, 2, 2, 3], **W},
    ),
    "concatenated_channels": (
        "p = MatMul(a, v) q = MatMul(a, u) r = Relu(q) x = Concat<axis=-1>(p, r) out = MatMul(x, w)",
        {"v": "8x3", "u": "8x5", **W},
    ),
    "concatenated_with_itself": (
        "p = MatMul(a, v) x = Concat<axis=2>(p, p) out = MatMul(x, w)",
        {"v": "8x4", **W},
    ),
    "uneven_pieces": (
        "p = MatMul(a, v) x, z = Split<axis=2>(p, parts) zz = Relu(z) out = MatMul(x, w)",
        {"v": "8x11", "parts": [8, 3], **W},
    ),
    "half_of_a_sum": (  # the other half is free, and one of its summands has a single channel
        "p = MatMul(a, v) q = MatMul(a, u) y = Add(p, q) z, x = Split<axis=2>(y, parts) o = MatMul(x, w) "
        "zz = Concat<axis=2>(z, z) t = MatMul(zz, w) out = Add(o, t)",
        {"v": "8x12", "u": "8x1", "parts": [4, 8], **W},
    ),
}


@pytest.mark.parametrize("case", FOLDS)
def test_folds_leave_the_function_as_it_was(case):
    body, constants = FOLDS[case]
    prove(build(body, opset=24 if "Swish" in body else 23, **constants))


HEADS = "float[b, s, 8] a"
SPLIT = {"v": "8x24", "c": "24", "w": "8x6", "qkv": [0, 0, 3, 2, 4], "flat": [0, 0, 8]}
ATTEND = "l = MatMul(q, kt) p = Softmax<axis=-1>(l) o = MatMul(p, vv) x0 = Transpose<perm=[0, 2, 1, 3]>(o) "
TIMM = """y0 = MatMul(a, v) y = Add(y0, c) r = Reshape(y, qkv) t = Transpose<perm=[2, 0, 3, 1, 4]>(r)
    q = Gather<axis=0>(t, i0) k = Gather<axis=0>(t, i1) vv = Gather<axis=0>(t, i2) """
INDICES = {"i0": 0, "i1": 1, "i2": -1}
TURN = "kt = Transpose<perm=[0, 1, 3, 2]>(k) "
VALUES = {
    "gathered_from_one_product": (TIMM + TURN + ATTEND + "x = Reshape(x0, flat) out = MatMul(x, w)", SPLIT | INDICES),
    "split_and_squeezed": (
        """y0 = MatMul(a, v) y = Add(y0, c) r = Reshape(y, qkv) t = Transpose<perm=[2, 0, 3, 1, 4]>(r)
        q0, k0, v0 = Split<axis=0, num_outputs=3>(t)
        q = Squeeze(q0, zero) k = Squeeze(k0, zero) vv = Squeeze(v0, zero)"""
        + TURN
        + ATTEND
        + "x = Reshape(x0, flat) out = MatMul(x, w)",
        SPLIT | {"zero": [0]},
    ),
    "sliced": (
        """y0 = MatMul(a, v) y = Add(y0, c) r = Reshape(y, qkv) t = Transpose<perm=[2, 0, 3, 1, 4]>(r)
        q0 = Slice(t, i0, i1, zero) k0 = Slice(t, i1, i2, zero) v0 = Slice(t, i2, i3, zero)
        q = Squeeze(q0, zero) k = Squeeze(k0, zero) vv = Squeeze(v0, zero)"""
        + TURN
        + ATTEND
        + "x = Reshape(x0, flat) out = MatMul(x, w)",
        SPLIT | {"zero": [0], "i0": [0], "i1": [1], "i2": [2], "i3": [3]},
    ),
    "divided_before_heads": (
        """y0 = MatMul(a, v) y = Add(y0, c) q0, k0, v0 = Split<axis=-1, num_outputs=3>(y)
        q1 = Reshape(q0, heads) k1 = Reshape(k0, heads) v1 = Reshape(v0, heads) q = Transpose<perm=[0, 2, 1, 3]>(q1)
        kt = Transpose<perm=[0, 2, 3, 1]>(k1) vv = Transpose<perm=[0, 2, 1, 3]>(v1)"""
        + ATTEND
        + "x = Reshape(x0, flat) out = MatMul(x, w)",
        SPLIT | {"heads": [0, 0, 2, 4]},
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_go_through_attention_to_the_products_that_make_them(case):
    body, constants = VALUES[case]
    fold = prove(build(body, **constants))
    assert (fold.ties == np.arange(8)).all()


GROUPED = """q0 = MatMul(a, wq) k0 = MatMul(a, wk) v00 = MatMul(a, wv) v0 = Add(v00, c)
    q1 = Reshape(q0, many) q = Transpose<perm=[0, 2, 1, 3]>(q1)
    k1 = Reshape(k0, few) k2 = Transpose<perm=[0, 2, 1, 3]>(k1)
    v1 = Reshape(v0, few) v2 = Transpose<perm=[0, 2, 1, 3]>(v1) """
REPEAT = """ku = Unsqueeze(k2, two) ke = Expand(ku, wide) k = Reshape(ke, joined)
    vu = Unsqueeze(v2, two) ve = Expand(vu, wide) vv = Reshape(ve, joined) """
OPERATOR = """o = Attention(q, k2, v2) x0 = Transpose<perm=[0, 2, 1, 3]>(o) x = Reshape(x0, flat) out = MatMul(x, w)"""
OUT = "x = Reshape(x0, flat) out = MatMul(x, w)"
GQA = {"wq": "8x8", "wk": "8x4", "wv": "8x4", "c": "4", "w": "8x6", "many": [0, 0, 4, 2], "few": [0, 0, 2, 2]}
GQA |= {"two": [2], "wide": [1, 1, 2, 1, 1], "joined": [0, 4, -1, 2], "flat": [0, 0, 8]}
IN_3D = "x = Attention<q_num_heads=4, kv_num_heads=2, softcap=2.0, is_causal=1>(q0, k0, v0) out = MatMul(x, w)"
TIED = [0, 1, 0, 1, 4, 5, 4, 5]


@pytest.mark.parametrize(
    ("body", "ties"),
    [
        (GROUPED + REPEAT + TURN + ATTEND + OUT, TIED),
        (GROUPED + OPERATOR, TIED),
        (GROUPED + OPERATOR.replace("v2)", "v2, mask)"), TIED),
        (GROUPED + IN_3D, TIED),
        (
            GROUPED.replace("2, 1, 3]>(v1)", "2, 1, 3]>(v1)")
            + OPERATOR.replace("Attention(q", "Attention<scale=0.3>(q"),
            TIED,
        ),
    ],
    ids=["expanded", "operator", "masked", "flat", "scaled"],
)
def test_query_heads_that_share_a_value_head_are_tied(body, ties):
    model = build(body, **GQA, mask=np.array([[True, False, False], [True, True, False], [False, True, True]]))
    assert prove(model).ties.tolist() == ties


def test_a_single_value_head_ties_all_heads_by_broadcasting():
    body = (
        GROUPED.replace("few", "one")
        + "kt = Transpose<perm=[0, 1, 3, 2]>(k2) l = MatMul(q, kt) "
        + ("p = Softmax(l) o = MatMul(p, v2) x0 = Transpose<perm=[0, 2, 1, 3]>(o) " + OUT)
    )
    model = build(body, **GQA | {"one": [0, 0, 1, 2], "wk": "8x2", "wv": "8x2", "c": "2"})
    assert prove(model).ties.tolist() == [0, 1] * 4


def test_the_attention_of_onnxruntime_is_followed_too():
    body = "q0 = MatMul(a, wq) k0 = MatMul(a, wq) v0 = MatMul(a, wq) "
    body += "x = com.microsoft.MultiHeadAttention<num_heads=4>(q0, k0, v0) out = MatMul(x, w)"
    model = build(body, wq="8x8", w="8x6")
    give_shapes(model, x=("b", "s", 8), out=("b", "s", 6))
    prove(model)


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("bias", ["8", "1x8", "3x1", "1", ""])
def test_gemm_takes_scales_in_and_undoes_them(trans_a, trans_b, bias):
    given = f"transA={trans_a}, transB={trans_b}, alpha=0.5, beta=2.0"
    body = f"x = Gemm<{given}>(a, v, c) y = LeakyRelu(x) out = Gemm<transB={trans_b}, alpha=-2.0>(y, w)"
    constants = {"v": "8x5" if trans_b else "5x8", "w": "6x8" if trans_b else "8x6", "c": bias}
    prove(build(body, "float[5, 3] a" if trans_a else "float[3, 5] a", "float[3, 6] out", **constants))


def test_gemm_undoes_scales_of_a_transposed_input():
    body = "y = Relu(a) x = Mul(y, g) out = Gemm<transA=1>(x, w)"
    prove(build(body, "float[8, 3] a", "float[3, 6] out", g="8x1", w="8x6"), axis=0)


IMAGE = "float[1, 4, 9, 9] a"
CONVS = {
    "chain": (
        "y = Conv(a, v, c) x = Relu(y) out = Conv<pads=[1, 1, 1, 1], strides=[2, 2]>(x, w)",
        "8x4x3x3",
        "6x8x3x3",
    ),
    "into_groups": ("y = Conv(a, v) x = Relu(y) out = Conv<group=2>(x, w)", "8x4x3x3", "6x4x3x3"),
    "from_groups": ("x = Conv<group=2>(a, v, c) out = Conv(x, w)", "8x2x3x3", "6x8x1x1"),
    "through_depthwise": ("y = Conv(a, v) x = Conv<group=8>(y, d, c) out = Conv(x, w)", "8x4x1x1", "6x8x1x1"),
    "transposed": ("x = ConvTranspose(a, v, c) out = ConvTranspose<strides=[2, 2]>(x, w)", "4x8x3x3", "8x3x2x2"),
    "transposed_in_groups": (
        "x = ConvTranspose<group=2>(a, v, c) out = ConvTranspose<group=4>(x, w)",
        "4x4x3x3",
        "8x2x1x1",
    ),
    "norm": ("y = Conv(a, v) x = BatchNormalization(y, g, c, mu, var) out = Conv(x, w)", "8x4x3x3", "6x8x3x3"),
    "instance_norm": ("y = Conv(a, v) x = InstanceNormalization(y, g, c) out = Conv(x, w)", "8x4x3x3", "6x8x3x3"),
    "pools": (
        "y = Conv(a, v) z = MaxPool<kernel_shape=[2, 2]>(y) x = AveragePool<kernel_shape=[2, 2], pads=[1, 1, 1, 1]>(z) "
        "t = GlobalAveragePool(x) f = Flatten(t) o = MatMul(f, m) out = Conv(x, w)",
        "8x4x3x3",
        "6x8x1x1",
    ),
    "indices_of_a_pool": (
        "y = Conv(a, v) x, i = MaxPool<kernel_shape=[2, 2]>(y) out = Conv(x, w)",
        "8x4x3x3",
        "6x8x1x1",
    ),
    "bias_and_residual": (
        "y = Conv(a, v) z = Add(y, b) t = Conv(a, v) x = Add(t, z) out = Conv(x, w)",
        "8x4x3x3",
        "6x8x1x1",
    ),
    "one_channel_added_to_many": ("y = Conv(a, v) z = Conv(a, n) x = Add(y, z) out = Conv(x, w)", "8x4x3x3", "6x8x1x1"),
    "flattened": ("x = Conv(a, v, c) z = Relu(x) f = Flatten(z) out = MatMul(f, big)", "8x4x8x8", "1"),
    "slopes": ("y = Conv(a, v) x = PRelu(y, b) out = Conv(x, w)", "8x4x3x3", "6x8x1x1"),
}


@pytest.mark.parametrize("case", CONVS)
def test_scales_of_image_channels_fold_into_convolutions(case):
    body, v, w = CONVS[case]
    shapes = {"v": v, "w": w, "c": "8", "g": "8", "mu": "8", "d": "8x1x3x3", "b": "8x1x1", "n": "1x4x3x3", "m": "8x3"}
    out = "float[b, n] out" if "Flatten(z)" in body else "float[1, n, h, w_out] out"
    model = build(body, IMAGE, out, **shapes, big="32x5", var=np.full(8, 2, np.float32))
    fold = prove(model, axis=1)
    assert len(set(fold.ties)) == (1 if case == "one_channel_added_to_many" else 8)


def test_shared_initializers_keep_their_numbers_for_other_readers():
    model = build(
        "x = Mul(a, g) y = Mul(b, g) o = MatMul(x, w) p = MatMul(y, w) out = Add(o, p)",
        "float[b, s, 8] a, float[b, s, 8] b",
        g="8",
        w="8x6",
    )
    prove(model)
    assert {"g", "w", "g/scaled", "w/scaled"} == set(model.graph.initializers)


@settings(max_examples=40, deadline=None)
@given(
    scale=st.lists(st.floats(-6, 6), min_size=8, max_size=8), ties=st.lists(st.integers(0, 3), min_size=8, max_size=8)
)
def test_any_scales_fold_through_any_gather(scale, ties):
    """Gathering makes arbitrary ties, which must be found."""
    model = build("y = MatMul(a, v) z = Relu(y) x = Gather<axis=2>(z, i) out = MatMul(x, w)", v="8x4", w="8x6", i=ties)
    value = value_named(model, "x")
    fold = find_fold(value, -1, 8)
    assert [fold.ties[i] == fold.ties[j] for i in range(8) for j in range(8)] == [a == b for a in ties for b in ties]
    wanted = fold.largest(np.exp2(scale))
    kernel, table = array(model.graph.initializers["w"]), array(model.graph.initializers["v"])
    fold.apply(wanted)
    numbers = np.random.default_rng(0).standard_normal((3, 8))
    nodes = {node.op_type + node.outputs[0].name: node for node in model.graph}
    after = np.maximum(numbers @ array(nodes["MatMuly"].inputs[1]), 0)[:, ties] @ array(nodes["MatMulout"].inputs[1])
    assert np.allclose(np.maximum(numbers @ table, 0)[:, ties] @ kernel, after, rtol=1e-4, atol=1e-4)
