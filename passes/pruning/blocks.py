"""Find residual blocks and the layers that they make up, and remove them for real.

A block adds something to a value, or normalizes the sum: ``exit = entry + f(entry)`` as in networks with the
normalization in front, ``exit = norm(entry + f(entry))`` where a normalization made ``entry`` too, as in BERT, and
``exit = relu(entry + f(entry))`` behind a Relu, as in residual networks. Whoever reads the exit can read the entry
instead, and everything else of the block leaves the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from qexport.passes.folding.activation import ACTIVATION_KEY
from qexport.passes.match import Names, constant, dims, maker, producer, same_dims, sweep
from qexport.passes.numbers.notes import forget_range
from qexport.passes.pruning.flow import SIZES, Flow
from qexport.passes.pruning.labels import Blocked
from qexport.passes.pruning.spaces import ATTENTIONS, attends

SUMS = ("Add", "Sum")
THROUGH = ("Identity", "Dropout")
LAYOUT = ("Transpose", "Reshape", "Concat", "Identity", "Cast", "Unsqueeze", "Squeeze", "Slice", "ScatterND")
NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "ReduceMean")
CLAMPS = ("Relu", "Clip")
SMALL = {*NORMS, *CLAMPS, *THROUGH, "Sub", "Pow", "Mul", "Add", "Div", "Sqrt", "Reciprocal", "Cast"}
LONGEST = 12  # nodes that spell a normalization
IMAGES = ("Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization")
PRODUCTS = ("MatMul", "Gemm", "Einsum")
WORK = {*IMAGES, *PRODUCTS, "AveragePool", "MaxPool", "DFT", "LSTM", "GRU", "RNN"}
WORK |= {op for ops in ATTENTIONS.values() for op in ops}

CACHE = "its cache is an output of the model"
INNER = "a value inside it is an output of the model"
READ = "something outside reads a value inside it"
SIZED = "something outside reads the size of a value inside it"


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What lies between two values of which the second is the first with something added to it.

    Attributes:
        name: The node that adds, the last one of a layer.
        entry: What it reads; masks, positions and the like may come in besides.
        exit: What it makes, of the shape and type of ``entry``.
        nodes: All that depends on the entry and that the exit depends on, in the order of the graph.
        refusal: Why it cannot be removed; ``None`` if it can.
    """

    name: str
    entry: ir.Value
    exit: ir.Value
    nodes: tuple[ir.Node, ...]
    refusal: str | None = None

    @property
    def attends(self) -> bool:
        """Whether it holds an attention."""
        return any(attends(node) for node in self.nodes)

    @property
    def axis(self) -> int:
        """The axis of the channels in entry and exit: 1 of images, else the last one."""
        first = any(node.op_type in IMAGES and node.inputs[0] is self.entry for node in self.nodes)
        ops = {node.op_type for node in self.nodes}
        return 1 if first or (ops & set(IMAGES) and not ops & set(PRODUCTS)) else -1

    @property
    def is_private(self) -> bool:
        """Whether nothing but the block reads its entry."""
        inside = set(self.nodes)
        return not self.entry.is_graph_output() and all(reader in inside for reader in self.entry.consumers())


def find_blocks(model: ir.Model) -> tuple[Block, ...]:
    """Find all residual blocks of the main graph, in its order; also those that must stay, with a reason.

    Sizes that the model leaves open count as equal where entry and exit both do: a sum has the size of its entry unless
    that is 1. A block around a row of blocks gives way to them; one around a single block contains it.
    """
    flow = Flow(model.graph)
    found: list[Block] = []
    covered: set[ir.Node] = set()
    for node in reversed(model.graph):
        if node.domain == "" and node.op_type in SUMS and node not in covered:
            terms, inner = _terms(node)
            block = _block(flow, node, terms)
            if block is not None:
                covered |= inner
                found.append(block)
    return tuple(_innermost(found[::-1]))


