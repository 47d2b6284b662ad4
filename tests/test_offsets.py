"""An offset for each channel is folded into the biases around a value: which folds there are, and that they hold."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.running.execute import open_model
from qexport.passes.folding.flood import largest_of_ties
from qexport.passes.folding.offsets import Offset, find_offset, find_readers

RNG = np.random.default_rng(0)


def build(body, inputs="float[b, s, 8] a", outputs="float[b, s, n] out", opset=23, **constants):
    """A model from text; ``name="4x8"`` in ``constants`` are random numbers of that shape, arrays are as they are."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "other" : 1]>'
    proto = onnx.parser.parse_model(f"{head} g ({inputs}) => ({outputs}) {{ {body} }}")
    for name, told in constants.items():
        sizes = [int(size) for size in told.split("x") if size] if isinstance(told, str) else None
        numbers = np.asarray(told) if sizes is None else RNG.standard_normal(sizes).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers, name))
    for node in proto.graph.node:
        node.name = f"{node.op_type}/{node.output[0]}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def value_named(model, name):
    return {value.name: value for node in model.graph for value in node.outputs}[name]


def feeds_of(model):
    rng, feeds = np.random.default_rng(1), {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else (2 if axis == 0 else 3) for axis, size in enumerate(value.shape)]
        feeds[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return feeds


def prove(model, name="x", axis=-1):
    """Fold an offset, and compare all outputs and the value itself with what they were; returns the fold."""
    value = value_named(model, name)
    count = value.shape[axis]
    found = find_offset(value, axis, count)
    assert isinstance(found, Offset), found
    offset = largest_of_ties(found.ties, np.random.default_rng(2).standard_normal(count))
    feeds = feeds_of(model)
    before = open_model(model, taps=[name]).run(feeds)
    found.apply(offset)
    after = open_model(model, taps=[name]).run(feeds)
    along = offset.reshape([-1] + [1] * (value.shape.rank() - 1 - axis % value.shape.rank()))
    assert not np.allclose(before[name], after[name], atol=0.05)  # it was shifted
    after[name] = after[name] + along
    for key, truth in before.items():
        gap = np.linalg.norm(truth.astype(np.float64) - after[key]) / np.linalg.norm(truth)
        assert gap < 1e-5, (key, gap)
    return found


W = {"w": "8x6", "d": "6"}
END = " o = MatMul(x, w) out = Add(o, d)"
FOLDS = {
    "norm": ("x = LayerNormalization(a, g, c)" + END, {"g": "8", "c": "8", **W}),
    "norm_without_bias": ("x = LayerNormalization(a, g)" + END, {"g": "8", **W}),
    "bias": ("y = MatMul(a, v) x = Add(c, y)" + END, {"v": "8x8", "c": "8", **W}),
    "scalar_bias": ("y = MatMul(a, v) x = Add(y, c)" + END, {"v": "8x8", "c": np.float32(1), **W}),
    "subtracted_bias": ("y = MatMul(a, v) x = Sub(y, c)" + END, {"v": "8x8", "c": "8", **W}),
    "from_a_constant_minus": ("y = MatMul(a, v) x = Sub(c, y)" + END, {"v": "8x8", "c": "8", **W}),
    "scalar_bias_behind": (
        "x = LayerNormalization(a, g, c) o = MatMul(x, w) out = Add(e, o)",
        {"g": "8", "c": "8", "e": "1", **W},
    ),
    "bias_for_each_position": (
        "x = LayerNormalization(a, g) o = MatMul(x, w) out = Add(o, e)",
        {"g": "8", "e": "3x1", **W},
    ),
    "table": ("x = Gather(t, i)" + END, {"t": "9x8", "i": np.array([[1, 4, 1]]), **W}),
    "two_readers": (
        "x = LayerNormalization(a, g)" + END + " p = MatMul(x, v) q = Add(p, c) z = Relu(q)",
        {"g": "8", "v": "8x8", "c": "8", **W},
    ),
    "three_pieces": (
        """y = MatMul(a, v) z = Add(y, c) p, q, x = Split<axis=-1, num_outputs=3>(z) pp = Relu(p) qq = Relu(q)""" + END,
        {"v": "8x24", "c": "24", **W},
    ),
    "pieces_joined": (
        "p = LayerNormalization(a, g) q = LayerNormalization(b, g) x = Concat<axis=-1>(p, q) "
        "o = MatMul(x, u) out = Add(o, d)",
        {"g": "8", "u": "16x6", "d": "6"},
    ),
    "post_norm_block": (  # the block reads the norm, and what it makes is added to it: its last bias takes two changes
        "x = LayerNormalization(a, g) y = MatMul(x, v) z = Add(y, c) out = Add(x, z)",
        {"g": "8", "v": "8x8", "c": "8"},
    ),
    "norm_added_to_a_copy_with_bias": (
        "x = LayerNormalization(a, g) y = Add(x, c) t = Add(x, y) out = Relu(t)",
        {"g": "8", "c": "8"},
    ),
    "residual_of_a_deeper_branch": (
        "x = LayerNormalization(a, g) y = MatMul(x, v) z = Add(y, c) h = Gelu(z) "
        "p = MatMul(h, v) q = Add(p, e) out = Add(q, x)",
        {"g": "8", "v": "8x8", "c": "8", "e": "8"},
    ),
    "constant_added": ("x = LayerNormalization(a, g) y = Add(x, c) out = Relu(y)", {"g": "8", "c": np.float32(1)}),
    "dropout": ("y = LayerNormalization(a, g) x = Dropout(y)" + END, {"g": "8", **W}),
}


@pytest.mark.parametrize("case", FOLDS)
def test_offsets_leave_the_function_as_it_was(case):
    body, constants = FOLDS[case]
    prove(build(body, "float[b, 3, 8] a, float[b, 3, 8] b", **constants))


HEADS = """q0 = MatMul(a, wq) k0 = MatMul(a, wk) v00 = MatMul(a, wv) v0 = Add(v00, c)
    q1 = Reshape(q0, many) q = Transpose<perm=[0, 2, 1, 3]>(q1)
    k1 = Reshape(k0, few) k2 = Transpose<perm=[0, 2, 1, 3]>(k1)
    v1 = Reshape(v0, few) v2 = Transpose<perm=[0, 2, 1, 3]>(v1) """
REPEAT = """ku = Unsqueeze(k2, two) ke = Expand(ku, wide) k = Reshape(ke, joined) kt = Transpose<perm=[0, 1, 3, 2]>(k)
    vu = Unsqueeze(v2, two) ve = Expand(vu, wide) vv = Reshape(ve, joined) l = MatMul(q, kt) """
TAIL = " x0 = Transpose<perm=[0, 2, 1, 3]>(r) x = Reshape(x0, flat)" + END
SIZES = {"wq": "8x8", "wk": "8x4", "wv": "8x4", "c": "4", "many": [0, 0, 4, 2], "few": [0, 0, 2, 2], **W}
SIZES |= {"two": [2], "wide": [1, 1, 2, 1, 1], "joined": [0, 4, -1, 2], "flat": [0, 0, 8], "zero": np.float32(0)}
MASK = np.array([[True, False, False], [True, True, False], [False, True, True]])


@pytest.mark.parametrize(
    "attention",
    [
        REPEAT + "p = Softmax(l) r = MatMul(p, vv)",
        REPEAT + "p = Softmax<axis=3>(l) r = MatMul(p, vv)",
        REPEAT + "s = Where(mask, l, low) p = Softmax<axis=-1>(s) r = MatMul(p, vv)",
        "r = Attention(q, k2, v2, mask)",
        "r = Attention<is_causal=1, softcap=3.0>(q, k2, v2)",
    ],
)
def test_offsets_go_through_attention_whose_weights_sum_to_one(attention):
    model = build(HEADS + attention + TAIL, **SIZES, mask=MASK, low=np.float32(-1e4))
    assert prove(model).ties.tolist() == [0, 1, 0, 1, 4, 5, 4, 5]


@pytest.mark.parametrize(
    "attention",
    [
        REPEAT + "p = Softmax<axis=2>(l) r = MatMul(p, vv)",
        REPEAT + "p = Sigmoid(l) r = MatMul(p, vv)",
        REPEAT + "p = Softmax(l) n = Where(mask, p, zero) r = MatMul(n, vv)",
        REPEAT + "p = Softmax(l) n = Mul(p, low) r = MatMul(n, vv)",
        REPEAT + "p = Softmax(l) n = Dropout(p) r = MatMul(n, vv)",
    ],
)
def test_attention_weights_that_may_not_sum_to_one_are_refused(attention):
    model = build(HEADS + attention + TAIL, **SIZES, mask=MASK, low=np.float32(0.5))
    assert find_offset(value_named(model, "x"), -1, 8) == "MatMul makes it, which has no bias"


def test_an_old_softmax_without_an_axis_is_no_mean():
    body = "l = MatMul(a, u) p = Softmax(l) y = MatMul(b, v) z = Add(y, c) x = MatMul(p, z)" + END
    inputs = "float[2, 3, 8] a, float[2, 4, 8] b"
    sizes = {"u": "8x4", "v": "8x8", "c": "8", **W}
    prove(build(body, inputs, opset=13, **sizes))
    assert (
        find_offset(value_named(build(body, inputs, opset=12, **sizes), "x"), -1, 8)
        == "MatMul makes it, which has no bias"
    )


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("bias", "more"), [("8", "6"), ("1x8", "3x1"), ("3x1", "1"), ("", "")])
def test_gemm_takes_offsets_in_and_undoes_them(trans_b, bias, more):
    first, second = ("v, c" if bias else "v"), ("w, d" if more else "w")
    body = f"x = Gemm<transA=1, transB={trans_b}>(a, {first}) out = Gemm<transB={trans_b}>(x, {second})"
    sizes = {"v": "8x5" if trans_b else "5x8", "w": "6x8" if trans_b else "8x6", "c": bias, "d": more}
    prove(build(body, "float[5, 3] a", "float[3, 6] out", **sizes))


