"""Gradients of operators that work element by element; of several inputs, each sums over what it was repeated along."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

from qexport.calibration.gradients.tape import Rule, Tape, Value, operand, optional, refuse
from qexport.passes.match import array, dims, scalar

Slope = Callable[[Tape, ir.Node, Value, Value, Value], Value]
"""Tape, node, x, y and the gradient of y -> that of x."""


def _unary(slope: Slope) -> Rule:
    return lambda t, node, g: [slope(t, node, operand(node, 0), node.outputs[0], g)]


def _sigmoid(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    return t.mul(g, t.sub(y, t.mul(y, y)))


def _tanh(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    return t.sub(g, t.mul(g, t.mul(y, y)))


def _erf(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    return t.mul(g, t.mul(t.op("Exp", t.neg(t.mul(x, x))), 2 / math.sqrt(math.pi)))


def _leaky_relu(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    return t.where(t.compare("Greater", x), g, t.mul(g, node.attributes.get_float("alpha", 0.01)))


def _elu(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    below = t.mul(g, t.mul(t.op("Exp", x), node.attributes.get_float("alpha", 1.0)))
    return t.where(t.compare("Greater", x), g, below)


def _hard_sigmoid(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    inside = t.op("And", t.compare("Greater", y), t.compare("Less", y, 1.0))
    return t.where(inside, t.mul(g, node.attributes.get_float("alpha", 0.2)))


def _hard_swish(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    inside = t.mul(g, t.add(t.mul(x, 1 / 3), 0.5))
    beyond = t.where(t.compare("Greater", x), g)
    return t.where(t.compare("Less", t.op("Abs", x), 3.0), inside, beyond)


def _softsign(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    size = t.add(t.op("Abs", x), 1.0)
    return t.div(g, t.mul(size, size))


def _swish(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    alpha = node.attributes.get_float("alpha", 1.0)
    s = t.op("Sigmoid", t.mul(x, alpha))
    return t.mul(g, t.add(s, t.mul(t.mul(y, t.sub(t.number(1.0, s), s)), alpha)))


def _gelu(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    square = t.mul(x, x)
    if node.attributes.get_string("approximate", "none") == "tanh":
        c = math.sqrt(2 / math.pi)
        bent = t.op("Tanh", t.mul(t.mul(x, t.add(t.mul(square, 0.044715), 1.0)), c))
        slope = t.mul(t.add(t.mul(square, 3 * 0.044715), 1.0), c)
        rising = t.mul(t.mul(t.mul(x, t.sub(t.number(1.0, x), t.mul(bent, bent))), slope), 0.5)
        return t.mul(g, t.add(t.mul(t.add(bent, 1.0), 0.5), rising))
    below = t.mul(t.add(t.op("Erf", t.mul(x, math.sqrt(0.5))), 1.0), 0.5)
    density = t.mul(t.op("Exp", t.mul(square, -0.5)), 1 / math.sqrt(2 * math.pi))
    return t.mul(g, t.add(below, t.mul(x, density)))


def _dropout(t: Tape, node: ir.Node, x: Value, y: Value, g: Value) -> Value:
    training = optional(node, 2)
    if training is not None and (array(training) is None or bool(array(training))):
        raise refuse(node, "it may drop values at random", "export the model for inference")
    return g


UNARY: dict[str, Slope] = {
    "Abs": lambda t, node, x, y, g: t.mul(g, t.op("Sign", x)),
    "Cast": lambda t, node, x, y, g: t.cast(g, x),
    "Clip": lambda t, node, x, y, g: t.where(t.compare("Equal", x, y), g),
    "Cos": lambda t, node, x, y, g: t.neg(t.mul(g, t.op("Sin", x))),
    "Dropout": _dropout,
    "Elu": _elu,
    "Erf": _erf,
    "Exp": lambda t, node, x, y, g: t.mul(g, y),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": lambda t, node, x, y, g: g,
    "LeakyRelu": _leaky_relu,
    "Log": lambda t, node, x, y, g: t.div(g, x),
    "Neg": lambda t, node, x, y, g: t.neg(g),
    "Reciprocal": lambda t, node, x, y, g: t.neg(t.mul(g, t.mul(y, y))),
    "Relu": lambda t, node, x, y, g: t.where(t.compare("Greater", y), g),
    "Sigmoid": _sigmoid,
    "Sin": lambda t, node, x, y, g: t.mul(g, t.op("Cos", x)),
    "Softplus": lambda t, node, x, y, g: t.mul(g, t.op("Sigmoid", x)),
    "Softsign": _softsign,
    "Sqrt": lambda t, node, x, y, g: t.mul(t.div(g, y), 0.5),
    "Swish": _swish,
    "Tanh": _tanh,
}


def _broadcast(rule: Rule) -> Rule:
    """What the inputs get of an output as large as all of them together."""

    def each(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
        found, shape = rule(t, node, g), dims(node.outputs[0])
        return [
            None if part is None or x is None else t.sum_to(part, shape, x)
            for part, x in zip(found, node.inputs, strict=False)
        ]

    return each


def _mul(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    return [t.mul(g, operand(node, 1)), t.mul(g, operand(node, 0))]


def _div(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    part = t.div(g, operand(node, 1))
    return [part, t.neg(t.mul(part, node.outputs[0]))]


def _pow(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    base, told = operand(node, 0), operand(node, 1)
    if scalar(told) == 2:
        slope = t.mul(base, 2.0)
    else:
        exponent = t.cast(told, base)
        slope = t.mul(exponent, t.op("Pow", base, t.add(exponent, -1.0)))
    logarithm = t.where(t.compare("Greater", base), t.op("Log", base))
    return [t.mul(g, slope), t.cast(t.mul(g, t.mul(node.outputs[0], logarithm)), told)]


def _extreme(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """Of Max and Min; equal ones share."""
    reached = [t.cast(t.compare("Equal", x, node.outputs[0]), g) for x in node.inputs if x is not None]
    total = reached[0]
    for part in reached[1:]:
        total = t.add(total, part)
    share = t.div(g, total)
    return [t.mul(share, part) for part in reached]


def _prelu(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    x, above = operand(node, 0), t.compare("Greater", operand(node, 0))
    return [t.where(above, g, t.mul(g, operand(node, 1))), t.where(t.op("Not", above), t.mul(g, x))]


def _where(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    truth = operand(node, 0)
    return [None, t.where(truth, g), t.where(t.op("Not", truth), g)]


BROADCAST: dict[str, Rule] = {
    "Add": lambda t, node, g: [g, g],
    "Div": _div,
    "Expand": lambda t, node, g: [g],
    "Max": _extreme,
    "Mean": lambda t, node, g: [t.mul(g, 1 / len(node.inputs))] * len(node.inputs),
    "Min": _extreme,
    "Mul": _mul,
    "PRelu": _prelu,
    "Pow": _pow,
    "Sub": lambda t, node, g: [g, t.neg(g)],
    "Sum": lambda t, node, g: [g] * len(node.inputs),
    "Where": _where,
}

RULES: dict[str, Rule] = {
    **{name: _unary(slope) for name, slope in UNARY.items()},
    **{name: _broadcast(rule) for name, rule in BROADCAST.items()},
}
