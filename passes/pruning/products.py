"""The axes of products, convolutions and attention operators."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qexport.passes.match import Dims, dims
from qexport.passes.pruning.labels import Axis, Blocked, Port, Spec

IMAGE = "it runs along the pixels of a convolution"
WHOLE = "an attention can lose whole heads only"
STATE = "an attention has its keys packed with something else"
POSITIONS = "it runs along the positions of an attention"
HEADS = "the heads of an attention are not known"
CLOSED = {**dict.fromkeys(("d", "e", "three"), WHOLE), **dict.fromkeys("stup", POSITIONS)}


def shape_of(value: ir.Value | None) -> Dims:
    """The shape of a value; ``Blocked`` where its rank is not known."""
    shape = dims(value)
    if shape is None:
        raise Blocked("the rank of a value is not known")
    return shape


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input, ``None`` where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def broadcast(shape: Dims, labels: tuple[str, ...], target: Dims) -> tuple[Axis, ...]:
    """Labels of a shape that is broadcast to ``target``, whose axes are ``labels``."""
    skipped = len(labels) - len(shape)
    if skipped < 0:
        raise Blocked("a value has more axes than what it is broadcast to")
    return tuple(
        () if size == 1 and target[axis + skipped] != 1 else (labels[axis + skipped],)
        for axis, size in enumerate(shape)
    )


def matmul(node: ir.Node) -> Spec:
    """``[.., m, k] x [.., k, n] = [.., m, n]``; what stands before is broadcast."""
    left, right, result = (shape_of(value) for value in (*node.inputs[:2], node.outputs[0]))
    if len(left) < 2 or len(right) < 2:
        raise Blocked("a product with a vector")
    batch = tuple(f"b{i}" for i in range(len(result) - 2))
    return Spec(
        {
            ("in", 0): (*broadcast(left[:-2], batch, result[:-2]), ("m",), ("k",)),
            ("in", 1): (*broadcast(right[:-2], batch, result[:-2]), ("k",), ("n",)),
            ("out", 0): (*((label,) for label in batch), ("m",), ("n",)),
        }
    )


def gemm(node: ir.Node) -> Spec:
    """A product of matrices, either transposed or not, and a bias."""
    left: tuple[Axis, ...] = (("m",), ("k",))
    right: tuple[Axis, ...] = (("k",), ("n",))
    ports: dict[Port, tuple[Axis, ...]] = {
        ("in", 0): left[::-1] if node.attributes.get_int("transA", 0) else left,
        ("in", 1): right[::-1] if node.attributes.get_int("transB", 0) else right,
        ("out", 0): (("m",), ("n",)),
    }
    if given(node, 2) is not None:
        ports["in", 2] = broadcast(shape_of(node.inputs[2]), ("m", "n"), shape_of(node.outputs[0]))
    return Spec(ports)


def einsum(node: ir.Node) -> Spec:
    """The labels are in the equation."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    terms, _, result = equation.partition("->")
    ports = {("in", i): tuple((label,) for label in term) for i, term in enumerate(terms.split(","))}
    ports["out", 0] = tuple((label,) for label in result)
    if "." in equation or "->" not in equation or any(len(set(axes)) < len(axes) for axes in ports.values()):
        raise Blocked("an Einsum is not spelt with each axis once")
    return Spec(ports)


