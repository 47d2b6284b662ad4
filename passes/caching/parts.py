"""The parts of a decoder graph with caches that grow by Concat, and where the layers begin and end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qexport.passes import match
from qexport.passes.base import Decision
from qexport.passes.portable import IDS, LOGITS, MASK, POSITIONS

MERGED = "use_cache_branch"
_SHAPES = ("Shape", "Size")
_PRODUCTS = ("MatMul", "Attention")


class RefusalError(Exception):
    """The graph cannot be rewritten; ``decision`` says where and why."""

    def __init__(self, where: ir.Node | ir.Value | None, reason: str) -> None:
        super().__init__(reason)
        op = where.op_type if isinstance(where, ir.Node) else "Graph" if where is None else "Value"
        self.decision = Decision("" if where is None else where.name or "", op, "skipped", reason)


@dataclass(frozen=True, eq=False)
class Cache:
    """A cache input [batch, key heads, past, size], what is appended to it, and both together."""

    past: ir.Value
    new: ir.Value
    present: ir.Value
    heads: int
    dim: int


@dataclass(frozen=True, eq=False)
class Ends:
    """Where one attention begins and ends.

    Attributes:
        keys: Cache of keys.
        values: Cache of values.
        scores: The product of queries and keys, or an Attention node.
        softmax: The Softmax behind it, ``None`` in an Attention node.
        product: The product with the values, or the same Attention node.
        query: [batch, heads, sequence, size].
        context: The same.
    """

    keys: Cache
    values: Cache
    scores: ir.Node
    softmax: ir.Node | None
    product: ir.Node
    query: ir.Value
    context: ir.Value


def find_caches(graph: ir.Graph) -> list[Cache]:
    """The caches in the order of the outputs; every input and output must be known.

    Raises:
        RefusalError: There are none, or an input or output is something else.
    """
    caches = [cache for value in graph.outputs if (cache := _cache(value)) is not None]
    known = {cache.past for cache in caches} | {value for value in graph.inputs if value.name in (IDS, MASK, POSITIONS)}
    merged = next((value for value in graph.inputs if value.name == MERGED), None)
    if merged is not None:
        raise RefusalError(merged, "a merged decoder, give decoder_with_past_model.onnx or export without merging")
    for value in graph.inputs:
        if value not in known:
            raise RefusalError(value, "neither an input of a decoder, nor a cache that grows by Concat along axis 2")
    if not caches or IDS not in {value.name for value in graph.inputs}:
        raise RefusalError(None, f"no decoder with caches and {IDS}")
    rest = [value for value in graph.outputs if value not in {cache.present for cache in caches}]
    if len(rest) != 1:
        raise RefusalError(next((value for value in rest if value.name != LOGITS), None), "not just logits and caches")
    return caches


def _cache(present: ir.Value) -> Cache | None:
    node = match.producer(present, "Concat", "Attention")
    if node is None:
        return None
    if node.op_type == "Attention":
        place = present.index() or 0
        fits = place in (1, 2) and len(node.inputs) > 5
        past, new = (node.inputs[place + 3], node.inputs[place]) if fits else (None, None)
    else:
        fits = len(node.inputs) == 2 and node.attributes.get_int("axis", 0) in (2, -2)
        past, new = node.inputs if fits else (None, None)
    sizes = match.dims(past)
    if past is None or new is None or not past.is_graph_input() or sizes is None or len(sizes) != 4:
        return None
    heads, dim = sizes[1], sizes[3]
    return Cache(past, new, present, heads, dim) if isinstance(heads, int) and isinstance(dim, int) else None


def find_ends(caches: list[Cache]) -> list[Ends]:
    """The attentions in the order of their keys among the outputs.

    Raises:
        RefusalError: A cache is read in another way.
    """
    readers: dict[ir.Node, list[Cache]] = {}
    for cache in caches:
        readers.setdefault(_reader(cache), []).append(cache)
    found = [ends for node in readers if (ends := _ends(node, readers)) is not None]
    used = {cache for ends in found for cache in (ends.keys, ends.values)}
    for cache in caches:
        if cache not in used:
            raise RefusalError(cache.present, "this cache does not end in attention")
    return sorted(found, key=lambda ends: caches.index(ends.keys))


def _reader(cache: Cache) -> ir.Node:
    """The one product or Attention that reads a cache, maybe with repeated heads."""
    own = match.producer(cache.present, "Attention")
    if own is not None:
        return own
    found, todo = dict[ir.Node, None](), [cache.present]
    while todo:
        for node in todo.pop().consumers():
            if node.op_type in _PRODUCTS:
                found[node] = None
            elif node.op_type not in _SHAPES:
                todo.extend(node.outputs)
    if len(found) != 1:
        raise RefusalError(cache.present, f"this cache is read by {len(found)} products")
    return next(iter(found))


def _ends(node: ir.Node, readers: dict[ir.Node, list[Cache]]) -> Ends | None:
    """The attention that ends at ``node``, ``None`` at a product with keys."""
    caches = readers[node]
    if node.op_type == "Attention":
        if len(caches) != 2 or node.inputs[0] is None or len(match.dims(node.inputs[0]) or ()) != 4:
            raise RefusalError(node, "not two caches, or queries not of four axes")
        first = _behind(node.inputs[1], caches[0], node)
        keys, values = caches if first else reversed(caches)
        return Ends(keys, values, node, None, node, node.inputs[0], node.outputs[0])
    if len(caches) != 1:
        raise RefusalError(node, "reads two caches")
    softmax = _backwards(node.inputs[0], lambda other: other.op_type == "Softmax")
    if softmax is None:
        return None
    scores = _backwards(softmax.inputs[0], lambda other: other in readers)
    rank = len(match.dims(softmax.inputs[0]) or (0, 0, 0, 0))
    if scores is None or softmax.attributes.get_int("axis", -1) not in (-1, rank - 1):
        raise RefusalError(softmax, "not over products with cached keys")
    return Ends(readers[scores][0], caches[0], scores, softmax, node, _query(scores), _context(node))


def _behind(value: ir.Value | None, cache: Cache, node: ir.Node) -> bool:
    """Whether a cache is what ``value``, an input of ``node``, is made of."""
    if cache.present.producer() is node:
        return value is cache.new
    writer = cache.present.producer()
    return value is cache.present or _backwards(value, lambda other: other is writer) is not None


def _backwards(value: ir.Value | None, wanted: Callable[[ir.Node], bool]) -> ir.Node | None:
    """The nearest node behind ``value`` that is wanted; shapes and products are not looked behind."""
    todo, seen = [value], set[ir.Node]()
    while todo:
        last = todo.pop(0)
        node = None if last is None else last.producer()
        if node is None or node in seen:
            continue
        if wanted(node):
            return node
        seen.add(node)
        if node.op_type not in (*_SHAPES, *_PRODUCTS):
            todo.extend(node.inputs)
    return None


def _query(scores: ir.Node) -> ir.Value:
    """Queries as they enter, or before batch and heads were put into one axis."""
    value = scores.inputs[0]
    if value is not None and len(match.dims(value) or ()) == 3:
        merged = match.producer(value, "Reshape")
        value = None if merged is None else merged.inputs[0]
    if value is None or len(match.dims(value) or ()) != 4:
        raise RefusalError(scores, "queries are not of four axes")
    return value


def _context(product: ir.Node) -> ir.Value:
    value = product.outputs[0]
    if len(match.dims(value) or ()) == 3:
        split = [node.outputs[0] for node in value.consumers() if node.op_type == "Reshape"]
        value = split[0] if len(split) == 1 else value
    if len(match.dims(value) or ()) != 4:
        raise RefusalError(product, "its result is not of four axes")
    return value
