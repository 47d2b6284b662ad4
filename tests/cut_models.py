"""Small models with something to cut, and what a cut must not change."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from channel_models import build, give_shapes
from helpers import feeds_of, session

from qexport.passes.match import add_constant, array, sweep
from qexport.passes.pruning.cut import Cut
from qexport.passes.pruning.spaces import find_spaces

WIDE = {"wq": "8x8", "wk": "8x8", "wv": "8x8", "wo": "8x8"}
HEADS = {"split": [0, 0, 4, 2], "merge": [0, 0, 8], "scale": np.float32(0.7)}
PROJECT = "q0 = MatMul(a, wq) k0 = MatMul(a, wk) v0 = MatMul(a, wv) "
SPLIT = "q1 = Reshape(q0, split) k1 = Reshape(k0, split) v1 = Reshape(v0, split) "
APART = "q = Transpose<perm=[0,2,1,3]>(q1) kt = Transpose<perm=[0,2,3,1]>(k1) v = Transpose<perm=[0,2,1,3]>(v1) "
SCORES = "s0 = MatMul(q, kt) s1 = Mul(s0, scale) "
CONTEXT = "p = Softmax<axis=-1>(s2) c = MatMul(p, v) ct = Transpose<perm=[0,2,1,3]>(c) cm = Reshape(ct, merge) "
OUT = "out = MatMul(cm, wo)"
CORE = SCORES + "s2 = Identity(s1) " + CONTEXT + OUT
KEYS = "k = Transpose<perm=[0,2,1,3]>(k1) kt = Transpose<perm=[0,1,3,2]>(k) "
FUSED = {"wqkv": "8x24", "bqkv": "24", "wo": "8x8", "third": [8, 8, 8]}
QKV = "m0 = MatMul(a, wqkv) m = Add(m0, bqkv) "
INTS = {"i0": np.array(0), "i1": np.array(1), "i2": np.array(2), "zero": [0], "one": [1], "two": [2]}
TURN = "{0}a = Slice({0}r, zero, one, three) {0}b = Slice({0}r, one, two, three) {0}n = Neg({0}b) "
TURN += "{0}z = Concat<axis=-1>({0}n, {0}a) {0}c = Mul({0}r, cosine) {0}s = Mul({0}z, sine) {0}x = Add({0}c, {0}s) "
ROTARY = "qr = Transpose<perm=[0,2,1,3]>(q1) kr = Transpose<perm=[0,2,1,3]>(k1) v = Transpose<perm=[0,2,1,3]>(v1) "
ROTARY += TURN.format("q") + TURN.format("k") + "q = Identity(qx) kt = Transpose<perm=[0,1,3,2]>(kx) "
GQA = {"wq": "8x8", "wk": "8x4", "wv": "8x4", "wo": "8x8", "few": [0, 0, 2, 2], "times": [1, 1, 2, 1, 1]}
GQA |= {"all": [0, 4, -1, 2], "five": [2]}
SHARED = "q1 = Reshape(q0, split) k1 = Reshape(k0, few) v1 = Reshape(v0, few) q = Transpose<perm=[0,2,1,3]>(q1) "
for part in "kv":
    SHARED += f"{part}2 = Transpose<perm=[0,2,1,3]>({part}1) {part}3 = Unsqueeze({part}2, five) "
    SHARED += f"{part}4 = Expand({part}3, times) {part}5 = Reshape({part}4, all) "
SHARED += "kt = Transpose<perm=[0,1,3,2]>(k5) v = Identity(v5) "
SIZED = "sh = Shape(a) d0 = Gather<axis=0>(sh, i0) d1 = Gather<axis=0>(sh, i1) u0 = Unsqueeze(d0, zero) "
SIZED += "u1 = Unsqueeze(d1, zero) split = Concat<axis=0>(u0, u1, four, two) merge = Concat<axis=0>(u0, u1, minus) "
CONV = {"w1": "6x3x3x3", "b1": "6", "w2": "6x6x3x3", "w3": "4x6x1x1"}
IMAGE = {"inputs": "float[b, 3, 5, 5] a", "outputs": "float[b, 4, 5, 5] out"}
BN = {"g": "6", "h": "6", "mean": "6", "var": np.abs(np.random.default_rng(3).standard_normal(6)).astype(np.float32)}
C3 = "Conv<kernel_shape=[3,3], pads=[1,1,1,1]>"
MASK = {"inputs": "float[b, s, 8] a, float[b, 1, 1, s] mask"}

MODELS = {
    "mlp": (
        "neurons", 6,
        "y = MatMul(a, w1) z = Add(y, c1) x = Gelu(z) o = MatMul(x, w2) out = Add(o, c2)",
        {"w1": "8x6", "c1": "6", "w2": "6x4", "c2": "4"},
    ),
    "mlp_of_gemms": (
        "neurons", 6,
        "y = Gemm<transB=1>(a, w1, c1) x = Tanh(y) out = Gemm(x, w2, c2)",
        {"w1": "6x8", "c1": "6", "w2": "6x4", "c2": "4", "inputs": "float[b, 8] a", "outputs": "float[b, 4] out"},
    ),
    "gated": (
        "neurons", 6,
        "g = MatMul(a, wg) s = Sigmoid(g) t = Mul(g, s) u = MatMul(a, wu) x = Mul(t, u) out = MatMul(x, w2)",
        {"wg": "8x6", "wu": "8x6", "w2": "6x4"},
    ),
    "gate_and_up_in_one": (
        "neurons", 6,
        "m = MatMul(a, w1) g, u = Split<axis=-1>(m, halves) t = Sigmoid(g) x = Mul(t, u) out = MatMul(x, w2)",
        {"w1": "8x12", "w2": "6x4", "halves": [6, 6]},
    ),
    "gate_and_up_in_slices": (
        "neurons", 6,
        "m = MatMul(a, w1) g = Slice(m, zero, six, two) u = Slice(m, six, last, two, one) t = Sigmoid(g) x = Mul(t, u) "
        "out = MatMul(x, w2)",
        {"w1": "8x12", "w2": "6x4", "zero": [0], "six": [6], "last": [2**62], "two": [2], "one": [1]},
    ),
    "mha": ("heads", 4, PROJECT + SPLIT + APART + CORE, WIDE | HEADS),
    "mha_masked": (
        "heads", 4,
        PROJECT + SPLIT + APART + SCORES + "s3 = Add(s1, mask) s2 = Add(s3, bias) " + CONTEXT + OUT,
        WIDE | HEADS | {"bias": "1x4x1x1"} | MASK,
    ),
    "mha_with_biases": (
        "heads", 4,
        "q9 = MatMul(a, wq) q0 = Add(q9, bq) k9 = MatMul(a, wk) k0 = Add(bk, k9) v0 = MatMul(a, wv) "
        + SPLIT + APART + SCORES + "s2 = Identity(s1) " + CONTEXT + "o = MatMul(cm, wo) r = Add(o, bo) out = Add(r, a)",
        WIDE | HEADS | {"bq": "8", "bk": "8", "bo": "8"},
    ),
    "qkv_split": (
        "heads", 4,
        QKV + "q0, k0, v0 = Split<axis=-1>(m, third) " + SPLIT + APART + CORE,
        FUSED | HEADS,
    ),
    "qkv_split_evenly": (
        "heads", 4,
        QKV + "q0, k0, v0 = Split<axis=-1, num_outputs=3>(m) " + SPLIT + APART + CORE,
        FUSED | HEADS,
    ),
    "qkv_of_five_axes": (
        "heads", 4,
        QKV + "f = Reshape(m, five) t = Transpose<perm=[2,0,3,1,4]>(f) q = Gather<axis=0>(t, i0) "
        "k = Gather<axis=0>(t, i1) v = Gather<axis=0>(t, i2) kt = Transpose<perm=[0,1,3,2]>(k) " + CORE,
        FUSED | HEADS | INTS | {"five": [0, 0, 3, 4, 2]},
    ),
    "sizes_read_at_run_time": (
        "heads", 4,
        SIZED + PROJECT + SPLIT + APART + CORE,
        WIDE | {"scale": np.float32(0.7), "four": [4], "minus": [-1]} | INTS,
    ),
    "rotary": (
        "heads", 4,
        PROJECT + SPLIT + ROTARY + CORE,
        WIDE | HEADS | {"cosine": "2", "sine": "2", "zero": [0], "one": [1], "two": [2], "three": [3]},
    ),
    "grouped_queries": ("heads", 2, PROJECT + SHARED + CORE, GQA | HEADS),
    "attention_of_four_axes": (
        "heads", 4,
        PROJECT + SPLIT + "q = Transpose<perm=[0,2,1,3]>(q1) k = Transpose<perm=[0,2,1,3]>(k1) "
        "v = Transpose<perm=[0,2,1,3]>(v1) c = Attention(q, k, v) ct = Transpose<perm=[0,2,1,3]>(c) "
        "cm = Reshape(ct, merge) " + OUT,
        WIDE | HEADS,
    ),
    "attention_of_three_axes": (
        "heads", 4,
        PROJECT + "cm = Attention<q_num_heads=4, kv_num_heads=4>(q0, k0, v0) " + OUT,
        WIDE,
    ),
    "attention_of_groups": (
        "heads", 2,
        PROJECT + "cm = Attention<q_num_heads=4, kv_num_heads=2>(q0, k0, v0) " + OUT,
        WIDE | {"wk": "8x4", "wv": "8x4"},
    ),
    "multi_head_attention": (
        "heads", 4,
        PROJECT + "cm = com.microsoft.MultiHeadAttention<num_heads=4>(q0, k0, v0, bqkv) " + OUT,
        WIDE | {"bqkv": "24"},
    ),
    "packed_attention": (
        "heads", 4,
        "cm = com.microsoft.Attention<num_heads=4>(a, wqkv, bqkv) " + OUT,
        {"wqkv": "8x24", "bqkv": "24", "wo": "8x8"},
    ),
    "group_query_attention": (
        "heads", 2,
        "q0 = MatMul(a, wq) k0 = MatMul(a, wk) v0 = MatMul(a, wv) "
        "cm, pk, pv = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q0, k0, v0, , , lengths, total) "
        + OUT,
        {"wq": "8x32", "wk": "8x16", "wv": "8x16", "wo": "32x8", "lengths": np.int32([2, 2]), "total": np.int32(3)},
    ),
    "one_key_head": (
        "heads", 4,
        PROJECT + "q1 = Reshape(q0, split) q = Transpose<perm=[0,2,1,3]>(q1) k1 = Unsqueeze(k0, one) "
        "kt = Transpose<perm=[0,1,3,2]>(k1) v = Unsqueeze(v0, one) " + CORE,
        WIDE | HEADS | {"wk": "8x2", "wv": "8x2", "one": [1]},
    ),
    "norms_of_heads": (
        "heads", 4,
        PROJECT + SPLIT + "qn = RMSNormalization<axis=-1>(q1, g) kn = LayerNormalization(k1, g, h) "
        "q = Transpose<perm=[0,2,1,3]>(qn) kt = Transpose<perm=[0,2,3,1]>(kn) v = Transpose<perm=[0,2,1,3]>(v1) "
        + CORE,
        WIDE | HEADS | {"g": "2", "h": "2"},
    ),
    "einsum": (
        "heads", 4,
        PROJECT + SPLIT + "s0 = Einsum<equation=\"bshd,bthd->bhst\">(q1, k1) p = Softmax(s0) "
        "c = Einsum<equation=\"bhst,bthd->bshd\">(p, v1) cm = Reshape(c, merge) " + OUT,
        WIDE | HEADS,
    ),
    "rotary_operator": (
        "heads", 4,
        PROJECT + "qr = RotaryEmbedding<num_heads=4>(q0, cosine, sine) "
        "kr = RotaryEmbedding<num_heads=4>(k0, cosine, sine) "
        "cm = Attention<q_num_heads=4, kv_num_heads=4>(qr, kr, v0) " + OUT,
        WIDE | {"cosine": "2x3x1", "sine": "2x3x1"},
    ),
    "resized": (
        "channels", 6,
        "y = Conv(a, w1) n = InstanceNormalization(y, g, h) x = Resize<mode=\"nearest\">(n, , twice) "
        "t = ConvTranspose(x, w2) r = Add(t, x) q = Conv(r, w3) "
        "out = AveragePool<kernel_shape=[2,2], strides=[2,2]>(q)",
        {"w1": "6x3x1x1", "w2": "6x6x1x1", "w3": "4x6x1x1", "g": "6", "h": "6", "twice": np.float32([1, 1, 2, 2])}
        | IMAGE,
    ),
    "convolutions": (
        "channels", 6,
        f"y = {C3}(a, w1, b1) n = BatchNormalization(y, g, h, mean, var) x = Relu(n) "
        "z = MaxPool<kernel_shape=[1,1]>(x) out = Conv(z, w3)",
        CONV | BN | IMAGE,
    ),
    "residual_group": (
        "channels", 6,
        f"y = {C3}(a, w1, b1) x = Relu(y) z = {C3}(x, w2) r = Add(z, x) t = Relu(r) out = Conv(t, w3)",
        CONV | IMAGE,
    ),
    "depthwise": (
        "channels", 6,
        "y = Conv(a, w1, b1) x = Relu(y) z = Conv<group=6>(x, w2, b2) t = Relu(z) out = Conv(t, w3)",
        {"w1": "6x3x1x1", "b1": "6", "w2": "6x1x1x1", "b2": "6", "w3": "4x6x1x1"} | IMAGE,
    ),
    "groups": (
        "channels", 2,
        "y = Conv(a, w1, b1) x = Relu(y) z = Conv<group=2>(x, w2) t = Relu(z) out = Conv(t, w3)",
        {"w1": "6x3x1x1", "b1": "6", "w2": "4x3x1x1", "w3": "4x4x1x1"} | IMAGE,
    ),
    "flattened": (
        "channels", 6,
        "y = Conv(a, w1) x = Relu(y) f = Flatten(x) out = Gemm(f, w)",
        {"w1": "6x3x1x1", "w": "150x4", "inputs": "float[b, 3, 5, 5] a", "outputs": "float[b, 4] out"},
    ),
    "padded_shortcut": (
        "channels", 6,
        "y = Conv(a, w1) x = Pad(y, pads) k = Conv(a, w2) r = Add(x, k) out = Conv(r, w3)",
        {"w1": "3x3x1x1", "w2": "6x3x1x1", "w3": "4x6x1x1", "pads": [0, 2, 0, 0, 0, 1, 0, 0]} | IMAGE,
    ),
    "pooled": (
        "channels", 6,
        "y = Conv(a, w1) x = Relu(y) p = ReduceMean<keepdims=0>(x, places) out = Gemm<transB=1>(p, w)",
        {"w1": "6x3x1x1", "w": "4x6", "places": [2, 3], "inputs": "float[b, 3, 5, 5] a", "outputs": "float[b, 4] out"},
    ),
}  # fmt: skip
"""By name: the kind of space, how many units it has, the body, and constants, inputs and outputs."""


FLAT, APART_SHAPES = ["b", "s", 8], {f"{part}1": ["b", "s", 4, 2] for part in "qkv"}
SHAPES = {
    "multi_head_attention": {"cm": FLAT},
    "packed_attention": {"cm": FLAT},
    "group_query_attention": {"cm": ["b", "s", 32]},
    "sizes_read_at_run_time": {
        "cm": FLAT, "q": ["b", 4, "s", 2], "kt": ["b", 4, 2, "s"], "v": ["b", 4, "s", 2], "ct": ["b", "s", 4, 2],
        "c": ["b", 4, "s", 2], **{name: ["b", 4, "s", "s"] for name in ("s0", "s1", "s2", "p")}, **APART_SHAPES,
    },
}  # fmt: skip
"""What ONNX's inference does not find."""


