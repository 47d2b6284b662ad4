"""Element types of all values of a graph, also of those that it does not say: one walk, no clone, no shapes.

What an operator makes follows from its schema: a type of its own, that of an input, or one that an attribute names.
Subgraphs and functions are walked where they are used, so that their values are typed as well. Shape inference would
tell the same, from a second copy of the model and back through a third.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

_NAMING = ("to", "dtype", "output_dtype", "output_datatype", "stash_type")
"""Attributes that name the type of an output."""

_ONNX = ("", "ai.onnx")
_TENSOR = "tensor("
_OUTSIDE = {
    "MatMulIntegerToFloat": 2,
    "DynamicQuantizeMatMul": 0,
    "MatMulNBits": 0,
    "MatMulBnb4": 0,
    "QuantizeLinear": 2,
    "DequantizeLinear": 1,
    "FusedMatMul": 0,
}
"""Operators without a schema here, and the input whose type they make."""

MOVING = frozenset({"Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators that stand between a DequantizeLinear and its layer without computing anything."""

_Open = tuple[ir.Node | None, Iterator[ir.Node], Mapping[str, int]]  # whose bodies, what is left of them, versions


@dataclass(slots=True)
class ElementTypes:
    """Types by value.

    Attributes:
        found: Of values whose type the graph does not say; those of a function are as in its last call.
        behind: What a DequantizeLinear reads, for everything that is its output, moved about at most.
    """

    found: dict[ir.Value, ir.DataType]
    behind: dict[ir.Value, ir.DataType]

    def of(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type of a value; ``None`` where it is no tensor, or nothing tells."""
        return None if value is None else value.dtype or self.found.get(value)

    def stored(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type that carries ``value``: the integers of a DequantizeLinear, else its own type."""
        return None if value is None else self.behind.get(value) or self.of(value)


def element_types(model: ir.Model) -> ElementTypes:
    """Type every value of a sorted model, which is not changed; time is linear in the nodes, calls expanded."""
    types = ElementTypes({}, {})
    waiting: list[_Open] = [(None, iter(model.graph), model.opset_imports)]
    while waiting:
        owner, nodes, opsets = waiting[-1]
        node = next(nodes, None)
        if node is None:
            waiting.pop()
            if owner is not None:
                _leave(types, owner, _bodies(owner, model))
            continue
        bodies = _bodies(node, model)
        if bodies:
            _enter(types, node, bodies)
            inside = next((body.opset_imports for body in bodies if isinstance(body, ir.Function)), opsets)
            waiting.append((node, chain.from_iterable(bodies), inside))
        else:
            _note(types, node, _version(node.domain, opsets))
    return types


def _version(domain: str, opsets: Mapping[str, int]) -> int:
    """The version of a domain; the standard one has two spellings."""
    return next((opsets[name] for name in (_ONNX if domain in _ONNX else (domain,)) if name in opsets), 0)


def _bodies(node: ir.Node, model: ir.Model) -> Sequence[ir.Graph | ir.Function]:
    """What runs inside a node: its subgraphs, or the function that it calls."""
    called = model.functions.get(node.op_identifier()) if model.functions else None
    if called is not None:
        return (called,)
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            found.extend(attribute.as_graphs())
    return found


def _enter(types: ElementTypes, node: ir.Node, bodies: Sequence[ir.Graph | ir.Function]) -> None:
    """Hand types to the inputs of a body; those of Loop, Scan and functions are aligned with the node's."""
    for body in bodies:
        for inner, outer in zip(body.inputs, node.inputs, strict=False):
            _set(types, inner, types.of(outer))


def _leave(types: ElementTypes, node: ir.Node, bodies: Sequence[ir.Graph | ir.Function]) -> None:
    """Hand types to the outputs of a node; the first output of a Loop's body is its condition."""
    skipped = 1 if node.op_type == "Loop" and node.domain in _ONNX else 0
    for place, value in enumerate(node.outputs):
        made = (body.outputs[place + skipped] for body in bodies if place + skipped < len(body.outputs))
        _set(types, value, next(filter(None, map(types.of, made)), None))


def _set(types: ElementTypes, value: ir.Value, dtype: ir.DataType | None) -> None:
    if value.dtype is not None:
        return
    if dtype is None:
        types.found.pop(value, None)
    else:
        types.found[value] = dtype


def _note(types: ElementTypes, node: ir.Node, version: int) -> None:
    """Type what a node makes, and keep what is behind it in sight."""
    rule = _rule(node.op_type, node.domain, version)
    for place, value in enumerate(node.outputs):
        if value.dtype is None:
            _set(types, value, _made(types, node, rule, place))
    source = node.inputs[0] if node.inputs else None
    if source is None or not node.outputs:
        return
    if node.op_type == "DequantizeLinear":
        behind = types.of(source)
    else:
        behind = types.behind.get(source) if node.op_type in MOVING else None
    if behind is not None:
        types.behind[node.outputs[0]] = behind


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a schema says: the type variable or type of each formal input and output, the last ones repeated.

    Attributes:
        only: Type variables that stand for one type.
        defaults: Attributes that name a type, with their defaults.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    only: Mapping[str, ir.DataType]
    defaults: Mapping[str, int]


@functools.cache
def _rule(op_type: str, domain: str, version: int) -> _Rule | None:
    """Read a schema once; the look-up is slow."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "" if domain in _ONNX else domain)
    except onnx.defs.SchemaError:
        return None
    texts = {entry.type_param_str: tuple(entry.allowed_type_strs) for entry in schema.type_constraints}
    formals = [*_texts(schema.inputs), *_texts(schema.outputs)]
    texts |= {text: (text,) for text in formals if text not in texts}
    return _Rule(
        tuple(_texts(schema.inputs)),
        tuple(_texts(schema.outputs)),
        {name: dtype for name, told in texts.items() if len(told) == 1 and (dtype := _dtype(told[0]))},
        {name: schema.attributes[name].default_value.i for name in _NAMING if name in schema.attributes},
    )


def _texts(formals: Iterable[OpSchema.FormalParameter]) -> Iterator[str]:
    return (formal.type_str for formal in formals)


def _dtype(text: str) -> ir.DataType | None:
    """The type behind ``tensor(float16)``; ``None`` for sequences and the like."""
    if not text.startswith(_TENSOR):
        return None
    return ir.DataType.__members__.get(text.removeprefix(_TENSOR).rstrip(")").upper())


def _made(types: ElementTypes, node: ir.Node, rule: _Rule | None, place: int) -> ir.DataType | None:
    """The type of one output of a node without bodies."""
    if rule is None or not rule.outputs:
        source = _OUTSIDE.get(node.op_type)
        return None if source is None or source >= len(node.inputs) else types.of(node.inputs[source])
    wanted = rule.outputs[min(place, len(rule.outputs) - 1)]
    if wanted in rule.only:
        return rule.only[wanted]
    alike = [value for value, text in _with_texts(node, rule) if text == wanted]
    if alike:
        return next(filter(None, map(types.of, alike)), None)
    return _named(node, rule) or _unbound(types, node)


def _with_texts(node: ir.Node, rule: _Rule) -> Iterator[tuple[ir.Value, str]]:
    """The inputs that are there, with the type variable of each."""
    last = len(rule.inputs) - 1
    for place, value in enumerate(node.inputs):
        if value is not None and last >= 0:
            yield value, rule.inputs[min(place, last)]


def _named(node: ir.Node, rule: _Rule) -> ir.DataType | None:
    """The type that an attribute names, by itself or by its default."""
    codes = (node.attributes.get_int(name, default) for name, default in rule.defaults.items())
    code = next((code for code in codes if code), 0)
    try:
        return ir.DataType(code) if code else None
    except ValueError:
        return None


def _unbound(types: ElementTypes, node: ir.Node) -> ir.DataType | None:
    """The type of an output that neither an input nor a number in an attribute tells."""
    if node.op_type == "QuantizeLinear":
        return ir.DataType.UINT8
    if node.op_type in ("Constant", "ConstantOfShape"):
        return _constant(node)
    source = 1 if node.op_type == "DequantizeLinear" else 0
    return types.of(node.inputs[source]) if source < len(node.inputs) else None


def _constant(node: ir.Node) -> ir.DataType | None:
    """What a Constant holds, or what ConstantOfShape repeats: a float where nothing is said."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        if attribute.type == ir.AttributeType.TENSOR:
            return attribute.as_tensor().dtype
        if name.startswith("value_"):
            kind = name.removeprefix("value_").removesuffix("s")
            return {"float": ir.DataType.FLOAT, "int": ir.DataType.INT64, "string": ir.DataType.STRING}.get(kind)
    return ir.DataType.FLOAT if node.op_type == "ConstantOfShape" else None
