"""Residual blocks and layers: where they are, what removes them, and what keeps them in."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from channel_models import build, random
from helpers import session
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.exporter.load import load_model
from qexport.passes.cleanup import Cleanup
from qexport.passes.match import array, dims
from qexport.passes.numbers.extreme import EXTREME_KEY
from qexport.passes.pruning.blocks import CACHE, INNER, READ, SIZED, find_blocks, find_layers, remove
from qexport.passes.pruning.labels import Blocked

LN = "LayerNormalization<axis=-1>"
SPELLED = "{0}m = ReduceMean<keepdims=1>({1}, last) {0}d = Sub({1}, {0}m) {0}s = Mul({0}d, {0}d) "
SPELLED += "{0}v = ReduceMean<keepdims=1>({0}s, last) {0}e = Add({0}v, tiny) {0}r = Sqrt({0}e) {0}q = Div({0}d, {0}r) "
SPELLED += "{0}g = Mul({0}q, gamma) {0} = Add({0}g, beta) "
ATTEND = "{0}k = MatMul({1}, wk) {0}kt = Transpose<perm=[0,2,1]>({0}k) {0}z = MatMul({1}, {0}kt) "
ATTEND += "{0}p = Softmax({0}z) {0}c = MatMul({0}p, {1}) {0} = MatMul({0}c, wo) "
FEED = '{0}u = MatMul({1}, w1) {0}t = Gelu<approximate="tanh">({0}u) {0} = MatMul({0}t, w2) '
SHAPES = {"w1": "8x6", "w2": "6x8", "wk": "8x8", "wo": "8x8", "gamma": "8", "beta": "8"}
WIDE = {name: random(shape) for name, shape in SHAPES.items()} | {"tiny": np.float32(1e-5)}
WIDE |= {"last": np.array([-1]), "outputs": "float[b, s, 8] out"}
PRE = f"n = {LN}(a, gamma, beta) " + FEED.format("f", "n") + "h = Add(a, f) out = MatMul(h, wo)"
POST = f"x = {LN}(a, gamma, beta) " + FEED.format("f", "x") + f"h = Add(f, x) y = {LN}(h, gamma, beta) out = Relu(y)"
SMALL_POST = SPELLED.format("x", "a") + FEED.format("f", "x") + "h = Add(x, f) " + SPELLED.format("y", "h")
RELU = "x = Relu(a) c = {0}(x, k1) d = Relu(c) e = {0}(d, k2) h = Add(e, x) y = Relu(h) out = {0}(y, k1)"
RELU = RELU.format("Conv<kernel_shape=[3,3], pads=[1,1,1,1]>")
IMAGE = {"k1": "4x4x3x3", "k2": "4x4x3x3", "inputs": "float[b, 4, 5, 5] a", "outputs": "float[b, 4, 5, 5] out"}


def decoder(body="", outputs="float[b, s, 8] out"):
    """Two layers of attention and feed-forward, normalized in front."""
    text, at = "", "a"
    for i in (1, 2):
        text += f"n{i} = {LN}({at}, gamma, beta) " + ATTEND.format(f"t{i}", f"n{i}") + f"h{i} = Add({at}, t{i}) "
        text += f"o{i} = {LN}(h{i}, gamma, beta) " + FEED.format(f"f{i}", f"o{i}") + f"g{i} = Add(f{i}, h{i}) "
        at = f"g{i}"
    return build(text + body + "out = Relu(g2)", **WIDE | {"outputs": outputs})


def run(model, seed=0, shape=(2, 3, 8)):
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    feed = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return session(model).run(None, {model.graph.inputs[0].name: feed})


def same(model, other, **told):
    return all(np.allclose(a, b, atol=1e-5) for a, b in zip(run(model, **told), run(other, **told), strict=True))


def ops(model):
    return [node.op_type for node in model.graph]


def names(blocks):
    return [(block.name, block.entry.name, block.exit.name, block.refusal) for block in blocks]


@pytest.mark.parametrize(
    ("body", "expected", "left"),
    [
        (PRE, ("Add/h", "a", "h", None), "out = MatMul(a, wo)"),
        (PRE.replace("h = Add(a, f)", "i = Identity(a) s = Mul(f, tiny) r = Dropout(s) h = Add(r, i)"),
         ("Add/h", "a", "h", None), "out = MatMul(a, wo)"),
        (POST, ("Add/h", "x", "y", None), f"x = {LN}(a, gamma, beta) out = Relu(x)"),
        (SMALL_POST + "out = Relu(y)", ("Add/h", "x", "y", None), SPELLED.format("x", "a") + "out = Relu(x)"),
        (FEED.format("f", "a") + ATTEND.format("t", "a") + "h0 = Add(t, f) h = Add(h0, a) out = Relu(h)",
         ("Add/h", "a", "h", None), "out = Relu(a)"),
        (f"x = {LN}(a, gamma, beta) " + FEED.format("f", "x")
         + f"h = Add(x, f) n = {LN}(h, gamma, beta) out = Add(n, h)",
         ("Add/h", "x", "h", None), f"x = {LN}(a, gamma, beta) n = {LN}(x, gamma, beta) out = Add(n, x)"),
    ],
    ids=["pre-norm", "scaled branch", "post-norm", "post-norm in small operators", "parallel", "norm not only behind"],
)  # fmt: skip
def test_a_block_is_found_and_leaves_nothing_behind(body, expected, left):
    model, reference = build(body, **WIDE), build(left, **WIDE)
    (block,) = find_blocks(model)
    assert names([block]) == [expected]
    remove(block)
    used = {value.name for node in reference.graph for value in node.inputs}
    assert ops(model) == ops(reference)
    assert set(model.graph.initializers) & {"w1", "w2"} == set()
    assert used <= {*model.graph.initializers, *(v.name for n in model.graph for v in n.outputs), "a"}
    assert same(model, reference)
    assert find_blocks(model) == ()


def test_a_block_of_convolutions_behind_a_relu_is_found():
    model = build(RELU, **IMAGE)
    (block,) = find_blocks(model)
    assert (names([block]), block.axis) == ([("Add/h", "x", "y", None)], 1)
    remove(block)
    assert ops(model) == ["Relu", "Conv"]
    assert "k2" not in model.graph.initializers
    run(model, shape=(2, 4, 5, 5))


@pytest.mark.parametrize(
    "body",
    [
        "u = MatMul(a, w1) p = Mul(u, u) q = Mul(p, u) r = Add(u, q) out = MatMul(r, w2)",  # a part of a Gelu
        "u = MatMul(a, wk) v = MatMul(a, wo) out = Add(u, v)",  # a shortcut that is a product
        "u = MatMul(a, wk) out = Add(u, beta)",  # a bias
    ],
)
def test_other_sums_are_no_blocks(body):
    assert find_blocks(build(body, **WIDE)) == ()


def test_a_sum_that_is_wider_than_its_entry_is_no_block():
    model = build("u = MatMul(a, w) h = Add(a, u) out = Relu(h)", inputs="float[b, s, 1] a", w="1x8")
    assert find_blocks(model) == ()


def test_a_row_of_blocks_goes_before_the_one_around_it_and_one_around_a_single_goes_before_that():
    row = FEED.format("f", "a") + "g = Add(f, a) " + FEED.format("e", "g") + "h = Add(e, g) i = MatMul(h, wo) "
    assert [b.name for b in find_blocks(build(row + "out = Add(i, a)", **WIDE))] == ["Add/g", "Add/h"]
    single = f"n = {LN}(a, gamma, beta) c = MatMul(n, wk) " + FEED.format("f", "c") + "g = Add(f, c) "
    assert [b.name for b in find_blocks(build(single + "out = Add(g, a)", **WIDE))] == ["Add/out"]


def test_layers_begin_with_an_attention_and_are_removed_whole():
    model = decoder()
    assert [b.name for b in find_blocks(model)] == ["Add/h1", "Add/g1", "Add/h2", "Add/g2"]
    first, second = find_layers(model)
    assert names([first, second]) == [("Add/g1", "a", "g1", None), ("Add/g2", "g1", "g2", None)]
    remove(first)
    (left,) = find_layers(model)
    assert names([left]) == [("Add/g2", "a", "g2", None)]
    remove(left)
    assert ops(model) == ["Relu"]
    assert not model.graph.initializers.keys() & {"w1", "w2", "wk", "wo"}


def test_without_attention_every_block_is_a_layer():
    text = FEED.format("f", "a") + "g = Add(f, a) " + FEED.format("e", "g") + "h = Add(e, g) out = Relu(h)"
    assert [b.name for b in find_layers(build(text, **WIDE))] == ["Add/g", "Add/h"]


@pytest.mark.parametrize(
    ("body", "output", "reason"),
    [
        ("", "float[b, s, 8] t1k", CACHE),
        ("kept = Unsqueeze(t1k, last) ", "float[b, s, 8, 1] kept", CACHE),
        ("", "float[b, s, s] t1p", INNER),
    ],
)
def test_a_block_with_an_output_inside_stays(body, output, reason):
    model = decoder(body, f"float[b, s, 8] out, {output}")
    before = ir.to_proto(model).SerializeToString()
    first, second = find_layers(model)
    assert (first.refusal, second.refusal) == (reason, None)
    assert [b.refusal for b in find_blocks(model)] == [reason, None, None, None]
    with pytest.raises(Blocked, match=reason):
        remove(first)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_cache_of_a_fused_attention_stays():
    fused = "n = LayerNormalization<axis=-1>(a, gamma, beta) t, k, v = Attention<q_num_heads=2, kv_num_heads=2>"
    model = build(
        fused + "(n, n, n, , past, past) o = MatMul(t, wo) h = Add(a, o) out = Relu(h)",
        **WIDE
        | {"inputs": "float[b, s, 8] a, float[b, 2, p, 4] past", "outputs": "float[b,s,8] out, float[b,2,q,4] k"},
    )
    assert [b.refusal for b in find_blocks(model)] == [CACHE]


def test_a_block_whose_inside_is_read_elsewhere_stays():
    model = build(PRE.replace("out = MatMul(h, wo)", "o = MatMul(h, wo) out = Mul(o, n)"), **WIDE)
    assert [b.refusal for b in find_blocks(model)] == [READ]


def test_readers_outside_that_compute_for_nobody_go_with_the_block():
    model = build(PRE + " nobody = Relu(fu) none = Neg(nobody)", **WIDE)
    (block,) = find_blocks(model)
    assert block.refusal is None
    remove(block)
    assert ops(model) == ["MatMul"]


def test_who_wants_the_size_of_an_inner_value_gets_it_from_the_entry():
    sized = "sh = Shape(f) z = ConstantOfShape(sh) o = MatMul(h, wo) out = Add(o, z)"
    model = build(PRE.replace("out = MatMul(h, wo)", sized), **WIDE)
    (block,) = find_blocks(model)
    remove(block)
    assert ops(model) == ["Shape", "ConstantOfShape", "MatMul", "Add"]
    assert same(model, build("out = MatMul(a, wo)", **WIDE))
    narrow = PRE.replace("out = MatMul(h, wo)", sized.replace("Shape(f)", "Shape(fu)").replace("Add(o, z)", "Relu(z)"))
    (block,) = find_blocks(build(narrow, **WIDE | {"outputs": "float[b, s, n] out"}))
    assert block.refusal == SIZED


def test_an_output_keeps_its_name_whatever_made_the_entry():
    model = build(POST.replace("out = Relu(y)", "").replace("y =", "out ="), **WIDE)
    remove(find_blocks(model)[0])
    assert [value.name for value in model.graph.outputs] == ["out"]
    assert same(model, build(f"out = {LN}(a, gamma, beta)", **WIDE))
    alone = build(FEED.format("f", "a") + "out = Add(f, a)", **WIDE)
    remove(find_blocks(alone)[0])
    assert ops(alone) == ["Identity"]
    assert same(alone, build("out = Identity(a)", **WIDE))
    both = decoder(outputs="float[b, s, 8] g1, float[b, s, 8] g2, float[b, s, 8] out")
    remove(find_layers(both)[1])
    first, second, _ = run(both)
    assert np.array_equal(first, second)


def test_what_was_measured_behind_a_block_is_void():
    model = decoder()
    for node in model.graph:
        node.outputs[0].meta[EXTREME_KEY] = 1.0
    remove(find_layers(model)[1])
    noted = [node.outputs[0].name for node in model.graph if EXTREME_KEY in node.outputs[0].meta]
    assert "g1" in noted
    assert "out" not in noted


def test_branches_read_what_they_capture():
    text = FEED.format("f", "a") + "h = Add(f, a) out = If(c) <then_branch = t () => (float[b, s, 8] p) "
    text += "{ p = Relu(WHAT) }, else_branch = e () => (float[b, s, 8] q) { q = Neg(h) }>"
    told = WIDE | {"inputs": "float[b, s, 8] a, bool c"}
    (block,) = find_blocks(build(text.replace("WHAT", "f"), **told))
    assert block.refusal == READ
    model = build(text.replace("WHAT", "h"), **told)
    remove(find_blocks(model)[0])
    assert ops(model) == ["If"]
    feed = {"a": -np.ones((1, 2, 8), np.float32), "c": np.array(False)}
    assert session(model).run(None, feed)[0].min() == 1


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from("af"), min_size=1, max_size=4),
    post=st.booleans(),
    spelled=st.booleans(),
    which=st.integers(0, 3),
    silent=st.booleans(),
)
def test_outputs_keep_their_shapes_and_their_numbers_where_the_branch_was_zero(kinds, post, spelled, which, silent):
    def norm(out, x):
        return SPELLED.format(out, x) if spelled else f"{out} = {LN}({x}, gamma, beta) "

    text, at, weights = (norm("x", "a"), "x", {}) if post else ("x = MatMul(a, wx) ", "x", {"wx": "8x8"})
    for i, kind in enumerate(kinds):
        branch = (ATTEND if kind == "a" else FEED).format(f"b{i}", at if post else f"n{i}")
        weights |= {f"wo{i}": "8x8", f"w2{i}": "6x8"}
        branch = branch.replace("wo)", f"wo{i})").replace("w2)", f"w2{i})")
        text += ("" if post else norm(f"n{i}", at)) + branch + f"h{i} = Add({at}, b{i}) "
        text += norm(f"y{i}", f"h{i}") if post else ""
        at = f"y{i}" if post else f"h{i}"
    model = build(text + f"out = Tanh({at})", **WIDE | weights)
    blocks = find_blocks(model)
    assert len(blocks) == len(kinds)
    block = blocks[which % len(kinds)]
    if silent:
        name = f"{'wo' if block.attends else 'w2'}{which % len(kinds)}"
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.zeros_like(array(value)), name=name)
    before, shapes = run(model)[0], [dims(value) for value in model.graph.outputs]
    remove(block)
    after = run(model)[0]
    assert (after.shape, [dims(value) for value in model.graph.outputs]) == (before.shape, shapes)
    assert len(find_blocks(model)) == len(kinds) - 1
    if silent and not post:
        assert np.allclose(before, after, atol=1e-5)


def test_minilm_has_six_layers_of_two_blocks(minilm):
    model = Cleanup()(load_model(minilm)).model
    blocks, layers = find_blocks(model), find_layers(model)
    assert [len(blocks), len(layers)] == [12, 6]
    assert [b.refusal for b in (*blocks, *layers)] == [None] * 18
    assert [b.attends for b in blocks] == [True, False] * 6
    assert all(layer.is_private for layer in layers)


def test_a_decoder_has_five_layers_and_runs_with_two(samples):
    model = Cleanup()(load_model(samples / "decoder/stories260k")).model
    assert [b.refusal for b in find_blocks(model)] == [None] * 10
    for index in (3, 0, 1):
        remove(find_layers(model)[index])
    assert len(find_layers(model)) == 2
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    tokens = np.arange(14).reshape(2, 7) + 5
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    (logits,) = session(model).run(None, feeds)
    assert logits.shape[:2] == (2, 7)


def test_a_residual_network_has_seven_blocks_without_a_projection(samples):
    model = Cleanup(slim=True)(load_model(samples / "resnet20/resnet20.onnx")).model
    layers = find_layers(model)
    assert [block.name.split("/")[-2] for block in layers] == [
        "layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2",
    ]  # fmt: skip
    assert [(b.refusal, b.axis) for b in layers] == [(None, 1)] * 7
    for _ in range(7):
        remove(find_layers(model)[0])
    assert ops(model).count("Conv") == 5
    run(model, shape=(2, 3, 32, 32))
