"""Gradients: every rule against central differences in double precision, whole models, and what is refused."""

import math
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model_from, session
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qexport.calibration.gradients.backward import cotangent, differentiate, gradient
from qexport.calibration.gradients.rules import RULES
from qexport.errors import UsageError

STEP = 1e-5


def numbers(shape, seed=0, low=-2.0, high=2.0):
    """Numbers that keep away from where slopes jump: whole numbers and halves, and each other."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(low, high, shape)
    near = np.abs(x * 2 - np.round(x * 2)) < 0.05
    return np.where(near, x + 0.06, x)


class Erf(OpRun):
    """In double; the reference has it in float."""

    def _run(self, x):
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class Gelu(OpRun):
    """The same."""

    def _run(self, x, approximate=None):
        bent = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if approximate == "tanh" else None
        return (x * (1 + (np.vectorize(math.erf)(x / math.sqrt(2)) if bent is None else bent)) / 2,)


def runner(model, engine):
    """Names and feeds -> values in double, by onnx's reference or by onnxruntime."""
    if engine == "onnxruntime":
        return session(model).run
    return ReferenceEvaluator(ir.to_proto(model), new_ops=[Erf, Gelu]).run


def differences(run, outputs, feeds, u, name):
    """Central differences of the sum of all outputs times ``u``."""
    wanted = np.zeros_like(feeds[name])
    for place in np.ndindex(feeds[name].shape):
        ends = []
        for step in (STEP, -STEP):
            moved = feeds[name].copy()
            moved[place] += step
            found = run(outputs, feeds | {name: moved})
            ends.append(sum(np.sum(y * u[output]) for y, output in zip(found, outputs, strict=True)))
        wanted[place] = (ends[0] - ends[1]) / (2 * STEP)
    return wanted


def check(text, feeds, opset=20, engine="reference", double=True):
    """The graph's gradients in double, and onnxruntime's in float, against the differences in double."""
    names = [name for name, value in feeds.items() if value.dtype == np.float64]
    doubles = model_from(text, opset=opset)
    run, outputs = runner(doubles, engine), [value.name for value in doubles.graph.outputs]
    rng = np.random.default_rng(1)
    u = {name: rng.standard_normal(np.shape(y)) for name, y in zip(outputs, run(None, feeds), strict=True)}
    wanted = {name: differences(run, outputs, feeds, u, name) for name in names}
    told, asked = {cotangent(name): value for name, value in u.items()}, [gradient(name) for name in names]
    if double:
        for name, value in zip(names, runner(differentiate(doubles, names), engine)(asked, feeds | told), strict=True):
            np.testing.assert_allclose(value, wanted[name], rtol=1e-6, atol=1e-7, err_msg=name)
    floats = differentiate(model_from(text.replace("double", "float"), opset=opset), names)
    narrow = {name: value.astype("f") if value.dtype == np.float64 else value for name, value in (feeds | told).items()}
    for name, value in zip(names, session(floats).run(asked, narrow), strict=True):
        assert value.shape == feeds[name].shape
        np.testing.assert_allclose(value, wanted[name], rtol=2e-3, atol=2e-4 * np.abs(wanted[name]).max() + 1e-5)
    assert any(np.abs(value).max() > 0 for value in wanted.values())


UNARY = [
    "Abs", "Cos", "Elu <alpha = 0.7>", "Erf", "Exp", "Gelu", 'Gelu <approximate = "tanh">', "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu <alpha = 0.2>", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sin", "Softplus", "Softsign",
    "Tanh", "LogSoftmax", "Softmax <axis = 0>", "Softmax", "Dropout", "Transpose", "Flatten",
]  # fmt: skip


@pytest.mark.parametrize("op", UNARY)
def test_functions_of_one_value(op):
    name, _, attributes = op.partition(" ")
    check(f"g (double[3, 4] x) => (double[a, b] y) {{ y = {name} {attributes} (x) }}", {"x": numbers((3, 4))})


@pytest.mark.parametrize("op", ["Log", "Sqrt"])
def test_functions_of_positive_values(op):
    check(f"g (double[3, 4] x) => (double[3, 4] y) {{ y = {op}(x) }}", {"x": numbers((3, 4), 0, 0.3, 4)})


