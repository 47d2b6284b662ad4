"""Fold a scale for each channel of a value into the constants around it: which constants those are, or why not.

``find_fold(value, axis)`` answers for a value that is to be divided by ``s``, channel by channel, without a change of
what the model computes. The division is followed upwards until parameters take it in (norms, products, convolutions,
tables, constant factors) and downwards until parameters undo it, through whatever commutes with a positive scale:
Relu, additions, reshapes, transposes, splits, the values of an attention, one factor of a product. Channels that turn
out to need the same scale, such as those of heads that share a value head, are *tied*.
"""

from __future__ import annotations

import onnx_ir as ir

from qexport.passes.folding.axes import channel_ids
from qexport.passes.folding.channel_rules import consume, produce
from qexport.passes.folding.flood import Blocked, Flood, Fold, Fork
from qexport.passes.match import dims

__all__ = ["Fold", "find_fold"]

MAX_BRANCHES = 16  # how many ways through products of two computed values are tried


def find_fold(value: ir.Value, axis: int, count: int) -> Fold | str:
    """Find how to divide ``value`` by a scale for each of the ``count`` channels along ``axis``.

    Returns:
        The fold, or the reason why there is none.
    """
    shape = dims(value)
    if shape is None:
        return "the rank of its input is not known"
    start = channel_ids(len(shape), axis, count)
    trials: list[dict[ir.Node, int]] = [{}]
    reason = ""
    for _ in range(MAX_BRANCHES):
        if not trials:
            break
        choices = trials.pop()
        flood = Flood(count, choices)
        try:
            flood.visit(value, start)
            flood.run(produce, consume)
        except Fork as fork:
            trials += [choices | {fork.node: side} for side in (0, 1)]
        except Blocked as blocked:
            reason = reason or str(blocked)
        else:
            return Fold(tuple(flood.slots.values()), flood.ties(), flood.known)
    return reason or "too many ways to fold it"