def make(name):
    """The model of a name; its weights are small."""
    _, _, body, constants = MODELS[name]
    model = build(body, **constants)
    shapes = SHAPES.get(name, {})
    give_shapes(model, **shapes)
    for value in model.graph.initializers.values():
        if len(value.shape) > 1 and value.dtype.is_floating_point():
            value.const_value = ir.tensor(array(value) * np.float32(0.3), name=value.name)
    return model


def cuts(model, kind):
    return [space for space in find_spaces(model, kind) if isinstance(space.cut, Cut)]


def copy_of(model):
    return ir.from_proto(ir.to_proto(model))


def bytes_of(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def outputs_of(model, seed=1):
    """What a model answers to random inputs; sizes that are not known are 2 (batch) and 3."""
    return session(model).run(None, feeds_of(model, seed))


def silence(cut, keep):
    """Put zeros where weights sum over units that are not kept."""
    stays = np.append(keep, True)
    for slot in cut.consumers:
        numbers = array(slot.constant) * stays[slot.ids]
        old = slot.constant
        slot.node.replace_input_with(slot.index, add_constant(slot.node, "silent", numbers.astype(np.float32)))
        sweep([old])


def reorder(cut, order):
    """Let unit ``order[i]`` take the place of unit ``i`` in all constants."""
    for slot in cut.slots:
        (axis,) = slot.axes
        along, numbers = slot.ids.reshape(-1), array(slot.constant)
        places = np.arange(along.size)
        for unit, other in enumerate(order):
            places[along == unit] = np.flatnonzero(along == other)
        moved = np.take(numbers, places, axis)
        slot.node.replace_input_with(slot.index, add_constant(slot.node, "moved", moved))


def check(model):
    """What ONNX says of a model, all shapes inferred anew; they must be those that it tells."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    told = {value.name: value for value in proto.graph.value_info}
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    for value in inferred.graph.value_info:
        sizes = [d.dim_value for d in told[value.name].type.tensor_type.shape.dim]
        for size, found in zip(sizes, value.type.tensor_type.shape.dim, strict=True):
            assert not found.dim_value or not size or found.dim_value == size, value.name