def test_swish_of_any_slope():
    check("g (double[3, 4] x) => (double[3, 4] y) { y = Swish <alpha = 1.7> (x) }", {"x": numbers((3, 4))}, opset=24)


def test_what_is_clipped_has_no_slope():
    text = """g (double[3, 4] x) => (double[3, 4] y) {
        a = Constant <value = double {-1.0}> ()  b = Constant <value = double {1.0}> ()  y = Clip(x, a, b) }"""
    check(text, {"x": numbers((3, 4))})


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Pow", "PRelu"])
@pytest.mark.parametrize("sizes", ["2, 3, 4", "n, m, k"])
def test_two_values_that_are_repeated(op, sizes):
    for one, other in [((2, 3, 4), (3, 1)), ((2, 3, 4), ()), ((2, 3, 4), (2, 3, 4))]:
        shape = ", ".join("d" if sizes[0] == "n" else str(size) for size in other)
        low = 0.3 if op == "Pow" else -2.0
        feeds = {"x": numbers(one, 0, low), "z": numbers(other, 5, 0.3)}
        check(f"g (double[{sizes}] x, double[{shape}] z) => (double[a, b, c] y) {{ y = {op}(x, z) }}", feeds)
        if op not in ("Pow", "PRelu"):
            feeds = {"x": numbers(other, 0), "z": numbers(one, 5, 0.3)}
            check(f"g (double[{shape}] x, double[{sizes}] z) => (double[a, b, c] y) {{ y = {op}(x, z) }}", feeds)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_sums_over_whatever_was_repeated(data):
    """Sizes of 1 and missing axes on either side, known, named or unknown."""
    whole = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    shapes, texts = [], []
    for _ in range(2):
        ahead = data.draw(st.integers(0, len(whole)))
        shapes.append([data.draw(st.sampled_from([1, size])) for size in whole[ahead:]])
        dims = [data.draw(st.sampled_from([str(size), f"s{size}", "?"])) for size in shapes[-1]]
        texts.append(", ".join(dims))
    feeds = {"x": numbers(shapes[0]), "z": numbers(shapes[1], 3)}
    rank = max(map(len, shapes))
    out = ", ".join("?" for _ in range(rank))
    check(f"g (double[{texts[0]}] x, double[{texts[1]}] z) => (double[{out}] y) {{ y = Mul(x, z) }}", feeds)


def test_means_of_values_and_one_value_read_twice():
    text = "g (double[2, 3] x, double[3] z) => (double[2, 3] y) { y = Mean(x, z, x) }"
    check(text, {"x": numbers((2, 3)), "z": numbers(3, 1)})


def test_whole_number_exponents_and_squares():
    for exponent in ("double {2.0}", "double {3.0}", "int64 {2}", "int64 {3}"):
        text = f"g (double[5] x) => (double[5] y) {{ e = Constant <value = {exponent}> ()  y = Pow(x, e) }}"
        check(text, {"x": numbers(5)}, double="int64" not in exponent)


def test_a_choice_goes_to_what_was_chosen():
    text = "g (bool[3, 1] c, double[3, 4] x, double[4] z) => (double[3, 4] y) { y = Where(c, x, z) }"
    check(text, {"c": np.array([[True], [False], [True]]), "x": numbers((3, 4)), "z": numbers(4, 1)})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 2, 3, 4), (2, 2, 4, 5)), ((2, 1, 3, 4), (2, 4, 5)), ((4,), (4, 5)),
        ((3, 4), (4,)), ((4,), (4,)), ((4,), (2, 4, 3)), ((2, 3, 4), (4,)), ((3, 4), (2, 4, 5)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
def test_products_of_matrices(one, other, known):
    told = [", ".join(str(size) if known else "?" for size in shape) for shape in (one, other)]
    rank = np.ndim(np.ones(one) @ np.ones(other))
    out = f"double[{', '.join('?' * rank)}] y"
    text = f"g (double[{told[0]}] x, double[{told[1]}] w) => ({out}) {{ y = MatMul(x, w) }}"
    check(text, {"x": numbers(one), "w": numbers(other, 1)})


@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("bias", [(5,), (3, 1), (), None])
def test_products_of_matrices_with_a_bias(turned, bias):
    x = numbers((4, 3) if turned[0] else (3, 4))
    w = numbers((5, 4) if turned[1] else (4, 5), 1)
    feeds = {"x": x, "w": w} | ({} if bias is None else {"b": numbers(bias, 2)})
    ends = ", ".join(f"double[{', '.join(map(str, value.shape))}] {name}" for name, value in feeds.items())
    how = f"<alpha = 0.5, beta = 2.0, transA = {turned[0]}, transB = {turned[1]}>"
    check(f"g ({ends}) => (double[3, 5] y) {{ y = Gemm {how} ({', '.join(feeds)}) }}", feeds)


def test_sums_of_products_by_their_indices():
    text = 'g (double[2, 3] x, double[3, 4, 2] z) => (double[4, 2] y) { y = Einsum <equation = "ij,jki->ki"> (x, z) }'
    check(text, {"x": numbers((2, 3)), "z": numbers((3, 4, 2), 1)})


REDUCE = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceSum",
    "ReduceSumSquare",
]


