"""Gradients of convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qexport.calibration.gradients.tape import Rule, Tape, Value, operand, optional, rank_of, refuse
from qexport.passes.match import dims


@dataclass(frozen=True, slots=True)
class Walk:
    """How a window goes over the spatial axes.

    Attributes:
        kernel: Its size.
        strides: Steps between windows.
        dilations: Steps between the elements of one.
        pads: What is added before and behind every axis, all before first.
        group: Groups of channels that do not see each other.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    group: int = 1


def _walk(node: ir.Node, kernel: Sequence[int]) -> Walk:
    count = len(kernel)
    strides = tuple(node.attributes.get_ints("strides", ())) or (1,) * count
    dilations = tuple(node.attributes.get_ints("dilations", ())) or (1,) * count
    told = node.attributes.get_string("auto_pad", "NOTSET")
    pads = tuple(node.attributes.get_ints("pads", ())) or (0,) * (2 * count)
    if told == "VALID":
        pads = (0,) * (2 * count)
    elif told != "NOTSET":
        pads = _same(node, kernel, strides, dilations)
    return Walk(tuple(kernel), strides, dilations, pads, node.attributes.get_int("group", 1))


def _same(node: ir.Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> tuple[int, ...]:
    """Pads that leave ``ceil(size / stride)`` windows."""
    sizes = (dims(operand(node, 0)) or ())[2:]
    if len(sizes) != len(kernel) or not all(isinstance(size, int) for size in sizes):
        raise refuse(node, "its padding depends on sizes that are not known", "give its pads in numbers")
    total = []
    for size, window, stride, step in zip(sizes, kernel, strides, dilations, strict=True):
        windows = -(-int(size or 0) // stride)
        total.append(max(0, (windows - 1) * stride + step * (window - 1) + 1 - int(size or 0)))
    late = node.attributes.get_string("auto_pad", "") == "SAME_UPPER"
    before = [both // 2 if late else both - both // 2 for both in total]
    return (*before, *(both - first for both, first in zip(total, before, strict=True)))


def _kernel(node: ir.Node) -> tuple[int, ...]:
    """The sizes of a weight along the spatial axes."""
    shape = dims(operand(node, 1))
    if shape is None or not all(isinstance(size, int) for size in shape):
        raise refuse(node, "the shape of its weight is not known")
    return tuple(int(size) for size in shape if isinstance(size, int))


def _scattered(t: Tape, g: Value, weight: Value, walk: Walk, x: Value) -> Value:
    """Add every window, times its gradient, where it was read: in the padded input, whose border is cut off then.

    Windows need not reach the end, so what is behind them gets zeros: a Pad by the sizes that are left, below 0 too.
    """
    count = len(walk.kernel)
    how = {"strides": walk.strides, "dilations": walk.dilations, "group": walk.group, "kernel_shape": walk.kernel}
    whole = t.op("ConvTranspose", g, weight, attributes=how)
    before = t.constant([0, 0, *(-pad for pad in walk.pads[:count])])
    behind = t.sub(t.sub(t.shape(x), t.shape(whole)), before)
    return t.op("Pad", whole, t.op("Concat", before, behind, attributes={"axis": 0}))


def _conv(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """To the input by the transposed convolution, to the weight by one of the input with the gradient.

    ``dW[m, c, k] = sum over b and o of g[b, m, o] x[b, c, o stride + k dilation]`` is a convolution of channels with
    the batch as its channels, stride and dilation swapped.
    """
    x, weight = operand(node, 0), operand(node, 1)
    shape = _kernel(node)
    walk = _walk(node, shape[2:])
    count, outputs, inputs = len(walk.kernel), shape[0], shape[1]
    rest = range(2, 2 + count)
    if walk.group == 1:
        images, kernels = (t.transpose(value, (1, 0, *rest)) for value in (x, g))
    else:
        behind = [i + 1 for i in rest]
        images, kernels = (_apart(t, value, walk.group) for value in (x, g))
        images = _merged(t, t.transpose(images, (2, 1, 0, *behind)), 1, 3)
        kernels = _merged(t, t.transpose(kernels, (1, 2, 0, *behind)), 0, 2)
    how = {"strides": walk.dilations, "dilations": walk.strides, "pads": walk.pads, "group": walk.group}
    found = t.op("Conv", images, kernels, attributes=how)  # [inputs, outputs, kernel or more]
    limits = t.constant([0] * count), t.constant(list(walk.kernel)), t.constant(list(rest))
    dw = t.transpose(t.op("Slice", found, *limits), (1, 0, *rest))
    dw = t.reshape(dw, [outputs, inputs, *walk.kernel])
    bias = None if optional(node, 2) is None else t.sum(g, [0, *rest], keep=False)
    return [_scattered(t, g, weight, walk, x), dw, bias]


def _apart(t: Tape, value: Value, group: int) -> Value:
    """[batch, channels, ...] as [batch, groups, channels of one, ...]."""
    tail = t.op("Slice", t.shape(value), t.constant([2]), t.constant([1 << 30]))
    shape = (t.sizes(value, 0, 1), t.constant([group, -1]), tail)
    return t.reshape(value, t.op("Concat", *shape, attributes={"axis": 0}))


def _merged(t: Tape, value: Value, start: int, stop: int) -> Value:
    """Axes from ``start`` to ``stop`` as one."""
    tail = t.op("Slice", t.shape(value), t.constant([stop]), t.constant([1 << 30]))
    return t.reshape(value, t.op("Concat", t.sizes(value, 0, start), t.constant([-1]), tail, attributes={"axis": 0}))


def _average_pool(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """Every gradient is shared by what its window saw; padding counts if the node says so."""
    x = operand(node, 0)
    if node.attributes.get_int("ceil_mode", 0):
        raise refuse(node, "its windows may leave the padded input")
    walk = _walk(node, tuple(node.attributes.get_ints("kernel_shape", ())))
    channel = (t.constant([0]), t.constant([1]), t.constant([1]))
    ones = t.zeros(t.shape(t.op("Slice", x, *channel)), g, 1.0)
    window = t.zeros(t.constant([1, 1, *walk.kernel]), g, 1.0)
    how = {"strides": walk.strides, "dilations": walk.dilations}
    if node.attributes.get_int("count_include_pad", 0):
        pads = t.constant([0, 0, *walk.pads[: len(walk.kernel)], 0, 0, *walk.pads[len(walk.kernel) :]])
        seen = t.op("Conv", t.op("Pad", ones, pads, t.number(1.0, g)), window, attributes=how)
    else:
        seen = t.op("Conv", ones, window, attributes=how | {"pads": walk.pads})
    return [_by_channel(t, t.div(g, seen), window, walk, x)]


def _by_channel(t: Tape, g: Value, window: Value, walk: Walk, x: Value) -> Value:
    """Scatter with one window for all channels, which are taken for images of their own."""
    single = [t.op("Concat", t.constant([-1, 1]), _tail(t, value), attributes={"axis": 0}) for value in (g, x)]
    images = t.reshape(x, single[1])
    return t.reshape(_scattered(t, t.reshape(g, single[0]), window, walk, images), t.shape(x))


def _tail(t: Tape, value: Value) -> Value:
    return t.op("Slice", t.shape(value), t.constant([2]), t.constant([1 << 30]))


def _max_pool(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """To the largest of each window, whose position a second output tells."""
    if node.attributes.get_int("storage_order", 0):
        raise refuse(node, "it counts columns first")
    x = operand(node, 0)
    rank_of(node, x)
    _, places = t.ops("MaxPool", [x], dict(node.attributes), 2)
    flat = t.zeros(t.reshape(t.op("Size", x), [1]), g)
    added = {"axis": 0, "reduction": "add"}
    total = t.op("ScatterElements", flat, t.reshape(places, [-1]), t.reshape(g, [-1]), attributes=added)
    return [t.reshape(total, t.shape(x))]


RULES: dict[str, Rule] = {"Conv": _conv, "AveragePool": _average_pool, "MaxPool": _max_pool}
