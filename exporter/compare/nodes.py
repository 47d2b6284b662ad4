"""Two graphs node by node: what came and went, and what computes with other numbers.

Nodes are the same where their names are. Quantizers are no nodes of their own here: what they do stands in the
precision and the scales of whoever reads through them. Inputs and outputs of the model are compared like nodes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from qexport.exporter.looking.element_types import ElementTypes, element_types
from qexport.exporter.looking.inspect import dtype_name, factors_of, find_layers
from qexport.passes.match import array, constant

Kind: TypeAlias = Literal["added", "removed", "operator", "attributes", "wiring", "precision", "scale", "weights"]
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}
_QLINEAR: tuple[tuple[str, int, int | None], ...] = (("input 0", 1, 2), ("input 3", 4, 5), ("output", 6, 7))
_INLINE: Mapping[str, tuple[tuple[str, int, int | None], ...]] = {
    "QLinearMatMul": _QLINEAR,
    "QLinearConv": _QLINEAR,
    "MatMulIntegerToFloat": (("input 0", 2, 4), ("input 1", 3, 5)),
    "MatMulNBits": (("input 1", 2, 3),),
    "MatMulBnb4": (("input 1", 2, None),),
}
"""Operators that have scales and zero points among their inputs: what they are of, and where they stand."""

_UNKNOWN = "unknown"


class NodeChange(BaseModel):
    """One difference of one node: what it is in the first model and in the second."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    a: str
    b: str


@dataclass(frozen=True)
class Scale:
    """What maps numbers of a value to integers.

    Attributes:
        place: Which input it is of, and the axis and block size where there are any.
        scale: Float scales; ``None`` where they are computed.
        zero: Zero points as stored, of the same shape.
    """

    place: str
    scale: NDArray[np.float64] | None
    zero: NDArray[np.float64] | None


@dataclass(frozen=True)
class Facts:
    """A node as it is compared; inputs are those behind quantizers."""

    op: str
    attributes: Mapping[str, str]
    sources: tuple[str, ...]
    precision: tuple[str, ...]
    scales: tuple[Scale, ...]
    weights: tuple[ir.TensorProtocol, ...]


def compare_nodes(a: ir.Model, b: ir.Model) -> Iterator[NodeChange]:
    """Every difference, in the order of the first graph; then what only the second has. Neither is changed."""
    left, right = _read(a), _read(b)
    common = left.keys() & right.keys()
    for name, facts in left.items():
        if name in right:
            yield from _changes(name, facts, right[name], common)
        else:
            yield NodeChange(name=name, kind="removed", a=facts.op, b="")
    for name, facts in right.items():
        if name not in left:
            yield NodeChange(name=name, kind="added", a="", b=facts.op)


def _changes(name: str, a: Facts, b: Facts, common: set[str]) -> Iterator[NodeChange]:
    """What differs; numbers of another precision are other numbers, and other operators have other inputs."""
    found: list[tuple[Kind, str, str]] = []
    if a.op != b.op:
        found.append(("operator", a.op, b.op))
    else:
        found += _attributes(a, b)
        found += _wiring(a, b, common)
    if _other_precision(a.precision, b.precision):
        found.append(("precision", " x ".join(a.precision), " x ".join(b.precision)))
    elif a.op == b.op:
        found += _scales(a.scales, b.scales)
        found += _weights(a.weights, b.weights)
    for kind, before, after in found:
        yield NodeChange(name=name, kind=kind, a=before, b=after)


def _attributes(a: Facts, b: Facts) -> Iterator[tuple[Kind, str, str]]:
    names = [key for key in {**a.attributes, **b.attributes} if a.attributes.get(key) != b.attributes.get(key)]
    if names:
        one, other = (
            ", ".join(f"{key}={side.get(key, 'unset')}" for key in names) for side in (a.attributes, b.attributes)
        )
        yield "attributes", one, other