def find_layers(model: ir.Model) -> tuple[Block, ...]:
    """Find the layers: blocks in a row, from one that holds an attention up to the next that does.

    Blocks that stand in no row behind an attention are layers of their own.
    """
    flow = Flow(model.graph)
    rows: list[list[Block]] = []
    ends: dict[ir.Value, list[Block]] = {}
    for block in find_blocks(model):
        row = ends.get(block.entry)
        if block.attends or row is None or not row[0].attends or row[-1].exit is not block.entry:
            row = []
            rows.append(row)
        row.append(block)
        ends[block.exit] = row
    return tuple(_joined(flow, row) for row in rows)


def remove(block: Block) -> None:
    """Let all readers of the exit read the entry, and take what is left without readers out of the model.

    An output that the exit was keeps its name. What was measured of values behind the block is void.

    Raises:
        Blocked: The block cannot be removed; the model is as it was.
    """
    entry, out = block.entry, block.exit
    graph = maker(out).graph
    assert isinstance(graph, ir.Graph)
    flow = Flow(graph)
    reason, sizes, dead = _strays(flow, entry, out, block.nodes)
    if reason is not None:
        raise Blocked(reason)
    for value in (value for node in flow.behind(flow.readers(out)) for value in node.outputs):
        forget_range(value)
        value.meta.pop(ACTIVATION_KEY, None)
    for node in sizes:
        node.replace_input_with(0, entry)
    sweep([value for node in dead for value in node.outputs])
    name = out.name if out.is_graph_output() else None
    heir = _heir(graph, block) if name is not None else entry
    if name is not None:
        graph.outputs[list(graph.outputs).index(out)] = heir
    out.replace_all_uses_with(entry)
    sweep([out])
    if name is not None:
        out.name, heir.name = None, name


def _heir(graph: ir.Graph, block: Block) -> ir.Value:
    """What is the output of the model that the exit was: the entry, or a copy where that has a name of its own."""
    entry, out = block.entry, block.exit
    heir = entry
    if entry.is_graph_input() or entry.is_graph_output():
        copy = ir.node("Identity", [entry], name=Names(graph).fresh(f"{block.name}/removed"))
        graph.insert_after(maker(out), copy)
        heir = copy.outputs[0]
    heir.type, heir.shape = out.type, out.shape
    return heir


def _terms(node: ir.Node) -> tuple[list[ir.Value], set[ir.Node]]:
    """The computed values that a sum adds up, and the nodes that do it."""
    out, terms, inner, todo = node.outputs[0], list[ir.Value](), {node}, [node]
    while todo:
        one = todo.pop()
        for value in one.inputs[:1] if one.op_type in THROUGH else one.inputs:
            made = producer(value, *SUMS, *THROUGH)
            if value is None or constant(value) is not None:
                continue
            if made is not None and len(value.uses()) == 1 and not value.is_graph_output() and _fits(value, out):
                inner.add(made)
                todo.append(made)
            else:
                terms.append(value)
    return terms, inner


def _fits(entry: ir.Value, out: ir.Value) -> bool:
    """Whether two values have the same type and rank, and sizes that may be the same."""
    one, other = dims(entry), dims(out)
    if one is None or other is None or len(one) != len(other) or entry.dtype != out.dtype:
        return False
    return all(a == b or not (isinstance(a, int) or isinstance(b, int)) for a, b in zip(one, other, strict=True))


def _block(flow: Flow, node: ir.Node, terms: list[ir.Value]) -> Block | None:
    """The block whose sum a node makes, if one of the terms is what all others are computed from."""
    entries = (term for term in terms if all(flow.depends(other, term) for other in terms if other is not term))
    entry = next(entries, None) if len(set(terms)) > 1 else None
    if entry is None or not _fits(entry, node.outputs[0]):
        return None
    inside = flow.between(entry, node)
    if not any(one.op_type in WORK for one in inside):
        return None  # a function of single numbers, such as x + 0.04 x^3
    behind = _normalized(flow, entry, node.outputs[0])
    nodes = flow.sorted({*inside, *behind})
    out = (behind[-1] if behind else node).outputs[0]
    name = node.name or str(node.outputs[0].name)
    return Block(name, entry, out, nodes, _strays(flow, entry, out, nodes)[0])