@pytest.mark.parametrize("op", REDUCE)
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions(op, keep):
    for axes in ("{-1}", "{0, 2}", None):
        told = "" if axes is None else f"a = Constant <value = int64[{axes.count(',') + 1}] {axes}> ()"
        text = f"""g (double[2, 3, 4] x) => (double[] y) {{ {told}
            y = {op} <keepdims = {keep}> (x{"" if axes is None else ", a"}) }}"""
        check(text, {"x": numbers((2, 3, 4))})


def test_reductions_whose_axes_are_attributes():
    text = "g (double[2, 3, 4] x) => (double[2, 4] y) { y = ReduceMean <axes = [1], keepdims = 0> (x) }"
    check(text, {"x": numbers((2, 3, 4))}, opset=17)


def test_running_sums():
    for how in ("exclusive = 1", "reverse = 1"):
        body = f"a = Constant <value = int64 {{1}}> ()  y = CumSum <{how}> (x, a)"
        check(f"g (double[3, 4] x) => (double[3, 4] y) {{ {body} }}", {"x": numbers((3, 4))})


@pytest.mark.parametrize("axis", [-1, 1, -2])
def test_normalization_of_layers(axis):
    shape = (3, 4) if axis != -1 else (4,)
    sizes = ", ".join(map(str, shape))
    feeds = {"x": numbers((2, 3, 4)), "s": numbers(shape, 1), "b": numbers(shape, 2)}
    for opset, op, names in (
        (20, "LayerNormalization", "xsb"),
        (20, "LayerNormalization", "xs"),
        (23, "RMSNormalization", "xs"),
    ):
        ends = f"double[2, 3, 4] x, double[{sizes}] s" + (f", double[{sizes}] b" if "b" in names else "")
        how = f"<axis = {axis}, epsilon = 0.01>"
        text = f"g ({ends}) => (double[2, 3, 4] y) {{ y = {op} {how} ({', '.join(names)}) }}"
        check(text, {name: feeds[name] for name in names}, opset=opset)


def test_normalization_of_channels():
    feeds = {"x": numbers((2, 3, 4, 2))} | {name: numbers(3, i, 0.3) for i, name in enumerate("sbmv")}
    text = """g (double[2, 3, 4, 2] x, double[3] s, double[3] b, double[3] m, double[3] v) => (double[2, 3, 4, 2] y) {
        y = BatchNormalization <epsilon = 0.01> (x, s, b, m, v) }"""
    check(text, feeds)


