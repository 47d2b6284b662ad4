"""Channel ids go through layout operators as the numbers themselves do."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.passes.folding.axes import DOWN, FREE, UP, channel_ids, only_along, regroup, spread


def known(shape, name="x"):
    return ir.val(name, ir.DataType.FLOAT, shape)


def told(numbers):
    array = np.asarray(numbers, np.int64)
    return ir.val("told", ir.DataType.INT64, array.shape, const_value=ir.tensor(array))


def node_of(op, inputs, shapes, **attributes):
    node = ir.node(op, inputs, attributes, num_outputs=len(shapes))
    for output, shape in zip(node.outputs, shapes, strict=True):
        output.shape = ir.Shape(shape)
    return node


@st.composite
def layouts(draw):
    """A shape, a node that moves its elements about, and what the node does in numpy."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    kind = draw(st.sampled_from(["reshape", "transpose", "unsqueeze", "squeeze", "split", "gather", "pick", "slice"]))
    if kind == "reshape":
        sizes = draw(st.permutations(shape)) if draw(st.booleans()) else merged(shape, axis)
        wanted = list(sizes)
        if draw(st.booleans()):
            wanted[draw(st.integers(0, len(wanted) - 1))] = -1
        return shape, node_of("Reshape", [known(shape), told(wanted)], [sizes]), lambda x: [x.reshape(sizes)]
    if kind == "transpose":
        order = draw(st.permutations(range(len(shape))))
        made = tuple(shape[i] for i in order)
        return shape, node_of("Transpose", [known(shape)], [made], perm=order), lambda x: [x.transpose(order)]
    if kind in ("unsqueeze", "squeeze"):
        place = axis % len(shape)
        longer = (*shape[:place], 1, *shape[place:])
        if kind == "unsqueeze":
            node = node_of("Unsqueeze", [known(shape), told([place])], [longer])
            return shape, node, lambda x: [x.reshape(longer)]
        node = node_of("Squeeze", [known(longer), told([place - len(longer)])], [shape])
        return longer, node, lambda x: [x.reshape(shape)]
    if kind == "split":
        cut = draw(st.integers(1, size))
        parts = [cut, size - cut] if cut < size else [cut]
        return (
            shape,
            node_of("Split", [known(shape), told(parts)], [resized(shape, axis, part) for part in parts], axis=axis),
            lambda x: np.split(x, np.cumsum(parts)[:-1], axis),
        )
    if kind == "slice":
        start, end, step = draw(st.integers(-5, 4)), draw(st.integers(-6, 5)), draw(st.sampled_from([1, 2, -1]))
        taken = np.arange(size)[start:end:step]
        if not taken.size:
            start, end, step, taken = 0, size, 1, np.arange(size)
        inputs = [known(shape), told([start]), told([end]), told([axis]), told([step])]
        node = node_of("Slice", inputs, [resized(shape, axis, taken.size)])
        return shape, node, lambda x: [np.take(x, taken, axis)]
    places = draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=4, unique_by=lambda i: i % size))
    where = np.array(places if kind == "gather" else places[0])
    made = np.take(np.zeros(shape), where, axis).shape
    node = node_of("Gather", [known(shape), told(where)], [made], axis=axis)
    return shape, node, lambda x: [np.take(x, where, axis)]


def merged(shape, axis):
    place = min(axis % len(shape), len(shape) - 2)
    return (*shape[:place], shape[place] * shape[place + 1], *shape[place + 2 :])


def resized(shape, axis, size):
    made = list(shape)
    made[axis] = size
    return tuple(made)


@settings(max_examples=200, deadline=None)
@given(layout=layouts(), axis=st.integers(0, 4))
def test_ids_move_down_as_the_elements_do(layout, axis):
    shape, node, does = layout
    ids = channel_ids(len(shape), axis % len(shape), shape[axis % len(shape)])
    for index, truth in enumerate(does(np.broadcast_to(ids, shape))):
        found = DOWN[node.op_type](node, index, ids)
        if found is None:
            assert node.op_type == "Reshape"  # the only one that may mix axes
        else:
            assert found.ndim == truth.ndim
            assert np.array_equal(np.broadcast_to(found, truth.shape), truth)


