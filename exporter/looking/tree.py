"""A model as a tree of the names of its nodes: which block holds how many of them, and how much of the weights.

Names are cut at ``/`` and ``.``. Blocks that hold nothing but one other block share a line with it. The tree is a list
of lines, each with its depth: names may nest ten thousand deep, and nothing here nests with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from qexport.errors import printable
from qexport.exporter.looking.inspect import Layer
from qexport.exporter.outcome.summary import human_bytes

DEPTH = 3
MOST = 40  # lines below one block
SEPARATORS = "/."
_WIDEST = 60  # characters of a name


class Branch(BaseModel):
    """One line of the tree: all nodes whose name begins with ``path``.

    Attributes:
        depth: 0 for the whole model.
        name: The end of the path, as seen from the line above it.
        path: Where it is; empty for the whole model, and for a line that stands for several.
        blocks: How many blocks the line stands for: more than 1 where they were too many to be listed.
        nodes: How many.
        parameters: Elements of initializers that they are the first to read; unused ones count for the whole alone.
        bytes: Of these.
        precision: ``activation x weight`` to number of layers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int
    name: str
    path: str
    blocks: int
    nodes: int
    parameters: int
    bytes: int
    precision: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A node: its name, the initializers it counts for, and its precision if it is a layer."""

    name: str
    parameters: int
    bytes: int
    precision: str


@dataclass(frozen=True, slots=True)
class _Block:
    """Nodes whose names begin alike.

    Attributes:
        depth: Of its line.
        start: How many characters of the names the lines above it have told.
        end: How many they have told with its own.
        leaves: Its nodes.
        blocks: How many blocks these are.
    """

    depth: int
    start: int
    end: int
    leaves: Sequence[_Leaf]
    blocks: int = 1


def name_tree(model: ir.Model, layers: Iterable[Layer], depth: int = DEPTH) -> tuple[Branch, ...]:
    """The lines of the tree from the top, each block before what is in it, blocks in the order of the graph.

    Args:
        model: The model, its nodes named.
        layers: Its layers, as ``inspect_model`` tells them.
        depth: How many levels below the whole model are told.
    """
    whole = _Block(0, 0, 0, list(_leaves(model, layers)))
    lines, waiting = [], [whole]
    while waiting:
        block = waiting.pop()
        lines.append(_line(block))
        if block.depth < depth and block.blocks == 1:
            waiting += reversed(_capped(_inside(block)))
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    counted = [tensor for tensor in tensors if tensor is not None]
    everything = {"parameters": sum(t.size for t in counted), "bytes": sum(t.nbytes for t in counted)}
    return (lines[0].model_copy(update={"name": model.graph.name or "model", **everything}), *lines[1:])


def _leaves(model: ir.Model, layers: Iterable[Layer]) -> Iterator[_Leaf]:
    """Every node with what it counts for; an initializer counts for the first node that reads it."""
    precision = {layer.node: layer.precision for layer in layers}
    taken: set[ir.Value] = set()
    bodies: tuple[ir.Graph | ir.Function, ...] = (model.graph, *model.functions.values())
    for node in (node for body in bodies for node in body.all_nodes()):
        mine = [value for value in node.inputs if value is not None and value.is_initializer() and value not in taken]
        taken.update(mine)
        tensors = [value.const_value for value in dict.fromkeys(mine) if value.const_value is not None]
        name = node.name or ""
        size, stored = sum(tensor.size for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
        yield _Leaf(name, size, stored, precision.get(name, "") if name else "")


def _inside(block: _Block) -> list[_Block]:
    """The blocks one level below, in the order of their first nodes; a node called like the block itself is in none."""
    groups: dict[str, list[_Leaf]] = {}
    for leaf in block.leaves if len(block.leaves) > 1 or not block.depth else ():
        if len(leaf.name) > block.end:
            groups.setdefault(leaf.name[block.end : _cut(leaf.name, block.end)], []).append(leaf)
    return [_Block(block.depth + 1, block.end, _shared(group, block.end), group) for group in groups.values()]


def _cut(name: str, start: int) -> int:
    """Where the word that begins at ``start`` ends, the separators in front of it skipped."""
    while start < len(name) and name[start] in SEPARATORS:
        start += 1
    found = [place for separator in SEPARATORS if (place := name.find(separator, start)) >= 0]
    return min(found, default=len(name))


def _shared(group: Sequence[_Leaf], start: int) -> int:
    """How far the names of a group are the same, in whole words; at least by the word that begins at ``start``."""
    names = [leaf.name for leaf in group]
    first, last = min(names), max(names)
    if first == last:
        return len(first)
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    if all(len(name) == same or name[same] in SEPARATORS for name in names):
        return same
    return max(_cut(first, start), *(first.rfind(separator, 0, same) for separator in SEPARATORS))


def _capped(blocks: list[_Block]) -> list[_Block]:
    """At most ``MOST``: what is beyond them becomes one line."""
    if len(blocks) <= MOST:
        return blocks
    rest = blocks[MOST - 1 :]
    leaves = [leaf for block in rest for leaf in block.leaves]
    return [*blocks[: MOST - 1], _Block(rest[0].depth, 0, 0, leaves, len(rest))]


def _line(block: _Block) -> Branch:
    path = block.leaves[0].name[: block.end] if block.leaves else ""
    name = path[block.start :].lstrip(SEPARATORS) or path
    return Branch(
        depth=block.depth,
        name=name if block.blocks == 1 else f"{block.blocks} more",
        path=path,
        blocks=block.blocks,
        nodes=len(block.leaves),
        parameters=sum(leaf.parameters for leaf in block.leaves),
        bytes=sum(leaf.bytes for leaf in block.leaves),
        precision=dict(Counter(leaf.precision for leaf in block.leaves if leaf.precision).most_common()),
    )


def lines(tree: Sequence[Branch]) -> Iterator[str]:
    """The tree as text: names on the left, numbers in columns."""
    names = ["  " * branch.depth + printable(branch.name, limit=_WIDEST) for branch in tree]
    rows = [
        (name, f"{branch.nodes}", f"{branch.parameters}", human_bytes(branch.bytes), _precision(branch))
        for name, branch in zip(names, tree, strict=True)
    ]
    table = [("block", "nodes", "parameters", "stored", "activation x weight"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for name, *numbers, precision in table:
        columns = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *columns, precision]).rstrip()


def _precision(branch: Branch) -> str:
    return ", ".join(f"{count} {name}" for name, count in branch.precision.items())
