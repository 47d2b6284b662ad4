"""Versions and operators: the file format, the operator sets, and every node against its schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx.defs import OpSchema

from qexport.errors import BuildFailed, ModelInvalid
from qexport.exporter.admit.functions import Key, known
from qexport.exporter.admit.subject import Body, Subject, place, quoted, standard

STANDARD_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "ai.onnx.training"})
_KINDS = frozenset(onnx.AttributeProto.AttributeType.values()) - {onnx.AttributeProto.UNDEFINED}
_GRAPHS = frozenset({onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})


@dataclass(frozen=True, slots=True)
class Shape:
    """What a schema demands of a node: counts of inputs and outputs, attributes with their types."""

    inputs: range
    outputs: range
    attributes: dict[str, int]
    required: frozenset[str]
    named: tuple[tuple[int, ...], tuple[int, ...]]  # places of inputs and outputs that may not be left out

    @classmethod
    def of(cls, schema: OpSchema) -> Shape:
        """Read a schema once; the look-up is slow."""
        return cls(
            range(schema.min_input, schema.max_input + 1),
            range(schema.min_output, schema.max_output + 1),
            {name: _code(attribute.type) for name, attribute in schema.attributes.items()},
            frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
            (_single(schema.inputs), _single(schema.outputs)),
        )


def _single(parameters: Sequence[OpSchema.FormalParameter]) -> tuple[int, ...]:
    single = OpSchema.FormalParameterOption.Single
    return tuple(place for place, parameter in enumerate(parameters) if parameter.option == single)


def _code(kind: OpSchema.AttrType) -> int:
    """The number that AttributeProto uses for an attribute type."""
    return int(kind.value)  # type: ignore[attr-defined]  # an enum, which the stubs do not say


def check_versions(subject: Subject) -> None:
    """File format and operator set versions are in the supported range; ``ModelInvalid`` with the range otherwise."""
    limits, ir = subject.limits, subject.model.ir_version
    if not limits.min_ir <= ir <= limits.max_ir:
        said = f"IR version {ir} is not supported" if ir else "the model does not say its IR version"
        raise ModelInvalid(said, hint=f"supported: {limits.min_ir} to {limits.max_ir}")
    for body in subject.bodies:
        if body.parent is None and body.runs:
            _check_imports(body, subject)


def _check_imports(body: Body, subject: Subject) -> None:
    imports = body.proto.opset_import if isinstance(body.proto, onnx.FunctionProto) else subject.model.opset_import
    limits = subject.limits
    domains = [standard(entry.domain) for entry in imports]
    hint = f"supported: opset {limits.min_opset} to {limits.max_opset}; convert with onnx.version_converter"
    if not domains:
        raise ModelInvalid("the model does not say which operator set it uses", where=body.where, hint=hint)
    if len(set(domains)) != len(domains):
        raise ModelInvalid("an operator set is imported twice", where=body.where)
    version = body.opsets.get("")
    if version is not None and not limits.min_opset <= version <= limits.max_opset:
        raise ModelInvalid(f"opset {version} is not supported", where=body.where, hint=hint)


def check_operators(subject: Subject) -> None:
    """Every node is a known operator with the inputs, outputs and attributes of its schema, or a function of the model.

    Raises:
        ModelInvalid: An operator the standard does not have at this version, or used against its schema.
        BuildFailed: An operator of a domain that is neither standard nor allowed.
    """
    functions = known(subject)
    shapes: dict[tuple[str, str, int], Shape] = {}
    for _, body in subject.running():
        if isinstance(body.proto, onnx.FunctionProto):
            _demand(_ill_formed(body.proto.attribute_proto), body.where)
        for node in body.proto.node:
            _check_node(node, body, subject, functions, shapes)


def _check_node(
    node: onnx.NodeProto,
    body: Body,
    subject: Subject,
    functions: dict[Key, int],
    shapes: dict[tuple[str, str, int], Shape],
) -> None:
    _demand(_ill_formed(node.attribute) or _astray(node.attribute, body, subject), _where(body, node))
    domain = standard(node.domain)
    local = (domain, node.op_type, node.overload) in functions
    if not local and domain not in STANDARD_DOMAINS | subject.limits.domains:
        raise BuildFailed(
            f"operator {quoted(node.op_type)} of domain {quoted(domain)} is neither ONNX nor defined in the model",
            where=_where(body, node),
            hint="replace it by standard operators in the export, or allow its domain if the target runs it",
        )
    version = body.opsets.get(domain)
    if version is None:
        raise ModelInvalid(f"the operator set {quoted(domain)} is not imported", where=_where(body, node))
    if local or domain not in STANDARD_DOMAINS:
        return
    key = (domain, node.op_type, version)
    if key not in shapes:
        shapes[key] = _shape(node, version, _where(body, node))
    _demand(_misuse(node, shapes[key]), _where(body, node))


def _demand(complaint: str | None, where: str) -> None:
    if complaint:
        raise ModelInvalid(complaint, where=where)


def _where(body: Body, node: onnx.NodeProto) -> str:
    return place(node) if body.where == "graph" else f"{body.where}, {place(node)}"


def _shape(node: onnx.NodeProto, version: int, where: str) -> Shape:
    domain = standard(node.domain)
    set_name = f"{domain or 'ai.onnx'} {version}"
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError as error:
        others = [s for s in onnx.defs.get_all_schemas_with_history() if s.name == node.op_type and s.domain == domain]
        hint = f"it exists since version {min(s.since_version for s in others)}" if others else None
        raise ModelInvalid(
            f"unknown operator {quoted(node.op_type)} of set {set_name}", where=where, hint=hint
        ) from error
    if schema.deprecated:
        raise ModelInvalid(f"operator {node.op_type!r} no longer exists in set {set_name}", where=where)
    return Shape.of(schema)


def _ill_formed(attributes: Sequence[onnx.AttributeProto]) -> str | None:
    """What is wrong with attributes, whatever the operator."""
    names = {attribute.name for attribute in attributes}
    if len(names) != len(attributes):
        return "has an attribute twice"
    if "" in names:
        return "has an attribute without a name"
    odd = next((attribute for attribute in attributes if attribute.type not in _KINDS), None)
    return None if odd is None else f"attribute {quoted(odd.name)} has the unknown type {odd.type}"


def _astray(attributes: Sequence[onnx.AttributeProto], body: Body, subject: Subject) -> str | None:
    """What is wrong with attributes that callers of a function would give; graphs are not taken that way."""
    named = [attribute for attribute in attributes if attribute.ref_attr_name]
    if not named:
        return None
    while body.parent is not None:
        body = subject.bodies[body.parent]
    if not isinstance(body.proto, onnx.FunctionProto):
        return f"attribute {quoted(named[0].name)} refers to an attribute of a function, and stands in none"
    graph = next((attribute for attribute in named if attribute.type in _GRAPHS), None)
    return None if graph is None else f"attribute {quoted(graph.name)} is a graph that a caller would give"


def _misuse(node: onnx.NodeProto, shape: Shape) -> str | None:
    """What is wrong with a node, or ``None``; attributes that start with ``__`` are private notes."""
    if odd := _miscounted("input", node.input, shape.inputs, shape.named[0]):
        return odd
    if odd := _miscounted("output", node.output, shape.outputs, shape.named[1]):
        return odd
    if shape.outputs.start and not any(node.output):
        return "writes nothing that has a name"
    missing = shape.required - {attribute.name for attribute in node.attribute}
    if missing:
        return f"lacks the attribute {min(missing)!r}"
    for attribute in node.attribute:
        expected = shape.attributes.get(attribute.name)
        if expected is None and not attribute.name.startswith("__"):
            return f"has an attribute {quoted(attribute.name)} that the operator does not know"
        if expected not in (None, attribute.type):
            return f"attribute {attribute.name!r} has the wrong type"
    return None


def _miscounted(word: str, names: Sequence[str], counts: range, places: Sequence[int]) -> str | None:
    """What is wrong with the inputs or outputs of a node."""
    if len(names) not in counts:
        return f"has {len(names)} {word}s, expected {_span(counts)}"
    empty = next((place for place in places if not names[place]), None)
    return None if empty is None else f"{word} {empty} is left out, which is not optional"


def _span(counts: range) -> str:
    low, high = counts.start, counts.stop - 1
    return str(low) if low == high else f"{low} or more" if high >= 2**30 else f"{low} to {high}"