@pytest.mark.parametrize("bias", ["", ", d"])
def test_offsets_of_images_fold_into_convolutions(bias):
    body = f"x = Conv<pads=[1, 1, 1, 1]>(a, v{bias and ', c'}) out = Conv<strides=[2, 2], dilations=[1, 2]>(x, w{bias})"
    prove(build(body, "float[1, 4, 9, 9] a", "float[1, n, h, k] out", v="8x4x3x3", c="8", w="6x8x3x3", d="6"), axis=1)


def test_offsets_of_images_go_to_the_other_branch_of_a_sum():
    body = "x = Conv(a, v) y = Conv(x, w, d) z = Add(x, y) out = Relu(z)"
    prove(build(body, "float[1, 4, 9, 9] a", "float[1, n, h, k] out", v="8x4x3x3", w="8x8x1x1", d="8"), axis=1)


REFUSED = {
    "relu": ("y = MatMul(a, v) z = Add(y, c) x = Relu(z)" + END, "Relu makes it"),
    "rms_norm": ("x = RMSNormalization(a, c)" + END, "RMSNormalization makes it"),
    "factor": ("x = Mul(a, c)" + END, "Mul makes it"),
    "input": ("x = Identity(a)" + END, "an input of the model"),
    "norm_reads_it": (
        "x = LayerNormalization(a, c) y = LayerNormalization(x, c) out = Relu(y)",
        "LayerNormalization reads it",
    ),
    "no_bias": ("x = LayerNormalization(a, c) y = MatMul(x, v) out = Relu(y)", "a product without a bias"),
    "bias_beside_another_reader": (
        "x = LayerNormalization(a, c) y = MatMul(x, v) z = Add(y, c) out = Mul(y, z)",
        "a product without a bias",
    ),
    "residual_without_bias": (
        "x = LayerNormalization(a, c) y = MatMul(x, v) z = Add(y, c) h = Relu(z) out = Add(x, h)",
        "other branch has no bias",
    ),
    "residual_twice": ("x = LayerNormalization(a, c) out = Add(x, x)", "other branch has no bias"),
    "residual_of_an_output": (
        "x = LayerNormalization(a, c) y = MatMul(a, v) more = Add(y, c) out = Add(x, more)",
        "other branch has no bias",
    ),
    "smaller_residual": (
        "x = LayerNormalization(a, c) y = MatMul(a, row) z = Add(y, one) t = Add(x, z) out = Relu(t)",
        "is smaller",
    ),
    "subtracted": ("x = LayerNormalization(a, c) y = Sub(x, c) out = Relu(y)", "Sub reads it"),
    "computed_bias": ("h = ReduceMean<keepdims=0>(a, axes) x = LayerNormalization(a, c, h)" + END, "is computed"),
    "norm_over_two_axes": ("x = LayerNormalization<axis=1>(a, plane)" + END, "does not run along"),
    "batched_kernel": ("x = LayerNormalization(a, c) y = MatMul(x, stack) out = Add(y, c)", "an attention product"),
    "vector": (
        "x = LayerNormalization(a, c) y = MatMul(x, c) z = Unsqueeze(y, last) out = Add(z, c)",
        "an attention product",
    ),
    "scores": (
        "x = LayerNormalization(a, c) t = Transpose<perm=[0, 2, 1]>(x) out = MatMul(x, t)",
        "an attention product",
    ),
    "flat_table": ("t = Gather(c, ids) u = Add(t, t) x = Reshape(t, shape)" + END, "across its channels"),
    "foreign": ("y = LayerNormalization(a, c) x = other.Identity(y)" + END, "Identity makes it"),
    "training": ("y = LayerNormalization(a, c) x = Dropout(y, ratio, true)" + END, "in training"),
}
CONSTANTS = {
    "v": "8x8",
    "c": "8",
    "row": "8x1",
    "one": "1",
    "plane": "3x8",
    "stack": "2x8x8",
    "axes": [0, 1],
    "last": [-1],
}
CONSTANTS |= {"ids": np.array([0, 1, 2] * 8), "shape": [1, 3, 8], "ratio": np.float32(0), "true": np.array(True), **W}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_offset_goes_through_is_refused_with_a_reason(case):
    body, reason = REFUSED[case]
    outputs = "float[b, s, n] out, float[b, s, 8] more" if "more" in body else "float[b, s, n] out"
    model = build(body, "float[b, 3, 8] a", outputs, **CONSTANTS)
    x = value_named(model, "x")
    x.shape, x.type = ir.Shape(("b", 3, 8)), ir.TensorType(ir.DataType.FLOAT)
    before = ir.to_proto(model).SerializeToString()
    found = find_offset(x, -1, 8)
    assert isinstance(found, str)
    assert reason in found
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("x = Conv(a, v) out = Conv<pads=[0, 1, 0, 0]>(x, w)", "a padded convolution"),
        ('x = Conv(a, v) out = Conv<auto_pad="SAME_UPPER">(x, w)', "a padded convolution"),
        ("x = Conv(a, v) out = Conv<group=2>(x, u)", "a grouped convolution"),
        ("x = Conv(a, v) out = ConvTranspose(x, w)", "ConvTranspose reads it"),
        ("x = Conv(a, v) out = MaxPool<kernel_shape=[2, 2], pads=[1, 1, 1, 1]>(x)", "MaxPool reads it"),
    ],
)
def test_convolutions_that_see_more_than_the_image_are_refused(body, reason):
    model = build(body, "float[1, 4, 9, 9] a", "float[1, n, h, k] out", v="8x4x3x3", w="8x8x3x3", u="8x4x3x3")
    assert reason in find_offset(value_named(model, "x"), 1, 8)