def _wiring(a: Facts, b: Facts, common: set[str]) -> Iterator[tuple[Kind, str, str]]:
    """Inputs that come from elsewhere; not those whose source came or went, which is told of the source."""
    for number, (one, other) in enumerate(zip_longest(a.sources, b.sources, fillvalue="")):
        known = all(source.startswith("=") or source.partition("\0")[0] in common for source in (one, other))
        if one != other and known:
            before, after = (source.lstrip("=").replace("\0", " ") or "nothing" for source in (one, other))
            yield "wiring", f"input {number}: {before}", f"input {number}: {after}"


def _other_precision(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether a type differs that both graphs tell."""
    return any(one != other for one, other in zip(a, b, strict=False) if _UNKNOWN not in (one, other))


def _scales(a: tuple[Scale, ...], b: tuple[Scale, ...]) -> Iterator[tuple[Kind, str, str]]:
    """Scales and zero points; a pair of quantizers that share theirs is one line."""
    lines = {_line(one, other): None for one, other in zip_longest(a, b) if not _equal(one, other)}
    for before, after in lines:
        yield "scale", before, after


def _equal(a: Scale | None, b: Scale | None) -> bool:
    if a is None or b is None or a.place != b.place:
        return False
    return all(_alike(one, other) for one, other in ((a.scale, b.scale), (a.zero, b.zero)))


def _alike(one: NDArray[np.float64] | None, other: NDArray[np.float64] | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _line(a: Scale | None, b: Scale | None) -> tuple[str, str]:
    """Both sides in words; of many scales, the one that changed most."""
    index, note = 0, ""
    if (
        a is not None
        and b is not None
        and a.scale is not None
        and b.scale is not None
        and a.scale.shape == b.scale.shape
    ):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(a.scale == b.scale, 1.0, b.scale / a.scale).ravel()
        index = int(np.nan_to_num(np.abs(np.log(np.abs(ratio) + 1e-300))).argmax())
        count = int((a.scale != b.scale).sum())
        of = f", {count} of {ratio.size}" if ratio.size > 1 else ""
        note = f" ({ratio[index]:.6g}x{of})" if count else ""
    return _word(a, index), _word(b, index) + note


def _word(scale: Scale | None, index: int) -> str:
    if scale is None:
        return "none"
    if scale.scale is None:
        return f"{scale.place}: computed"
    many = f"[{index}]" if scale.scale.size > 1 else ""
    zero = "" if scale.zero is None or scale.zero.size <= index else f", zero point {scale.zero.ravel()[index]:g}"
    number = f"{scale.scale.ravel()[index]:.6g}" if scale.scale.size > index else "empty"
    return f"{scale.place}: {number}{many}{zero}"


def _weights(a: tuple[ir.TensorProtocol, ...], b: tuple[ir.TensorProtocol, ...]) -> Iterator[tuple[Kind, str, str]]:
    for one, other in zip_longest(a, b):
        if one is None or other is None:
            yield "weights", _digest(one), _digest(other)
        elif (before := _digest(one)) != (after := _digest(other)):
            yield "weights", before, f"{after}{_count(one, other)}"


def _digest(tensor: ir.TensorProtocol | None) -> str:
    """Type, shape, and the first half of the SHA-256 of the bytes."""
    if tensor is None:
        return "none"
    data = repr(tensor.numpy().tolist()).encode() if tensor.dtype == ir.DataType.STRING else tensor.tobytes()
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape.numpy())} {hashlib.sha256(data).hexdigest()[:32]}"


def _count(a: ir.TensorProtocol, b: ir.TensorProtocol) -> str:
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return ""
    one, other = a.numpy(), b.numpy()
    return f" ({int((one != other).sum())} of {one.size} numbers)"


# ---------------------------------------------------------------- reading one graph


def _read(model: ir.Model) -> dict[str, Facts]:
    """Inputs, nodes and outputs by name, in this order."""
    names, types, layers = _names(model), element_types(model), set(find_layers(model))
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    found = {f"input {value.name}": _port("input", value, types, ()) for value in inputs}
    for node, name in names.items():
        typed = [node.inputs[number] for number in factors_of(node)] if node in layers else None
        found[name] = _facts(node, names, types, typed)
    for value in model.graph.outputs:
        found[f"output {value.name}"] = _port("output", value, types, (_source(value, names),))
    return found


def _names(model: ir.Model) -> dict[ir.Node, str]:
    """A name of its own for every node that is none of a quantizer or a constant, by the order of the graph."""
    bodies = [("", model.graph.all_nodes())]
    bodies += [(f"{function.name}: ", function.all_nodes()) for function in model.functions.values()]
    names: dict[ir.Node, str] = {}
    seen: Counter[str] = Counter()
    for before, body in bodies:
        for node in body:
            if not _is_helper(node):
                stem = before + (node.name or f"{node.op_type} of {node.outputs[0].name if node.outputs else ''}")
                seen[stem] += 1
                names[node] = stem if seen[stem] == 1 else f"{stem} #{seen[stem]}"
    return names


def _is_helper(node: ir.Node) -> bool:
    return node.op_type in _QUANTIZERS or (node.op_type == "Constant" and node.domain == "")


def _port(kind: str, value: ir.Value, types: ElementTypes, sources: tuple[str, ...]) -> Facts:
    shape = "?" if value.shape is None else ", ".join(str(axis) for axis in value.shape)
    scales = tuple(_pairs(kind, value)) if sources else ()
    return Facts(kind, {}, sources, (f"{dtype_name(types.of(value))}[{shape}]",), scales, ())


def _facts(
    node: ir.Node, names: Mapping[ir.Node, str], types: ElementTypes, typed: list[ir.Value | None] | None
) -> Facts:
    """Facts of a node; ``typed`` are the inputs whose types are its precision, all of them where it is ``None``."""
    inline = _INLINE.get(node.op_type, ())
    parameters = {place for _, *pair in inline for place in pair}
    read = {number: value for number, value in enumerate(node.inputs) if number not in parameters}
    scales = [
        scale for number, value in read.items() if value is not None for scale in _pairs(f"input {number}", value)
    ]
    scales += [_scale(place, node, one, other) for place, one, other in inline]
    tensors = (constant(_behind(value)[0]) for value in read.values() if value is not None)
    typed = list(read.values()) if typed is None else typed
    return Facts(
        op=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
        attributes={name: _text(attribute) for name, attribute in node.attributes.items() if not _is_graph(attribute)},
        sources=tuple(_source(value, names) for value in read.values()),
        precision=tuple("nothing" if value is None else dtype_name(types.stored(value)) for value in typed),
        scales=tuple(scales),
        weights=tuple(tensor for tensor in tensors if tensor is not None),
    )


def _behind(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """The value that quantizers make this one from, and these."""
    pairs = []
    while (node := value.producer()) is not None and node.op_type in _QUANTIZERS and node.inputs[0] is not None:
        pairs.append(node)
        value = node.inputs[0]
    return value, pairs


def _pairs(place: str, value: ir.Value) -> Iterator[Scale]:
    for node in _behind(value)[1]:
        form = "".join(f", {name} {node.attributes[name].value}" for name in sorted(node.attributes))
        yield _scale(f"{place}{form}", node, 1, 2)


def _scale(place: str, node: ir.Node, scale: int, zero: int | None) -> Scale:
    def numbers(number: int | None) -> NDArray[np.float64] | None:
        found = array(node.inputs[number]) if number is not None and number < len(node.inputs) else None
        return None if found is None else np.asarray(found, np.float64)

    return Scale(place, numbers(scale), numbers(zero))


def _source(value: ir.Value | None, names: Mapping[ir.Node, str]) -> str:
    """Name of the node behind quantizers and which of its outputs; what is no node begins with ``=``."""
    if value is None:
        return "="
    value = _behind(value)[0]
    if constant(value) is not None:
        return "=a constant"
    node = value.producer()
    if node is None or node not in names:
        return f"=input {value.name}"
    number = value.index() or 0
    return f"{names[node]}\0output {number}" if number else names[node]


def _is_graph(attribute: Any) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _text(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.TENSOR:
        return _digest(attribute.as_tensor())
    return str(attribute.value)
