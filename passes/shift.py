"""Centre the channels of what products read, so that a symmetric quantizer wastes none of its range.

For every product to be quantized, ``x W + b`` becomes ``(x - c) W + (b + c W)``. With ``c`` the middle of each
channel's range, a symmetric int8 quantizer needs half the range for one-sided channels, which is what a zero point for
each channel would give, where engines allow for none at all. Of the offsets that reach the same range for the whole
tensor the smallest are taken: the middle for the widest channel, nothing for those that fit already. Their zeros stay
exact, and little is subtracted only to be added again behind the product.

1. ``-c`` goes into the source of x: the bias of a norm or product, through layout operators and attention.
2. Where the source has none (an activation function makes it), one Sub is left behind it, if ``target`` has symmetric
   quantizers (others have zero points instead) and ``sub`` allows for it; engines fuse it with the activation.
3. Where neither is possible, the value stays as it is, with the reason.

Source: Wei et al. 2023, "Outlier Suppression+", equations 3 and 4 (the middle of every channel).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.folding.activation import ACTIVATION_KEY, Activation, activation_of, transform, why_unknown
from qexport.passes.folding.flood import largest_of_ties
from qexport.passes.folding.offsets import Offset, find_offset, find_readers
from qexport.passes.match import add_constant, check_names, maker
from qexport.passes.placement import Site, plan
from qexport.passes.target import find_target

MIN_GAIN = 0.98  # of the range that is left; what is centred already is left alone
MIN_SUB_GAIN = 0.9  # a Sub must be worth its time


@dataclass(frozen=True)
class Shift(Pass):
    """Centre the channels that products read, by offsets folded into biases (Outlier Suppression+)."""

    target: str = "tensorrt-rtx"
    sub: bool = True
    """Whether a Sub may stay behind what has no bias, for targets without zero points."""
    keep: tuple[str, ...] = ()
    """Names of nodes whose inputs are left alone."""

    def call(self, model: ir.Model) -> Outcome:
        """Shift what ``observe`` has looked at; what cannot be shifted is left alone with a reason."""
        check_names(self.keep, model)
        target = find_target(self.target)
        sub = self.sub and target.activation == "int8"
        decisions: list[Decision] = []
        for value, sites in by_value(plan(model, target).roots).items():
            known = activation_of(value)
            if any(site.node.name in self.keep for site in sites):
                continue
            action, reason = ("skipped", why_unknown(value)) if known is None else _shift(value, known, sub=sub)
            node = sites[0].node
            decisions.append(Decision(node.name or "", node.op_type, action, reason))
        return Outcome(model, any(d.action == "folded" for d in decisions), tuple(decisions))


def by_value(sites: tuple[Site, ...]) -> dict[ir.Value, list[Site]]:
    """The sites that read each value, those with a weight only."""
    found: dict[ir.Value, list[Site]] = {}
    for site in sites:
        for value in site.values if site.weight is not None else ():
            found.setdefault(value, []).append(site)
    return found


def _shift(value: ir.Value, known: Activation, *, sub: bool) -> tuple[str, str]:
    """What was done to ``value``, and how or why."""
    found = find_offset(value, known.axis, known.low.size)
    if isinstance(found, Offset):
        offset = _centre(known, found.ties)
        if _left(known, offset) > MIN_GAIN:
            return "skipped", "its channels are centred already"
        found.apply(offset)
        for shifted, ids in found.values.items():
            transform(shifted, ids, np.ones_like(offset), offset)
        return "folded", "offsets of its channels folded into biases"
    readers = find_readers(value, known.axis, known.low.size)
    if not sub or isinstance(readers, str) or value.producer() is None:
        return "skipped", found
    offset = _centre(known, np.arange(known.low.size))
    if _left(known, offset) > MIN_SUB_GAIN:
        return "skipped", "its channels are centred already"
    _leave_sub(value, known, readers, offset)
    return "folded", f"one Sub left: {found}"


def _centre(known: Activation, ties: NDArray[np.int64]) -> NDArray[np.float64]:
    """The least offset of each channel that lets all ranges end where the widest centred one does, ``[channels]``.

    Channels that lie inside already keep their zeros, which are exact in any range.
    """
    high, low = largest_of_ties(ties, known.high), -largest_of_ties(ties, -known.low)
    reach = (high - low).max(initial=0.0) / 2
    return np.asarray(np.clip(0.0, high - reach, low + reach), np.float64)


def _left(known: Activation, offset: NDArray[np.float64]) -> float:
    """How much of the range of the whole tensor is left after the shift, as a share."""
    before = float(known.reach.max())
    after = float(np.maximum(known.high - offset, offset - known.low).max())
    return after / before if before > 0 else 1.0


def _leave_sub(value: ir.Value, known: Activation, readers: Offset, offset: NDArray[np.float64]) -> None:
    """Subtract in a node of its own, for the products alone."""
    products = [term.reader for term in readers.terms if term.reader is not None]
    dtype = np.float32 if value.dtype is None else value.dtype.numpy()
    numbers = offset.astype(dtype)
    readers.apply(numbers.astype(np.float64))  # what the Sub takes off, rounded as it is
    rank = len(value.shape) if value.shape is not None else 1
    if known.axis >= 0:  # an image: channels in front of what comes last
        numbers = numbers.reshape([-1] + [1] * (rank - known.axis - 1))
    constant = add_constant(products[0], f"{value.name}/offset", numbers)
    node = ir.node("Sub", [value, constant], name=f"{maker(value).name}/Sub")
    centred = node.outputs[0]
    centred.name, centred.type = f"{value.name}/centred", ir.TensorType(value.dtype or ir.DataType.FLOAT)
    centred.shape = None if value.shape is None else value.shape.copy()
    body = maker(value).graph
    assert body is not None
    body.insert_after(maker(value), node)
    for product in products:
        product.replace_input_with(0, centred)
    c = numbers.reshape(-1).astype(np.float32)
    centred.meta[ACTIVATION_KEY] = Activation(known.axis, known.low - c, known.high - c, known.rows - c)
