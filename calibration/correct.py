"""Take the mean error of every quantized layer out of its bias.

Rounding and clipping shift the mean of an output channel, and a shift adds up where noise cancels. For each quantized
product or convolution the pass measures ``E[Q(x) Wq - x W]`` over all positions of the calibration samples, from the
activations that the layer will really get, those of the quantized network, and subtracts it from the bias. The mean is
linear in the mean of the input, so one pass over the data is enough for all layers, of every number format.

What could as well be chance is not subtracted: an error ``e`` with standard error ``d`` counts for
``e max(0, 1 - d^2 / e^2)``, the positive-part estimate of James and Stein.

Bias correction: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section
4.2, with measured instead of assumed means; Banner et al. 2019, "Post training 4-bit quantization", section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.layers import kernel_of
from qexport.calibration.least import check_least
from qexport.calibration.reading.data import Dataset, Sample
from qexport.calibration.running.literal import dequantized
from qexport.calibration.statistics.collect import numbered, stream
from qexport.calibration.statistics.patches import Patch, patch_of
from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import array, producer
from qexport.passes.writing.bias import bias_refusal, raise_bias

CORRECTED_KEY = "qexport.corrected"
LAYERS = ("MatMul", "Gemm", "Conv")
BLOCKS = 16  # shares of the samples whose spread is the error of the mean
Array = NDArray[np.float64]


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Subtract the mean error that quantization gives every output channel from the bias."""

    exact: ClassVar[bool] = False

    data: Dataset | None = field(default=None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    samples: int = 512
    insert: bool = False
    """Whether a product without a bias gets an Add; convolutions and Gemms take a bias at no cost."""

    def __post_init__(self) -> None:
        check_least("correct-bias", self, samples=1)

    def call(self, model: ir.Model) -> Outcome:
        """Correct every layer that ``quantize`` stored and ``calibrate`` knew; no data is a ``UsageError``."""
        if self.data is None:
            raise UsageError("bias correction needs calibration data", hint="give real samples with --calib")
        layers, decisions = _find(model, insert=self.insert)
        means = measure(model, layers, islice(self.data, self.samples), self.advance)
        modified = False
        for layer in layers:
            shift = correction(*means[layer.node].errors(layer)) if layer.node in means else np.zeros(0)
            if not np.any(shift):
                decisions.append(_decision(layer.node, "skipped", "no mean error beyond chance"))
                continue
            raise_bias(layer.node, -shift)
            layer.node.meta[CORRECTED_KEY] = modified = True
            decisions.append(_decision(layer.node, "folded", "mean error, into its bias"))
        return Outcome(model, modified, tuple(decisions))


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """One layer of a quantized model.

    Attributes:
        node: The product or convolution.
        value: Its input in float; ``seen`` is the same through its quantizer.
        seen: What the node reads.
        patch: The walk of a convolution.
    """

    node: ir.Node
    value: ir.Value
    seen: ir.Value
    patch: Patch | None = None

    def kernel(self) -> Array:
        """The float weight, ``[groups, K, N / groups]`` with K the inputs of one output."""
        held = kernel_of(self.node)
        assert held is not None
        return _as_rows(self.node, held)

    def stored(self) -> Array:
        """What the stored weight stands for, likewise; made anew each time, since all of them take much memory."""
        held = producer(self.node.inputs[1], "DequantizeLinear")
        assert held is not None
        return _as_rows(self.node, dequantized(held))


class Means:
    """Sums of one layer's input rows, before and after the quantizer, over blocks of samples."""

    def __init__(self) -> None:
        self._sums: tuple[list[Array], list[Array]] = ([], [])
        self._counts = np.zeros(BLOCKS)

    def add(self, index: int, layer: Quantized, pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
        """Take in one sample's values."""
        for side, value in zip(self._sums, pair, strict=True):
            rows, count = row_sums(layer, value)
            if not side:
                side.extend(np.zeros((BLOCKS, rows.size)))
            side[index % BLOCKS] += rows
        self._counts[index % BLOCKS] += count

    def errors(self, layer: Quantized) -> tuple[Array, Array]:
        """Mean error of each output channel in each block that has rows, ``[blocks, N]``, and the blocks' rows."""
        held = self._counts > 0
        counts = self._counts[held]
        before, after = (np.stack(side)[held] / counts[:, None] for side in self._sums)
        return _product(after, layer.stored()) - _product(before, layer.kernel()), counts


def measure(
    model: ir.Model, layers: Iterable[Quantized], samples: Iterable[Sample], advance: Callable[[], None]
) -> dict[ir.Node, Means]:
    """Run the quantized model over the samples; layers that no sample reaches are left out."""
    known = list(layers)
    taps = list(dict.fromkeys(value.name or "" for layer in known for value in (layer.value, layer.seen)))
    means: dict[ir.Node, Means] = {}
    for index, _, found in stream(model, taps, numbered(samples, advance), literal=True):
        for layer in known:
            pair = found[layer.value.name or ""], found[layer.seen.name or ""]
            if pair[0].size:
                means.setdefault(layer.node, Means()).add(index, layer, pair)
    return means


def correction(errors: Array, counts: Array) -> Array:
    """Return the part of the mean error that is not chance, ``[N]``.

    Args:
        errors: Mean error of each output channel in each block of samples, ``[blocks, N]``.
        counts: Rows of each block; a single block says nothing about chance, and nothing is corrected.
    """
    if len(counts) < 2:
        return np.zeros(errors.shape[1])
    share = counts / counts.sum()
    mean: Array = share @ errors
    chance = np.square(share) @ np.square(errors - mean) * len(counts) / (len(counts) - 1)
    kept = 1 - np.divide(chance, np.square(mean), out=np.ones_like(mean), where=mean != 0)
    return np.asarray(mean * np.maximum(kept, 0))


def row_sums(layer: Quantized, value: NDArray[Any]) -> tuple[Array, int]:
    """Sum of the rows that are multiplied with the weight, ``[groups * K]``, and how many there are.

    The rows of a convolution are its patches, one for each output position; zero padding is part of them.
    """
    exact = value.astype(np.float32, copy=False)
    if layer.patch is not None:
        return layer.patch.sums(exact)
    rows = exact.reshape(-1, value.shape[-1])
    return rows.sum(axis=0, dtype=np.float64), len(rows)


def _product(rows: Array, weight: Array) -> Array:
    """``[B, groups * K]`` times ``[groups, K, N / groups]``: ``[B, N]``."""
    split = rows.reshape(len(rows), len(weight), -1)
    return np.asarray(np.einsum("bgk,gkn->bgn", split, weight).reshape(len(rows), -1))


def _find(model: ir.Model, *, insert: bool) -> tuple[list[Quantized], list[Decision]]:
    """The layers to correct, and why other quantized ones are left alone."""
    found, refused = [], []
    for node in model.graph:
        if node.domain != "" or node.op_type not in LAYERS or producer(node.inputs[1], "DequantizeLinear") is None:
            continue
        reason = _refusal(node, insert=insert)
        layer = None if reason else _open(node)
        if layer is None:
            refused.append(_decision(node, "skipped", reason or "its weight before rounding is not known"))
        else:
            found.append(layer)
    return found, refused


def _refusal(node: ir.Node, *, insert: bool) -> str | None:
    if CORRECTED_KEY in node.meta:
        return "corrected already"
    return bias_refusal(node, insert=insert)


def _open(node: ir.Node) -> Quantized | None:
    """The layer with both of its weights; ``None`` where the float one was not noted."""
    kernel, held = kernel_of(node), producer(node.inputs[1], "DequantizeLinear")
    seen = node.inputs[0]
    if kernel is None or held is None or seen is None or array(held.inputs[0]) is None:
        return None
    reader = producer(seen, "DequantizeLinear")
    made = None if reader is None else producer(reader.inputs[0], "QuantizeLinear")
    value = seen if made is None else made.inputs[0]
    if value is None or dequantized(held).shape != kernel.shape:
        return None
    return Quantized(node, value, seen, patch_of(node, kernel.shape) if node.op_type == "Conv" else None)


def _as_rows(node: ir.Node, weight: NDArray[Any]) -> Array:
    """A weight as ``[groups, K, N / groups]``."""
    exact: Array = weight.astype(np.float64)
    if node.op_type != "Conv":
        return (exact.T if node.attributes.get_int("transB", 0) else exact)[None]
    return exact.reshape(node.attributes.get_int("group", 1), -1, int(np.prod(exact.shape[1:]))).transpose(0, 2, 1)


def _decision(node: ir.Node, action: str, reason: str) -> Decision:
    return Decision(node.name or "", node.op_type, action, reason)