@settings(max_examples=200, deadline=None)
@given(layout=layouts(), axis=st.integers(0, 4))
def test_ids_moved_up_come_down_as_they_were(layout, axis):
    shape, node, does = layout
    for index, output in enumerate(node.outputs):
        made = output.shape.numpy()
        ids = (
            channel_ids(len(made), axis % max(len(made), 1), made[axis % len(made)]) if made else np.zeros((), np.int64)
        )
        found = UP[node.op_type](node, index, ids)
        if found is None:
            assert node.op_type == "Reshape"
            continue
        assert found.ndim == len(shape)
        back = does(np.broadcast_to(found, shape))
        assert np.array_equal(back[index], np.broadcast_to(ids, made))
        others = [part for other, part in enumerate(back) if other != index]
        assert not others or found.shape[node.attributes.get_int("axis", 0)] == 1 or (others[0] == FREE).all()


def test_pieces_are_joined_where_they_lie_and_the_rest_is_free():
    node = node_of("Concat", [known((2, 3)), known((2, 2), "y")], [(2, 5)], axis=-1)
    ids = channel_ids(2, 1, 2)
    assert DOWN["Concat"](node, 1, ids).tolist() == [[FREE, FREE, FREE, 0, 1]]
    assert UP["Concat"](node, 0, channel_ids(2, 1, 5)).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("shape", "axis", "source", "target", "expected"),
    [
        ((1, 1, 8), 2, ("b", "s", 8), ("b", "s", 2, 4), (1, 1, 2, 4)),
        ((1, 1, 8), 2, (None, None, 8), (None, 8), (1, 8)),
        ((1, 2, 1, 4), 3, ("b", 2, "s", 4), ("b", "s", 8), None),  # the sequence lies between
        ((1, 2, 1, 1), 1, ("b", 2, "s", 4), ("b", 2, None), (1, 2, 1)),
        ((1, 2, 1, 1), 1, (None, 2, "s", 4), (None, 2, None), None),  # who knows which axis is which
        ((1, 8), 1, (4, 8), (8, 4), (8, 4)),
        ((1, 1, 8), 2, ("b", "s", 8), ("b", "s", 3, 4), None),
        ((3, 1), 0, ("n", 8), ("n", 2, 4), (3, 1, 1)),
    ],
)
def test_reshapes_are_followed_as_far_as_sizes_are_known(shape, axis, source, target, expected):
    found = regroup(channel_ids(len(shape), axis, shape[axis]), source, target)
    assert (None if found is None else found.shape) == expected


def test_sizes_that_a_reshape_copies_are_the_same_size():
    shape, made = (None, 2, None, 4), (None, 2, None)
    ids = channel_ids(4, 1, 2)
    for wanted, expected in (([0, 2, -1], (1, 2, 1)), ([-1, 2, 12], None)):
        node = node_of("Reshape", [known(shape), told(wanted)], [made])
        found = DOWN["Reshape"](node, 0, ids)
        assert (None if found is None else found.shape) == expected
    literal = node_of("Reshape", [known(shape), told([0, 2, -1])], [made], allowzero=1)
    assert DOWN["Reshape"](literal, 0, ids) is None


@pytest.mark.parametrize("op", ["Gather", "Slice", "Squeeze", "Reshape"])
def test_what_is_computed_cannot_be_followed(op):
    computed = ir.val("computed", ir.DataType.INT64, (1,))
    inputs = [known((2, 1, 8)), computed, computed][: 3 if op == "Slice" else 2]
    node = node_of(op, inputs, [(None, None, None)])
    ids = channel_ids(3, 2, 8)
    assert DOWN[op](node, 0, ids) is None
    assert UP[op](node, 0, ids) is None


def test_an_axis_of_unknown_size_is_cut_as_a_whole():
    node = node_of("Slice", [known((1, None, 8)), told([0]), told([1]), told([1])], [(1, 1, 8)])
    ids = channel_ids(3, 2, 8)
    assert np.array_equal(UP["Slice"](node, 0, ids), ids)
    assert np.array_equal(DOWN["Slice"](node, 0, ids), ids)
    assert UP["Slice"](node, 0, channel_ids(3, 1, 4)) is None


def test_constants_grow_where_channels_run_past_them():
    ids = channel_ids(3, 2, 4)
    assert spread(ids, ()).shape == (4,)
    assert spread(ids, (1, 1, 4)).shape == (1, 1, 4)
    assert spread(ids, (3, 1)).tolist() == [[0, 1, 2, 3]] * 3
    assert spread(ids, (3,)) is None


def test_channels_along_another_axis_are_told():
    ids = channel_ids(3, 1, 4)
    assert only_along(ids, 1).tolist() == [0, 1, 2, 3]
    assert only_along(ids, -2).tolist() == [0, 1, 2, 3]
    assert only_along(ids, -1) is None
