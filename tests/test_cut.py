"""What is removed together: the smaller model computes what the old one does without the units."""

import numpy as np
import onnx_ir as ir
import pytest
from channel_models import build, value_named
from cut_models import MODELS, bytes_of, check, copy_of, make, outputs_of, reorder, silence
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qexport.passes.folding.axes import channel_ids
from qexport.passes.match import array
from qexport.passes.numbers.notes import KERNEL_KEY
from qexport.passes.numbers.range import RANGE_KEY
from qexport.passes.pruning.cut import Blocked, Cut, find_cut
from qexport.passes.pruning.spaces import find_spaces


def space_of(model, kind):
    (found,) = [space for space in find_spaces(model, kind) if not isinstance(space.cut, str)]
    return found


def cut_of(model, name="x", axis=-1):
    value = value_named(model, name)
    found = find_cut(value, channel_ids(len(value.shape), axis, value.shape[axis]), value.shape[axis])
    assert isinstance(found, Cut), found
    return found


def keeps(count):
    return st.lists(st.booleans(), min_size=count, max_size=count).filter(any)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_units_that_nobody_reads_can_go_without_a_change(name, data):
    kind, count, *_ = MODELS[name]
    keep = np.array(data.draw(keeps(count)))
    model = make(name)
    cut = space_of(model, kind).cut
    assert cut.count == count
    assume(name != "padded_shortcut" or keep[2:5].any())  # something must be left to pad
    shapes = [value.shape for value in model.graph.outputs]
    size = sum(value.const_value.size for value in model.graph.initializers.values() if value.dtype.is_floating_point())
    gone = int(cut.parameters()[~keep].sum())
    silence(cut, keep)
    before = outputs_of(model)
    cut.apply(keep)
    check(model)
    for old, new in zip(before, outputs_of(model), strict=True):
        assert np.linalg.norm(old - new) <= 1e-5 * np.linalg.norm(old)
    assert [value.shape for value in model.graph.outputs] == shapes
    left = sum(value.const_value.size for value in model.graph.initializers.values() if value.dtype.is_floating_point())
    both = len({(slot.node, slot.index) for slot in cut.slots}) < len(cut.slots)
    assert left == size - gone or (both and left > size - gone)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_the_order_of_units_does_not_matter(name, data):
    kind, count, *_ = MODELS[name]
    if name == "padded_shortcut":
        pytest.skip("what a Pad adds cannot change places with channels")
    model = make(name)
    before = outputs_of(model)
    reorder(space_of(model, kind).cut, data.draw(st.permutations(range(count))))
    for old, new in zip(before, outputs_of(model), strict=True):
        assert np.linalg.norm(old - new) <= 1e-5 * np.linalg.norm(old)