LAYOUTS = [
    "t = Constant <value = int64[2] {6, -1}> ()  y = Reshape(x, t)",
    "y = Transpose <perm = [2, 0, 1]> (x)",
    "t = Constant <value = int64[1] {1}> ()  h = Unsqueeze(x, t)  y = Squeeze(h, t)",
    "y = Flatten <axis = 2> (x)",
    "h = Neg(x)  y = Concat <axis = -1> (x, h, x)",
    "a, b = Split <axis = -1, num_outputs = 2> (x)  y = Mul(a, b)",
    "a, b = Split <axis = -1, num_outputs = 2> (x)  y = Neg(b)",
    "a = Constant <value = int64[1] {1}> ()  b = Constant <value = int64[1] {9}> ()  y = Slice(x, a, b)",
    """a = Constant <value = int64[2] {-1, -3}> ()  b = Constant <value = int64[2] {-9, -1}> ()
        c = Constant <value = int64[2] {2, 1}> ()  d = Constant <value = int64[2] {-2, 1}> ()
        y = Slice(x, a, b, c, d)""",
    """a = Constant <value = int64[2] {1, -3}> ()  b = Constant <value = int64[2] {3, -1}> ()
        c = Constant <value = int64[2] {-2, 2}> ()  y = Slice(x, a, b, c)""",
    "i = Constant <value = int64[2, 2] {0, 1, -1, 1}> ()  y = Gather(x, i)",
    "i = Constant <value = int64[2, 2] {0, 2, 2, -1}> ()  y = Gather <axis = 1> (x, i)",
    "i = Constant <value = int64[2, 1, 4] {0, 2, 2, 1, 1, 0, 2, 2}> ()  y = GatherElements <axis = 1> (x, i)",
    "i = Constant <value = int64[2, 2] {0, 2, 1, 1}> ()  y = GatherND(x, i)",
    "t = Constant <value = int64[4] {2, 2, 3, 4}> ()  y = Expand(x, t)",
    "t = Constant <value = int64[3] {2, 1, 2}> ()  y = Tile(x, t)",
    "t = Constant <value = int64[6] {0, 1, 2, 0, -1, 1}> ()  y = Pad(x, t)",
    't = Constant <value = int64[6] {0, 1, 2, 0, 1, 0}> ()  y = Pad <mode = "reflect"> (x, t)',
    "y = Trilu <upper = 0> (x)",
    "c = Constant <value = bool[3] {1, 0, 1}> ()  y = Compress <axis = 1> (x, c)",
    "a = Constant <value = int64[4] {1, 2, 3, 4}> ()  h = Reshape(x, a)  y = DepthToSpace <blocksize = 1> (h)",
    "a = Constant <value = int64[4] {1, 3, 2, 4}> ()  h = Reshape(x, a)  y = SpaceToDepth <blocksize = 2> (h)",
    "a = Constant <value = int64[4] {1, 4, 2, 3}> ()  h = Reshape(x, a)  y = DepthToSpace <blocksize = 2> (h)",
]  # fmt: skip


@pytest.mark.parametrize("body", LAYOUTS)
@pytest.mark.parametrize("sizes", ["2, 3, 4", "a, b, c"])
def test_elements_go_back_to_where_they_came_from(body, sizes):
    text = f"g (double[{sizes}] x) => (double[] y) {{ {body} }}"
    check(
        text,
        {"x": numbers((2, 3, 4))},
        engine="onnxruntime" if "Pad" in body else "reference",
        double="GatherND" not in body,
    )


def walks(kernel, strides=(1, 1), dilations=(1, 1), pads=(0, 0, 0, 0), group=1):
    lists = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads}
    return ", ".join(f"{name} = [{', '.join(map(str, value))}]" for name, value in lists.items()) + f", group = {group}"


CONVS = [
    ((1, 2, 4, 5), (3, 2, 1, 1), {}),
    ((2, 2, 5, 4), (3, 2, 3, 3), {"pads": (1, 1, 1, 1)}),
    ((2, 2, 6, 5), (3, 2, 3, 2), {"strides": (2, 3), "pads": (1, 0, 0, 1)}),
    ((1, 2, 7, 6), (2, 2, 2, 2), {"dilations": (2, 3), "strides": (2, 1)}),
    ((1, 4, 5, 5), (4, 1, 3, 3), {"group": 4, "pads": (1, 1, 1, 1), "strides": (2, 2)}),
    ((2, 4, 4, 4), (6, 2, 2, 2), {"group": 2, "dilations": (1, 2), "pads": (0, 1, 2, 0)}),
]


@pytest.mark.parametrize(("x", "w", "how"), CONVS)
@pytest.mark.parametrize("known", [True, False])
def test_convolutions(x, w, how, known):
    sizes = ", ".join(map(str, x)) if known else "n, c, h, w"
    text = f"""g (double[{sizes}] x, double[{", ".join(map(str, w))}] w, double[{w[0]}] b) => (double[n, m, i, j] y) {{
        y = Conv <{walks(w[2:], **how)}> (x, w, b) }}"""
    check(text, {"x": numbers(x), "w": numbers(w, 1), "b": numbers(w[0], 2)}, double=False)


