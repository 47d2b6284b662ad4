"""Give a decoder whose caches grow by Concat the portable layout, where caches are written in place.

Old layout (optimum, transformers and their like): ``input_ids``, ``attention_mask``, often ``position_ids``, and
``past_key_values.{i}.key`` and ``.value`` [batch, key heads, past, size] to ``logits`` and ``present.{i}.*`` [batch,
key heads, past + sequence, size]. New layout: ``qexport.passes.portable``.

This changes the inputs, so outputs cannot be compared on the same feeds and it is no step of a recipe: a front door
calls ``to_portable`` and proves the result by decoding with both graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qexport.errors import ModelInvalid
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.caching.calls import Calls
from qexport.passes.caching.check import measure
from qexport.passes.caching.parts import RefusalError, find_caches, find_ends
from qexport.passes.caching.positions import find_stands, live_nodes
from qexport.passes.caching.write import APPENDED, Layer, Writer
from qexport.passes.portable import CACHED_OPSET, IDS, MASK, POSITIONS, WRITE

IR_VERSION = 11  # the one of opset 24
_HINT = "export the model from its Hugging Face folder, or with optimum's text-generation-with-past"


@dataclass(frozen=True)
class KvCache(Pass):
    """Write new keys and values into caches of a fixed size, instead of appending them.

    1. What lies between the queries, the cached keys and the weights is run for a few made-up calls, and must be
       scaled products, masked by causality alone or by a window of positions; so must be what follows up to the
       product with the values. An Attention node is run as a whole.
    2. Per layer TensorScatter writes into the caches, and one Attention reads them, with fewer key heads where heads
       were repeated, and with a mask that is made from ``position_ids``.
    3. Positions that were counted from ``attention_mask`` or the length of the past become ``position_ids``.
       ``attention_mask`` goes; a graph that uses either for anything else is refused.

    A window is found where it is an integer constant that the mask is computed from, and the caches of so many tokens
    are not too large to make up; a window that cannot be seen so makes the result see too much. What ``attention_mask``
    does to padding in front of a row is dropped: rows of the new layout begin at their first token.
    """

    exact: ClassVar[bool] = False

    def call(self, model: ir.Model) -> Outcome:
        """Rewrite a clone and adopt it when that worked, so a refusal leaves the model as it was.

        Needs opset 24 (``raise_opset`` gets there) and inferred shapes (``cleanup`` does it).
        """
        if any(value.name == WRITE for value in model.graph.inputs):
            return Outcome(model, False)
        work = model.clone()
        try:
            decisions = _rewrite(work)
        except RefusalError as error:
            return Outcome(model, False, (error.decision,))
        model.graph = work.graph
        model.ir_version = IR_VERSION
        return Outcome(model, True, decisions)


def to_portable(model: ir.Model) -> Outcome:
    """Bring an exporter's decoder to opset 24 and the portable layout, in place.

    Raises:
        ModelInvalid: It cannot be rewritten; the node and the reason are named, and the graph is as it was.
    """
    from qexport.passes.cleanup import Cleanup
    from qexport.passes.raise_opset import RaiseOpset

    work = model.clone()
    outcome = Outcome(work, False)
    for step in (Cleanup(), RaiseOpset(CACHED_OPSET), KvCache()):
        outcome = step(work)  # type: ignore[assignment]  # the base class promises less
        skipped = [decision for decision in outcome.decisions if decision.action == "skipped"]
        if skipped and not isinstance(step, Cleanup):
            where = f"{skipped[0].node} ({skipped[0].op})"
            raise ModelInvalid(f"no portable cache layout: {skipped[0].reason}", where=where, hint=_HINT)
    model.graph, model.ir_version = work.graph, work.ir_version
    model.functions.clear()
    return Outcome(model, outcome.modified, outcome.decisions)


def _rewrite(model: ir.Model) -> tuple[Decision, ...]:
    """Find everything first, then edit."""
    graph = model.graph
    opset = model.opset_imports.get("", 1)
    if opset < CACHED_OPSET:
        raise RefusalError(None, f"needs opset {CACHED_OPSET}, model has {opset}")
    caches = find_caches(graph)
    calls = Calls(graph, [cache.past for cache in caches], [cache.present for cache in caches])
    layers = [Layer(ends, *measure(ends, calls)) for ends in find_ends(caches)]
    logits = next(value for value in graph.outputs if value not in {cache.present for cache in caches})
    forbidden = [cache.present for cache in caches]
    forbidden += [value for value in graph.inputs if value.name not in (IDS, POSITIONS)]
    hops = {layer.ends.context: layer.ends.query for layer in layers}
    live = live_nodes([logits, *(cache.new for cache in caches)], hops)
    stands = find_stands(live, forbidden, calls)
    Writer(graph, layers, logits).write(stands)
    _check_gone(forbidden)
    return tuple(_decision(layer) for layer in layers)


def _check_gone(left: Sequence[ir.Value]) -> None:
    """Refuse what still reads a value that is not there any more."""
    for value in left:
        for node in value.consumers():
            name = str(value.name).removesuffix(APPENDED)
            wanted = "the mask and positions" if name == MASK else "attention and positions"
            raise RefusalError(node, f"{name} has other uses than {wanted}")


def _decision(layer: Layer) -> Decision:
    sight = "all positions" if layer.window is None else f"a window of {layer.window} positions"
    node = layer.ends.product
    return Decision(
        node.name or "", node.op_type, "fused", f"attention to a cache, {sight}", f"scale {layer.scale:.4g}"
    )