def _normalized(flow: Flow, entry: ir.Value, total: ir.Value) -> list[ir.Node]:
    """The nodes that alone read the sum and do to it what was done to make the entry: a normalization, or a Relu."""
    region: list[ir.Node] = []
    known = {total}
    for node in flow.onward(total):
        inputs = [value for value in flow.reads[node] if constant(value) is None]
        if node.op_type not in SMALL or not known.issuperset(inputs) or len(region) == LONGEST:
            break
        region.append(node)
        known.update(node.outputs)
        last = node.outputs[0]
        open_ends = (value for value in known if value is not last)
        closed = not any(v.is_graph_output() or set(flow.readers(v)) - set(region) for v in open_ends)
        ops = Counter(one.op_type for one in region)
        if closed and _fits(entry, last) and _is_norm(ops) and ops == flow.makers(entry, len(region)):
            return region
    return []


def _is_norm(ops: Counter[str]) -> bool:
    return any(op in ops for op in NORMS) or set(ops) <= {*CLAMPS}


def _innermost(blocks: list[Block]) -> Iterator[Block]:
    """Leave out blocks around a row of others, and single ones within another."""
    within = {one: [b for b in blocks if b is not one and set(b.nodes) < set(one.nodes)] for one in blocks}
    rows = {one for one in blocks if any(b.entry is a.exit for a in within[one] for b in within[one])}
    held = {block for one in blocks if one not in rows for block in within[one]}
    yield from (block for block in blocks if block not in rows and block not in held)


def _joined(flow: Flow, row: list[Block]) -> Block:
    if len(row) == 1:
        return row[0]
    assert all(one.exit is other.entry for one, other in pairwise(row))
    entry, out = row[0].entry, row[-1].exit
    nodes = tuple(node for block in row for node in block.nodes)
    return Block(row[-1].name, entry, out, nodes, _strays(flow, entry, out, nodes)[0])


def _strays(
    flow: Flow, entry: ir.Value, out: ir.Value, nodes: Iterable[ir.Node]
) -> tuple[str | None, list[ir.Node], list[ir.Node]]:
    """Why others need what lies between; else who may ask the entry for its size, and who computes for nobody."""
    inside, sizes, dead = set(nodes), list[ir.Node](), list[ir.Node]()
    for value in (value for node in nodes for value in node.outputs if value is not out):
        if _is_shown(flow, value, inside):
            return (CACHE if _is_cache(flow, value, inside) else INNER), [], []
        for reader in (reader for reader in flow.readers(value) if reader not in inside):
            ahead = flow.behind([reader], inside)
            if not any(end.is_graph_output() for node in ahead for end in node.outputs):
                dead += ahead
            elif reader.op_type not in SIZES:
                return READ, [], []
            elif not same_dims(dims(value) or (None,), dims(entry) or ()):
                return SIZED, [], []
            else:
                sizes.append(reader)
    return None, sizes, dead


def _is_shown(flow: Flow, value: ir.Value, inside: set[ir.Node]) -> bool:
    """Whether a value is an output of the model, at most laid out differently."""
    readers = (r for r in flow.readers(value) if r not in inside and r.op_type in LAYOUT)
    return value.is_graph_output() or any(_is_shown(flow, r.outputs[0], inside) for r in readers)


def _is_cache(flow: Flow, value: ir.Value, inside: set[ir.Node]) -> bool:
    """Whether an attention of the block reads a value, or makes it besides its result."""
    made = value.producer()
    return (made is not None and attends(made) and value is not made.outputs[0]) or any(
        attends(node) for reader in flow.readers(value) if reader in inside for node in flow.behind([reader]) & inside
    )