@pytest.mark.parametrize("name", MODELS)
def test_to_keep_all_units_changes_nothing(name):
    kind, count, *_ = MODELS[name]
    model = make(name)
    before = bytes_of(model)
    space_of(model, kind).cut.apply(np.ones(count, bool))
    assert bytes_of(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_refusals_come_before_any_edit(name):
    kind, count, *_ = MODELS[name]
    model = make(name)
    before = bytes_of(model)
    cut = space_of(model, kind).cut
    for keep in (np.zeros(count, bool), np.ones(count + 1, bool)):
        with pytest.raises(Blocked):
            cut.apply(keep)
        assert bytes_of(model) == before


@pytest.mark.parametrize("name", ["mha", "gated", "residual_group", "sizes_read_at_run_time"])
def test_two_cuts_make_the_same_as_one(name):
    kind, count, *_ = MODELS[name]
    once, twice = make(name), make(name)
    twice = copy_of(once)
    first = np.arange(count) != 1
    both = first & (np.arange(count) != count - 1)
    space_of(once, kind).cut.apply(both)
    space_of(twice, kind).cut.apply(first)
    space_of(twice, kind).cut.apply(both[first])
    for old, new in zip(outputs_of(once), outputs_of(twice), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_cut_that_was_made_cannot_be_made_again():
    model = make("mlp")
    cut = space_of(model, "neurons").cut
    cut.apply(np.arange(6) > 0)
    assert cut.refusal(np.arange(6) > 0) == "the model was changed since"


def test_constants_that_others_read_are_copied():
    body = "y = MatMul(a, w) x = Relu(y) o = MatMul(x, w) p = MatMul(a, w) q = Add(o, c) r = Add(p, c) out = Add(q, r)"
    model = build(body, w="8x8", c="8", outputs="float[b, s, 8] out")
    whole = array(model.graph.initializers["w"])
    cut = cut_of(model)
    keep = np.arange(8) % 2 == 0
    cut.apply(keep)
    check(model)
    shapes = sorted(tuple(v.shape) for v in model.graph.initializers.values())
    assert shapes == [(4, 8), (8,), (8, 4), (8, 8)]
    np.testing.assert_array_equal(array(value_named(model, "y").producer().inputs[1]), whole[:, keep])
    np.testing.assert_array_equal(array(value_named(model, "o").producer().inputs[1]), whole[keep])


def test_shapes_that_others_read_are_copied():
    body = (
        "y = MatMul(a, w) x = Reshape(y, s) t = Transpose<perm=[0,2,1,3]>(x) u = Transpose<perm=[0,2,1,3]>(t) "
        "m = Reshape(u, back) o = MatMul(m, v) r = Reshape(a, s) e = Reshape(r, back) out = Add(o, e)"
    )
    model = build(body, w="8x8", v="8x8", s=[0, 0, 4, 2], back=[0, 0, 8], outputs="float[b, s, 8] out")
    cut = cut_of(model, "t", 1)
    silence(cut, np.arange(4) != 2)
    before = outputs_of(model)
    cut.apply(np.arange(4) != 2)
    check(model)
    assert array(value_named(model, "r").producer().inputs[1]).tolist() == [0, 0, 4, 2]
    assert array(value_named(model, "x").producer().inputs[1]).tolist() == [0, 0, 3, 2]
    np.testing.assert_allclose(before[0], outputs_of(model)[0], rtol=1e-5)


def test_a_shape_that_is_joined_at_run_time_is_copied_too():
    body = (
        "sh = Shape<end=2>(a) s = Concat<axis=0>(sh, four) y = MatMul(a, w) x = Reshape(y, s) m = Reshape(x, back) "
        "o = MatMul(m, v) r = Reshape(a, s) e = Reshape(r, back) out = Add(o, e)"
    )
    model = build(body, w="8x8", v="8x8", four=[4, 2], back=[0, 0, -1], outputs="float[b, s, 8] out")
    model.graph.initializers["w"].name = "w"
    value = value_named(model, "x")
    value.shape, value.type = ir.Shape(["b", "s", 4, 2]), ir.TensorType(ir.DataType.FLOAT)
    value_named(model, "m").shape = ir.Shape(["b", "s", 8])
    value_named(model, "m").type = ir.TensorType(ir.DataType.FLOAT)
    cut = cut_of(model, "x", 2)
    silence(cut, np.arange(4) != 2)
    before = outputs_of(model)
    cut.apply(np.arange(4) != 2)
    np.testing.assert_allclose(before[0], outputs_of(model)[0], rtol=1e-5)


def test_an_expand_to_a_computed_shape_is_cut_where_its_number_is_stored():
    body = (
        "y = MatMul(a, w) z = Unsqueeze(y, two) sh = Shape<end=2>(a) s = Concat<axis=0>(sh, ones, six) "
        "x = Expand(z, s) out = MatMul(x, v)"
    )
    extra = {"two": [2], "ones": [3], "six": [6], "w": "8x6", "v": "6x4"}
    model = build(body, outputs="float[b, s, 3, 4] out", **extra)
    value_named(model, "x").shape = ir.Shape(["b", "s", 3, 6])
    value_named(model, "x").type = ir.TensorType(ir.DataType.FLOAT)
    cut = cut_of(model, "y")
    silence(cut, np.arange(6) != 2)
    before = outputs_of(model)
    cut.apply(np.arange(6) != 2)
    np.testing.assert_allclose(before[0], outputs_of(model)[0], rtol=1e-5)


def test_a_reshape_keeps_what_stays_rectangular():
    body = "y = MatMul(a, w) x = Reshape(y, split) t = Relu(x) m = Reshape(t, merge) out = MatMul(m, v)"
    model = build(body, w="8x8", v="8x4", split=[0, 0, 4, 2], merge=[0, 0, 8], outputs="float[b, s, 4] out")
    cut = cut_of(model, "y")
    before = bytes_of(model)
    one = np.arange(8) != 0
    with pytest.raises(Blocked, match="rows would lose different places"):
        cut.apply(one)
    assert bytes_of(model) == before
    assert cut.refusal(np.arange(8) > 1) is None  # a row
    cut.apply(np.arange(8) % 2 == 0)  # the same number of every row
    check(model)
    assert array(value_named(model, "x").producer().inputs[1]).tolist() == [0, 0, 4, 1]


def test_units_that_share_a_number_of_a_constant_are_tied():
    body = "y = MatMul(a, w) x = Reshape(y, split) t = Add(x, c) m = Reshape(t, merge) out = MatMul(m, v)"
    constants = {"split": [0, 0, 4, 2], "merge": [0, 0, 8], "c": "4x1"}
    cut = cut_of(build(body, w="8x8", v="8x4", outputs="float[b, s, 4] out", **constants), "y")
    assert cut.ties.tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert cut.refusal(np.arange(8) % 2 == 1) == "units that go together would be parted"


def test_a_group_of_units_and_of_what_stays_is_refused():
    body = "x = Conv(a, w) y = Concat<axis=1>(x, h) z = Conv<group=2>(y, v) out = Conv(z, u)"
    inputs = "float[b, 3, 5, 5] a, float[b, 4, 5, 5] h"
    model = build(body, inputs, "float[b, 4, 5, 5] out", w="2x3x1x1", v="4x3x1x1", u="4x4x1x1")
    assert find_cut(value_named(model, "x"), channel_ids(4, 1, 2), 2) == "units share a place with what stays"


def test_heads_go_as_a_whole():
    cut = cut_of(make("mha"), "cm")
    assert cut.ties.tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert cut.refusal(np.arange(8) != 0) == "units that go together would be parted"


def test_query_heads_that_share_a_key_head_are_tied():
    model = make("grouped_queries")
    cut = cut_of(model, "p", 1)
    assert cut.ties.tolist() == [0, 0, 2, 2]
    assert cut.refusal(np.array([True, False, True, True])) == "units that go together would be parted"
    assert cut.refusal(np.array([False, False, True, True])) is None


def test_every_group_can_lose_the_same_query_head():
    model = make("grouped_queries")
    value = value_named(model, "p")
    cut = find_cut(value, np.array([0, 1, 0, 1]).reshape(1, 4, 1, 1), 2)
    assert isinstance(cut, Cut), cut
    keep = np.array([True, False])
    silence(cut, keep)
    before = outputs_of(model)
    cut.apply(keep)
    check(model)
    np.testing.assert_allclose(before[0], outputs_of(model)[0], rtol=1e-5)
    assert {slot.node.outputs[0].name for slot in cut.slots} == {"q0", "out"}


def test_roles_of_constants_and_costs_of_units():
    model = make("residual_group")
    cut = space_of(model, "channels").cut
    roles = {(slot.node.outputs[0].name, slot.index, slot.axes): slot.role for slot in cut.slots}
    assert roles == {
        ("y", 1, (0,)): "producer", ("y", 2, (0,)): "parameter", ("z", 1, (0,)): "producer",
        ("z", 1, (1,)): "consumer", ("out", 1, (1,)): "consumer",
    }  # fmt: skip
    assert cut.parameters().tolist() == [27 + 1 + 54 + 54 + 4] * 6
    assert cut.work().tolist() == [25 * (27 + 54 + 54 + 4)] * 6


W = {"w": "8x6", "v": "6x4"}
WALLS = {
    "output": ("x = MatMul(a, w) out = Relu(x)", W | {"outputs": "float[b, s, 6] out"}, "an output of the model"),
    "input": ("x = Add(a, e) out = MatMul(x, u)", {"u": "8x4", "e": "8"}, "an input of the model"),
    "softmax": ("x = MatMul(a, w) y = Softmax(x) out = MatMul(y, v)", W, "Softmax runs along its axis"),
    "norm": ("x = MatMul(a, w) y = LayerNormalization(x, g) out = MatMul(y, v)", W | {"g": "6"}, "LayerNormalization"),
    "mean": ("x = MatMul(a, w) y = ReduceMean(x, last) out = Mul(y, u)", W | {"u": "4", "last": [-1]}, "ReduceMean"),
    "unknown": ("x = MatMul(a, w) y = other.Twist(x) out = MatMul(y, v)", W, "Twist"),
    "size": ("x = MatMul(a, w) z = Size(x) f = Cast<to=1>(z) o = MatMul(x, v) out = Add(o, f)", W, "Size"),
    "shape": (
        "x = MatMul(a, w) z = Shape(x) f = Cast<to=1>(z) m = ReduceSum(f) o = MatMul(x, v) out = Add(o, m)",
        W, "a size that would change is computed",
    ),
    "gather": ("x = MatMul(a, w) y = Gather<axis=-1>(x, i) out = MatMul(y, v)", W | {"i": np.arange(6)}, "Gather"),
    "slice": (
        "x = MatMul(a, w) y = Slice(x, i, n, t, t) out = MatMul(y, u)",
        W | {"i": [0], "n": [6], "t": [2], "u": "3x4"}, "every other unit",
    ),
    "flattened": (
        "x = MatMul(a, w) t = Transpose<perm=[2,0,1]>(x) y = Reshape(t, one) out = Gemm(y, u)",
        W | {"one": [-1, 8], "u": "8x4", "outputs": "float[k, 4] out"}, "mixes units",
    ),
    "vector": ("x = MatMul(a, w) out = MatMul(x, u)", W | {"u": "6", "outputs": "float[b, s] out"}, "with a vector"),
    "uneven_split": (
        "x = MatMul(a, w) y, z = Split<axis=-1, num_outputs=2>(x) o = MatMul(y, u) p = MatMul(z, u) out = Add(o, p)",
        W | {"u": "3x4"}, "equal parts",
    ),
    "constant_past": (
        "x = MatMul(a, w) y = Concat<axis=-1>(x, h) out = MatMul(y, v)",
        W | {"inputs": "float[b, s, 8] a, float[b, s, 2] h", "v": "8x4"}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WALLS)
def test_what_cannot_be_proven_is_refused_with_a_reason(name):
    body, constants, reason = WALLS[name]
    model = build(body, **{"outputs": "float[b, s, 4] out"} | constants)
    before, value = bytes_of(model), value_named(model, "x")
    size = value.shape[-1]
    found = find_cut(value, channel_ids(3, -1, size), size)
    assert bytes_of(model) == before
    if reason is None:
        assert isinstance(found, Cut), found
    else:
        assert isinstance(found, str)
        assert reason in found


def test_columns_of_a_table_are_what_makes_units():
    body = "y = Gather(table, i) x = Relu(y) out = MatMul(x, v)"
    model = build(body, inputs="int64[b, s] i", outputs="float[b, s, 4] out", table="9x6", v="6x4")
    cut = cut_of(model)
    assert [(slot.index, slot.axes, slot.role) for slot in cut.producers] == [(0, (1,), "producer")]
    keep = np.arange(6) % 3 > 0
    silence(cut, keep)
    before = outputs_of(model)
    cut.apply(keep)
    check(model)
    np.testing.assert_allclose(before[0], outputs_of(model)[0], rtol=1e-5)


def test_notes_of_what_was_measured_are_void():
    model = make("mlp")
    value, node = value_named(model, "x"), value_named(model, "y").producer()
    value.meta[RANGE_KEY] = node.meta[KERNEL_KEY] = "measured"
    space_of(model, "neurons").cut.apply(np.arange(6) > 0)
    assert RANGE_KEY not in value.meta
    assert KERNEL_KEY not in node.meta


def test_one_unit_is_none_too_many():
    model = build("x = MatMul(a, w) out = MatMul(x, v)", w="8x1", v="1x4", outputs="float[b, s, 4] out")
    assert find_cut(value_named(model, "x"), channel_ids(3, -1, 1), 1) == "there is one unit only"


def test_a_branch_that_reads_a_unit_stops_the_cut():
    body = (
        "x = MatMul(a, w) o = MatMul(x, v) out = If(yes) "
        "<then_branch = t () => (float[b, s, 4] p) { p = MatMul(x, v) }, "
        "else_branch = e () => (float[b, s, 4] q) { q = Identity(o) }>"
    )
    model = build(body, inputs="float[b, s, 8] a, bool yes", outputs="float[b, s, 4] out", w="8x6", v="6x4")
    found = find_cut(value_named(model, "x"), channel_ids(3, -1, 6), 6)
    assert found == "a control-flow branch reads it"
