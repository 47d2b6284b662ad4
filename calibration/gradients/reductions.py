"""Gradients of reductions, of softmax and of normalizations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from qexport.calibration.gradients.tape import Rule, Tape, Value, operand, optional, rank_of, refuse
from qexport.passes.match import array, dims

Slope = Callable[[Tape, ir.Node, Value, Value, Value], Value]
"""Tape, node, x, and y and its gradient with the reduced axes kept -> the gradient of x."""


def _axes(t: Tape, node: ir.Node) -> Value | None:
    """What is reduced over; ``None`` for all axes."""
    told = node.attributes.get_ints("axes", ())
    axes = t.constant(list(told)) if told else optional(node, 1)
    numbers = array(axes)
    return None if numbers is not None and not numbers.size else axes


def _reduction(slope: Slope) -> Rule:
    def rule(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
        axes, x, y = _axes(t, node), operand(node, 0), node.outputs[0]
        noop = node.attributes.get_int("noop_with_empty_axes", 0)
        if axes is None and noop:
            raise refuse(node, "it reduces over no axis", "run cleanup first")
        if axes is not None and not node.attributes.get_int("keepdims", 1):
            y, g = (t.op("Unsqueeze", value, axes) for value in (y, g))
        return [slope(t, node, x, y, g)]

    return rule


def _mean(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    share = t.div(*(t.cast(t.op("Size", value), g) for value in (y, x)))
    return t.expand(t.mul(g, share), x)


def _extreme(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    reached = t.cast(t.compare("Equal", x, y), g)
    return t.mul(reached, t.div(g, t.sum(reached, _axes(t, node))))


def _l2(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    size = t.where(t.compare("Greater", y), y, 1.0)  # nothing has a size of zero but zeros
    return t.mul(x, t.div(g, size))


REDUCTIONS: dict[str, Slope] = {
    "ReduceL1": lambda t, node, x, y, g: t.mul(t.op("Sign", x), g),
    "ReduceL2": _l2,
    "ReduceLogSumExp": lambda t, node, x, y, g: t.mul(t.op("Exp", t.sub(x, y)), g),
    "ReduceMax": _extreme,
    "ReduceMean": _mean,
    "ReduceMin": _extreme,
    "ReduceSum": lambda t, node, x, y, g: t.expand(g, x),
    "ReduceSumSquare": lambda t, node, x, y, g: t.mul(t.mul(x, g), 2.0),
}


def _global_average(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    return [_mean(t, node, operand(node, 0), node.outputs[0], g)]


def _softmax(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    part = t.mul(g, node.outputs[0])
    total = t.sum(part, [node.attributes.get_int("axis", -1)])
    return [t.sub(part, t.mul(node.outputs[0], total))]


def _log_softmax(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    total = t.sum(g, [node.attributes.get_int("axis", -1)])
    return [t.sub(g, t.mul(t.op("Exp", node.outputs[0]), total))]


def _layer_norm(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """``h = (x - mean) / sqrt(variance + epsilon)``; ``dx = (s - mean(s) - h mean(s h)) / sqrt(...)``, ``s = g gamma``.

    Ba et al. 2016; RMSNormalization is the same without the mean (Zhang and Sennrich 2019).
    """
    x, gamma, beta = operand(node, 0), operand(node, 1), optional(node, 2)
    axis = node.attributes.get_int("axis", -1)
    axes = list(range(axis, 0) if axis < 0 else range(axis - rank_of(node, x), 0))
    centred = node.op_type == "LayerNormalization"
    gap = t.sub(x, t.mean(x, axes)) if centred else x
    variance = t.mean(t.mul(gap, gap), axes)
    inverse = t.op("Reciprocal", t.op("Sqrt", t.add(variance, node.attributes.get_float("epsilon", 1e-5))))
    h, s = t.mul(gap, inverse), t.mul(g, gamma)
    left = t.sub(s, t.mul(h, t.mean(t.mul(s, h), axes)))
    dx = t.mul(t.sub(left, t.mean(s, axes)) if centred else left, inverse)
    shape = dims(x)
    dgamma = t.sum_to(t.mul(g, h), shape, gamma)
    return [dx, dgamma, None if beta is None else t.sum_to(g, shape, beta)]


def _batch_norm(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """``(x - mean) * gamma / sqrt(variance + epsilon) + beta`` with what was counted in training."""
    if node.attributes.get_int("training_mode", 0):
        raise refuse(node, "it counts means of the batch", "export the model for inference")
    x, rank = operand(node, 0), rank_of(node, operand(node, 0))
    gamma, _, mean, variance = (t.reshape(operand(node, i), [-1, *[1] * (rank - 2)]) for i in range(1, 5))
    inverse = t.op("Reciprocal", t.op("Sqrt", t.add(variance, node.attributes.get_float("epsilon", 1e-5))))
    others = [axis for axis in range(rank) if axis != 1]
    h = t.mul(t.sub(x, mean), inverse)
    dx = t.mul(g, t.mul(gamma, inverse))
    total = t.sum(g, others, keep=False)
    back = t.reshape(t.mul(gamma, inverse), [-1])
    dvariance = t.mul(t.reshape(t.sum(t.mul(g, t.mul(h, t.mul(gamma, t.mul(inverse, inverse)))), others), [-1]), -0.5)
    return [dx, t.sum(t.mul(g, h), others, keep=False), total, t.neg(t.mul(total, back)), dvariance]


def _cumulated(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    turned = {"reverse": 1 - node.attributes.get_int("reverse", 0)}
    turned["exclusive"] = node.attributes.get_int("exclusive", 0)
    return [t.op("CumSum", g, node.inputs[1], attributes=turned), None]


RULES: dict[str, Rule] = {
    **{name: _reduction(slope) for name, slope in REDUCTIONS.items()},
    "BatchNormalization": _batch_norm,
    "CumSum": _cumulated,
    "GlobalAveragePool": _global_average,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _log_softmax,
    "RMSNormalization": _layer_norm,
    "Softmax": _softmax,
}
