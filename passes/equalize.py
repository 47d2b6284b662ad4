"""Balance the channels between two layers, so that neither the activation nor the next weight has a few huge ones.

``conv2(relu(conv1(x)))`` computes the same when channel i of the first weight and bias is divided by ``s_i`` and input
channel i of the second weight is multiplied by it. With ``s_i = sqrt(r1_i r2_i) / r2_i`` both have the same range
``sqrt(r1_i r2_i)``, ``r`` being the largest magnitude of the channel; a bias counts, so that a channel that is nothing
but bias is not blown up. Chains of layers, depthwise ones among them, are balanced pair by pair until nothing moves.

Cross-layer equalization: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.folding.activation import ACTIVATION_KEY
from qexport.passes.match import SHARED, add_constant, array, constant, sweep, visit
from qexport.passes.numbers.notes import forget_layer, forget_range

LAYERS = ("Conv", "Gemm")
HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity")
"""What lets a positive factor of a channel through."""
SETTLED = 1e-4  # a sweep that moves no channel by more than this share ends the search
SWEEPS = 500
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Equalize(Pass):
    """Equalize the channel ranges of successive convolutions or Gemms, so that int8 suits all channels."""

    tolerance: float = 0.1
    """A model whose channels are all this close to balance, as a share of 1, is left alone."""

    def call(self, model: ir.Model) -> Outcome:
        """Scale the weights of every pair of layers with nothing but homogeneous functions in between."""
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise UsageError(f"tolerance = {self.tolerance!r} is not above 0", where="pass equalize")
        pairs, refused = _find(model)
        layers = {node: _Layer(node) for pair in pairs for node in (pair.first, pair.second)}
        for pair in pairs:
            pair.scale = np.ones(layers[pair.first].bias.size)
        _balance(pairs, layers)
        reach = max((float(np.abs(np.log(pair.scale)).max()) for pair in pairs), default=0.0)
        if reach <= math.log1p(self.tolerance):
            done = [_decision(pair.second, "skipped", "its channels are balanced already") for pair in pairs]
            return Outcome(model, False, (*done, *refused))
        for pair in pairs:
            _apply(pair)
        done = [_decision(pair.second, "folded", f"scaled against {pair.first.op_type} before it") for pair in pairs]
        return Outcome(model, True, (*done, *refused))


@dataclass(slots=True)
class _Pair:
    """Two layers, the values between them, and the factors of the channels."""

    first: ir.Node
    second: ir.Node
    between: tuple[ir.Value, ...]
    scale: Array = field(default_factory=lambda: np.ones(0))


class _Layer:
    """The largest magnitudes of a weight, ``[groups, outputs of a group, inputs of a group]``, and of its bias."""

    def __init__(self, node: ir.Node) -> None:
        weight = _weight_of(node)
        flat = np.abs(weight.reshape(*weight.shape[:3], -1)).max(axis=3)
        bias = None if len(node.inputs) < 3 else array(node.inputs[2])
        self.reach: Array = flat
        size = flat.shape[0] * flat.shape[1]
        self.bias: Array = np.zeros(size) if bias is None else np.abs(np.resize(bias.astype(np.float64), size))

    def outputs(self) -> Array:
        return np.asarray(np.maximum(self.reach.max(axis=2).ravel(), self.bias))

    def inputs(self) -> Array:
        return np.asarray(self.reach.max(axis=1).ravel())

    def scale_outputs(self, factor: Array) -> None:
        self.reach *= factor.reshape(*self.reach.shape[:2], 1)
        self.bias *= factor

    def scale_inputs(self, factor: Array) -> None:
        self.reach *= factor.reshape(self.reach.shape[0], 1, -1)


def _balance(pairs: Sequence[_Pair], layers: dict[ir.Node, _Layer]) -> None:
    """Fill in the factors of all pairs; those of a chain depend on each other."""
    for _ in range(SWEEPS):
        moved = 0.0
        for pair in pairs:
            first, second = layers[pair.first], layers[pair.second]
            step = factors(first.outputs(), second.inputs())
            first.scale_outputs(1 / step)
            second.scale_inputs(step)
            pair.scale *= step
            moved = max(moved, float(np.abs(np.log(step)).max()))
        if moved < SETTLED:
            return


def factors(first: Array, second: Array) -> Array:
    """Return ``sqrt(r1 r2) / r2`` of each channel; 1 for a channel that either side has switched off."""
    alive = (first > 0) & (second > 0)
    ratio = np.divide(first, second, out=np.ones_like(first), where=alive)
    return np.asarray(np.sqrt(ratio))


def _find(model: ir.Model) -> tuple[list[_Pair], list[Decision]]:
    """All pairs, and why other layers that something computes for have none."""
    pairs, refused = [], []
    for node, _ in visit(model, *LAYERS):
        found = _partner(node)
        if isinstance(found, _Pair):
            pairs.append(found)
        elif found:
            refused.append(_decision(node, "skipped", found))
    return pairs, refused


def _partner(second: ir.Node) -> _Pair | str | None:
    """The pair that ends in ``second``, or why there is none; ``None`` for what reads an input of the model."""
    value, between = second.inputs[0], []
    while value is not None and (node := value.producer()) is not None:
        if len(value.uses()) != 1 or value.is_graph_output() or node.graph is not second.graph:
            return SHARED
        between.append(value)
        if node.domain == "" and node.op_type in LAYERS:
            return _refusal(node, second) or _Pair(node, second, tuple(between))
        if node.domain != "" or node.op_type not in HOMOGENEOUS:
            return f"behind {node.op_type}, which is not homogeneous in one channel"
        value = node.inputs[0]
    return None


def _refusal(first: ir.Node, second: ir.Node) -> str | None:
    if first.op_type != second.op_type:
        return f"behind {first.op_type}, whose channels are on another axis"
    if any(constant(value) is None for node in (first, second) for value in node.inputs[1:2]):
        return "weights are not constant"
    weights = [_weight_of(node) for node in (first, second)]
    channels = weights[0].shape[0] * weights[0].shape[1]
    if any(node.attributes.get_int("transA", 0) for node in (first, second)):
        return "transposed activation"
    if channels != weights[1].shape[0] * weights[1].shape[2] or not all(np.isfinite(w).all() for w in weights):
        return "the shapes do not fit, or a weight is not finite"
    bias = first.inputs[2] if len(first.inputs) > 2 else None
    numbers = array(bias)
    if bias is not None and (numbers is None or numbers.size not in (1, channels) or not np.isfinite(numbers).all()):
        return "the bias before it is not one constant number for each channel"
    return None


def _weight_of(node: ir.Node) -> Array:
    """The weight as ``[groups, outputs of a group, inputs of a group, ...]`` in double precision."""
    numbers = array(node.inputs[1])
    assert numbers is not None
    weight: Array = numbers.astype(np.float64)
    if node.op_type == "Gemm":
        return weight[None] if node.attributes.get_int("transB", 0) else weight.T[None]
    return weight.reshape(node.attributes.get_int("group", 1), -1, *weight.shape[1:])


def _apply(pair: _Pair) -> None:
    """Divide the outputs of the first layer, multiply the inputs of the second; what was measured between is void."""
    first, second = _weight_of(pair.first), _weight_of(pair.second)
    trail = [1] * (first.ndim - 3)
    _store(pair.first, 1, _as_stored(pair.first, first / pair.scale.reshape(*first.shape[:2], 1, *trail)))
    wide = pair.scale.reshape(second.shape[0], 1, second.shape[2], *[1] * (second.ndim - 3))
    _store(pair.second, 1, _as_stored(pair.second, second * wide))
    bias = array(pair.first.inputs[2]) if len(pair.first.inputs) > 2 else None
    if bias is not None:
        _store(pair.first, 2, bias.astype(np.float64) / pair.scale)
    for value in pair.between:
        forget_range(value)
        value.meta.pop(ACTIVATION_KEY, None)
    for node in (pair.first, pair.second):
        forget_layer(node)


def _as_stored(node: ir.Node, weight: Array) -> Array:
    if node.op_type == "Gemm":
        matrix: Array = weight[0]
        return matrix if node.attributes.get_int("transB", 0) else matrix.T
    return weight.reshape(-1, *weight.shape[2:])


def _store(node: ir.Node, index: int, numbers: Array) -> None:
    """Give ``node`` a weight of its own; others may share the old one."""
    old = node.inputs[index]
    assert old is not None
    assert old.dtype is not None
    new = add_constant(node, f"{old.name}", np.ascontiguousarray(numbers.astype(old.dtype.numpy())))
    node.replace_input_with(index, new)
    sweep([old])


def _decision(node: ir.Node, action: str, reason: str) -> Decision:
    return Decision(node.name or "", node.op_type, action, reason)