def conv(node: ir.Node) -> Spec:
    """Channels are groups of channels: ``g`` groups of ``ci`` inputs and ``co`` outputs."""
    image, kernel = (shape_of(value) for value in node.inputs[:2])
    groups, rows, columns = node.attributes.get_int("group", 1), kernel[0], kernel[1]
    if not isinstance(rows, int) or not isinstance(columns, int):
        raise Blocked(f"the kernel of a {node.op_type} has no known size")
    inputs, outputs, into = ("g", "ci"), ("g", "co"), ("co",)
    if node.op_type == "Conv":
        told = {"g": groups, "ci": columns, "co": rows // groups}
        weight: tuple[Axis, ...] = (outputs, ("ci",))
    else:
        told, weight = {"g": groups, "ci": rows // groups, "co": columns}, (inputs, into)
    places = {side: tuple((f"{side}{i}",) for i in range(len(image) - 2)) for side in "xky"}
    ports: dict[Port, tuple[Axis, ...]] = {
        ("in", 0): (("batch",), inputs, *places["x"]),
        ("in", 1): (*weight, *places["k"]),
        ("out", 0): (("batch",), outputs, *places["y"]),
    }
    if given(node, 2) is not None:
        ports["in", 2] = (outputs,)
    closed = {label: IMAGE for side in places.values() for (label,) in side}
    return Spec(ports, closed, told, {"group": ("g",)})


def attention(node: ir.Node) -> Spec:
    """ONNX's Attention: ``kv`` groups of ``r`` query heads, of four axes or of three."""
    queries = shape_of(node.inputs[0])
    q, kv = _heads(node, "q_num_heads", 0), _heads(node, "kv_num_heads", 2)
    counts = {"q_num_heads": ("kv", "r"), "kv_num_heads": ("kv",)}
    return _attention(node, (len(queries), q, kv), {"mask": 3, "past": 4}, counts)


def scatter(node: ir.Node) -> Spec:
    """Rows of a cache, written at places along one axis that a cut leaves alone."""
    rank = len(shape_of(node.inputs[0]))
    axis = node.attributes.get_int("axis", -2) % rank
    cache = tuple("columns" if place == axis else f"a{place}" for place in range(rank))
    new = tuple("rows" if place == axis else f"a{place}" for place in range(rank))
    held: tuple[Axis, ...] = tuple((label,) for label in cache)
    ports: dict[Port, tuple[Axis, ...]] = {("in", 0): held, ("in", 1): tuple((label,) for label in new)}
    return Spec({**ports, ("out", 0): held}, dict.fromkeys(("columns", "rows"), POSITIONS))


def multi_head(node: ir.Node) -> Spec:
    """The MultiHeadAttention of onnxruntime, with apart queries, keys and values, with the bias of all three."""
    heads = node.attributes.get_int("num_heads", 0)
    spec = _attention(node, (3, heads, heads), {"mask": 5, "past": 6}, {"num_heads": ("kv",)})
    return _with_bias(node, spec, 3)


def group_query(node: ir.Node) -> Spec:
    """The GroupQueryAttention of onnxruntime, with apart queries, keys and values."""
    q, kv = node.attributes.get_int("num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    return _attention(node, (3, q, kv), {"past": 3}, {"num_heads": ("kv", "r"), "kv_num_heads": ("kv",)})


def packed_attention(node: ir.Node) -> Spec:
    """The Attention of onnxruntime, which holds the weight of queries, keys and values side by side."""
    heads = node.attributes.get_int("num_heads", 0)
    width = shape_of(node.inputs[1])[1]
    if "qkv_hidden_sizes" in node.attributes or given(node, 4) is not None or not isinstance(width, int):
        raise Blocked(STATE)
    if heads <= 0 or width % (3 * heads):
        raise Blocked(HEADS)
    ports: dict[Port, tuple[Axis, ...]] = {
        ("in", 0): (("batch",), ("s",), ("k",)),
        ("in", 1): (("k",), ("three", "kv", "d")),
        ("out", 0): (("batch",), ("s",), ("kv", "d")),
    }
    if given(node, 5) is not None:
        ports["in", 5] = _mask(shape_of(node.inputs[5]), heads, ("kv",))
    sizes = {"three": 3, "kv": heads, "d": width // (3 * heads), "r": 1}
    return _with_bias(node, Spec(ports, CLOSED, sizes, {"num_heads": ("kv",)}), 2)


def _attention(
    node: ir.Node, known: tuple[int, int, int], where: Mapping[str, int], counts: Mapping[str, Axis]
) -> Spec:
    """``known`` are the rank and the numbers of query and key heads; ``where`` the places of mask and past."""
    rank, q, kv = known
    sizes = _sizes(node, rank, q, kv)
    many, few = ("kv", "r"), ("kv",)
    told = {
        ("in", 0): (many, "s", "d"),
        ("in", 1): (few, "t", "d"),
        ("in", 2): (few, "t", "e"),
        ("out", 0): (many, "s", "e"),
    }
    ports: dict[Port, tuple[Axis, ...]] = {
        port: (("batch",), heads, (place,), (size,)) if rank == 4 else (("batch",), (place,), (*heads, size))
        for port, (heads, place, size) in told.items()
    }
    mask, past = given(node, where.get("mask", 99)), where["past"]
    if mask is not None:
        ports["in", where["mask"]] = _mask(shape_of(mask), q, many)
    for index, size in enumerate("de"):
        if given(node, past + index) is not None:
            ports["in", past + index] = (("batch",), few, ("p",), (size,))
        if len(node.outputs) > index + 1:
            ports["out", index + 1] = (("batch",), few, ("u",), (size,))
    if len(node.outputs) > 3:
        ports["out", 3] = (("batch",), many, ("s",), ("u",))
    return Spec(ports, CLOSED, sizes, counts)


def _sizes(node: ir.Node, rank: int, q: int, kv: int) -> dict[str, int]:
    """Sizes of the labels of an attention with queries, keys and values apart."""
    if given(node, 1) is None or given(node, 2) is None:
        raise Blocked(STATE)
    shapes = [shape_of(node.inputs[index]) for index in range(3)]
    if kv <= 0 or q <= 0 or q % kv or any(len(shape) != rank for shape in shapes):
        raise Blocked(HEADS)
    sizes = {"kv": kv, "r": q // kv, "three": 3}
    for label, shape, heads in (("d", shapes[0], q), ("e", shapes[2], kv)):
        width = shape[-1]
        if not isinstance(width, int):
            raise Blocked(HEADS)
        sizes[label] = width if rank == 4 else width // heads
    return sizes


def _with_bias(node: ir.Node, spec: Spec, index: int) -> Spec:
    """The spec with the bias of queries, keys and values, one behind the other."""
    bias = given(node, index)
    if bias is None:
        return spec
    size = spec.sizes["d"]
    if shape_of(bias) != (3 * spec.sizes["kv"] * size,) or spec.sizes.get("e", size) != size:
        raise Blocked("the bias of an attention is not that of as many keys as values")
    return Spec({**spec.ports, ("in", index): (("three", "kv", "d"),)}, spec.closed, spec.sizes, spec.counts)


def _mask(shape: Dims, heads: int, many: Axis) -> tuple[Axis, ...]:
    """Labels of a mask that is broadcast to ``[batch, heads, queries, keys]``."""
    labels: tuple[Axis, ...] = (("batch",), many, ("s",), ("u",))
    found = labels[len(labels) - len(shape) :]
    return tuple(
        () if size == 1 and (axis != many or heads > 1) else axis for axis, size in zip(found, shape, strict=True)
    )


def _heads(node: ir.Node, name: str, index: int) -> int:
    """How many heads an attention has, told by its attribute or by the second of four axes."""
    shape = shape_of(given(node, index)) if given(node, index) is not None else ()
    if len(shape) == 4 and isinstance(shape[1], int):
        return shape[1]
    return node.attributes.get_int(name, 0)