@pytest.mark.parametrize("padding", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_convolutions_of_one_axis_with_padding_by_name(padding):
    text = f"""g (double[2, 2, 7] x, double[3, 2, 4] w) => (double[n, m, i] y) {{
        y = Conv <auto_pad = "{padding}", strides = [2]> (x, w) }}"""
    check(text, {"x": numbers((2, 2, 7)), "w": numbers((3, 2, 4), 1)}, double=False)


POOLS = [
    "y = GlobalAveragePool(x)",
    "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)",
    "y = AveragePool <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1]> (x)",
    "y = AveragePool <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1], count_include_pad = 1> (x)",
    "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)",
    "y = MaxPool <kernel_shape = [2, 2], ceil_mode = 1, strides = [2, 2]> (x)",
]


@pytest.mark.parametrize("body", POOLS)
def test_pools(body):
    for sizes in ("2, 2, 4, 4", "n, c, h, w"):
        text = f"g (double[{sizes}] x) => (double[n, c, i, j] y) {{ {body} }}"
        check(text, {"x": numbers((2, 2, 4, 4))}, double=False)


def attention(how, sizes, mask=None):
    """Text and feeds of one attention over ``sizes`` of q, k and v."""
    feeds = {name: numbers(shape, i) for i, (name, shape) in enumerate(zip("qkv", sizes, strict=True))}
    ends = [f"double[{', '.join(map(str, value.shape))}] {name}" for name, value in feeds.items()]
    if mask is not None:
        feeds["m"] = mask
        ends.append(f"{'bool' if mask.dtype == bool else 'double'}[{', '.join(map(str, mask.shape))}] m")
    return f"g ({', '.join(ends)}) => (double[] y) {{ y = Attention <{how}> ({', '.join(feeds)}) }}", feeds


SEEN = np.array([[[[True, False, True, True, False]]], [[[True, True, False, False, False]]]])
ATTENTIONS = [
    ("scale = 0.3", [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3)], None),
    ("is_causal = 1", [(2, 2, 5, 4)] * 3, None),
    ("scale = 0.4", [(2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)], numbers((2, 1, 3, 5), 8)),
    ("scale = 0.4", [(2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)], np.broadcast_to(SEEN, (2, 1, 3, 5))),
    ("q_num_heads = 4, kv_num_heads = 2", [(2, 3, 8), (2, 5, 4), (2, 5, 6)], numbers((3, 5), 8)),
]


@pytest.mark.parametrize(("how", "sizes", "mask"), ATTENTIONS)
def test_attention(how, sizes, mask):
    check(*attention(how, sizes, mask), opset=23)


def test_rows_of_attention_that_see_nothing_have_no_slope():
    mask = np.array([[True, False, True], [False, False, False]])
    text, feeds = attention("scale = 0.5", [(1, 1, 2, 4), (1, 1, 3, 4), (1, 1, 3, 4)], mask)
    found = differentiate(model_from(text.replace("double", "float"), opset=23), list("qkv"))
    told = {n: v.astype("f") if v.dtype == np.float64 else v for n, v in feeds.items()}
    dq, dk, dv = session(found).run(list(map(gradient, "qkv")), told | {cotangent("y"): np.ones((1, 1, 2, 4), "f")})
    assert all(np.isfinite(found).all() for found in (dq, dk, dv))
    assert dq[0, 0, 0].any()
    assert not dq[0, 0, 1].any()
    assert not dv[0, 0, 1].any()


def test_a_value_that_is_read_often_gets_the_sum():
    text = """g (double[2, 3] x) => (double[2, 3] y, double[2] z) { a = Tanh(x)  b = Mul(a, x)  y = Add(b, a)
        i = Constant <value = int64[1] {1}> ()  z = ReduceSum <keepdims = 0> (b, i) }"""
    check(text, {"x": numbers((2, 3))})


def test_attention_with_capped_scores_is_refused():
    text, _ = attention("softcap = 3.0", [(1, 1, 2, 4)] * 3)
    with pytest.raises(UsageError, match="its scores are capped"):
        differentiate(model_from(text, opset=23), ["q"])


def test_every_rule_is_tried_here():
    text = "".join(path.read_text() for path in (Path(__file__), Path(__file__).with_name("test_backward.py")))
    assert [name for name in RULES if not re.search(rf"\b{name}\b", text)] == []