@pytest.mark.parametrize("attributes", ["alpha=0.5", "beta=2.0"])
def test_a_gemm_that_scales_is_refused_on_either_side(attributes):
    for body in (
        f"x = Gemm<{attributes}>(a, v, c) out = Gemm(x, v, c)",
        f"x = Gemm(a, v, c) out = Gemm<{attributes}>(x, v, c)",
    ):
        model = build(body, "float[3, 8] a", "float[3, 8] out", v="8x8", c="8")
        assert find_offset(value_named(model, "x"), -1, 8) == "Gemm scales its product or its bias"


def test_only_the_products_are_readers_that_a_sub_could_stand_before():
    body = "x = Gelu(a) y = MatMul(x, v) z = Add(y, c) t = Mul(x, z) p = MatMul(x, w) q = Add(p, d) out = MatMul(z, w)"
    model = build(body, outputs="float[b, s, n] out, float[b, s, m] q, float[b, s, m] t", v="8x8", c="8", **W)
    found = find_readers(value_named(model, "x"), -1, 8)
    assert [term.reader.name for term in found.terms] == ["MatMul/y", "MatMul/p"]
    model = build("x = Gelu(a) y = MatMul(x, v) out = Relu(y)", v="8x8")
    assert find_readers(value_named(model, "x"), -1, 8) == "a product without a bias reads it"


def test_a_value_that_no_product_reads_has_no_readers_but_a_reason():
    model = build(
        "x = Relu(a)  out = ConvTranspose(x, w, b)", "float[b, 8, 5, 5] a", "float[b, 8, p, q] out", w="8x8x3x3", b="8"
    )
    reason = "no product or convolution that could take the offset in reads it"
    assert find_readers(value_named(model, "x"), 1, 8) == reason


@settings(max_examples=25, deadline=None)
@given(
    offset=st.lists(st.floats(-8, 8), min_size=4, max_size=4),
    places=st.lists(st.integers(0, 3), min_size=8, max_size=8),
)
def test_any_offsets_fold_through_any_gather(offset, places):
    body = "y = MatMul(a, v) z = Add(y, c) x = Gather<axis=2>(z, i)" + END
    model = build(body, v="8x4", c="4", i=places, **W)
    found = find_offset(value_named(model, "x"), -1, 8)
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    found.apply(np.array(offset)[places])
    c, d = (model.graph.initializers[f"{name}/shifted"].const_value.numpy() for name in "cd")
    wide = np.array(offset, np.float64) * np.isin(np.arange(4), places)
    assert np.allclose(before["c"] - c, wide, atol=1e-5)
    assert np.allclose(d - before["d"], wide[places] @ before["w"], atol=1e-4)
