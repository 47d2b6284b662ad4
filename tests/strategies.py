"""Models that hypothesis draws: graphs whose every value has a type and a shape, and hostile names.

The first axis of every value is the batch, which no constant knows, so that a model takes any number of samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

OPSET, BATCH = 20, 2


@dataclass
class Value:
    """A float value: its name and its shape for ``BATCH`` samples."""

    name: str
    shape: tuple[int, ...]

    @property
    def rank(self):
        return len(self.shape)


@dataclass
class Graph:
    """A graph while it grows."""

    draw: st.DrawFn
    rng: np.random.Generator
    values: list[Value]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    count: int = 0

    def name(self, stem):
        self.count += 1
        return f"{stem}{self.count}"

    def weight(self, array):
        name = self.name("w")
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, *shape):
        return self.weight(self.rng.standard_normal(shape).astype(np.float32) / max(1, shape[-1]) ** 0.5)

    def ints(self, *numbers):
        return self.weight(np.array(numbers, np.int64))

    def add(self, op, inputs, shape, **attributes):
        """A node with one output, which is a value from now on."""
        name = self.name("v")
        self.nodes.append(helper.make_node(op, inputs, [name], self.name("n"), **attributes))
        self.values.append(Value(name, tuple(shape)))
        return name

    def pick(self, wanted=lambda value: True):
        """One of the values with a property, or none; late ones are likelier, so that graphs get deep."""
        found = [value for value in self.values if wanted(value)]
        return found[-1 - self.draw(st.integers(0, min(3, len(found) - 1)))] if found else None

    def axis(self, value):
        """An axis that is not the batch."""
        return self.draw(st.integers(1, value.rank - 1))


# ---------------------------------------------------------------- operators: each adds nodes where a value fits


def unary(g, v):
    g.add(
        g.draw(st.sampled_from(["Relu", "Sigmoid", "Tanh", "Abs", "Neg", "Erf", "Identity", "HardSwish"])),
        [v.name],
        v.shape,
    )


def leaky(g, v):
    g.add("LeakyRelu", [v.name], v.shape, alpha=0.1)


def clip(g, v):
    g.add("Clip", [v.name, g.weight(np.float32(-2)), g.weight(np.float32(2))], v.shape)


def arithmetic(g, v):
    other = g.pick(lambda w: w.shape == v.shape)
    g.add(g.draw(st.sampled_from(["Add", "Sub", "Mul", "Max", "Min"])), [v.name, other.name], v.shape)


def with_constant(g, v):
    op = g.draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
    shape = g.draw(st.sampled_from([(), (1,), v.shape[-1:], (1, *v.shape[1:])]))
    constant = g.weight((g.rng.uniform(0.5, 2, shape) * g.rng.choice([-1, 1])).astype(np.float32))
    g.add(op, [v.name, constant] if g.draw(st.booleans()) or op == "Div" else [constant, v.name], v.shape)


def neutral(g, v):
    op, number = g.draw(st.sampled_from([("Mul", 1), ("Add", 0), ("Div", 1), ("Sub", 0)]))
    g.add(op, [v.name, g.weight(np.float32(number))], v.shape)


def matmul(g, v):
    width = g.draw(st.sampled_from([1, 3, 6, 32]))
    h = g.add("MatMul", [v.name, g.normal(v.shape[-1], width)], (*v.shape[:-1], width))
    if g.draw(st.booleans()):
        g.add("Add", [h, g.normal(width)], (*v.shape[:-1], width))


def gemm(g, v):
    if v.rank == 2:
        width = g.draw(st.sampled_from([1, 3, 6, 32]))
        g.add("Gemm", [v.name, g.normal(width, v.shape[1]), g.normal(width)], (v.shape[0], width), transB=1)


def conv(g, v):
    if v.rank == 4:
        channels, kernel = g.draw(st.integers(1, 4)), g.draw(st.sampled_from([1, 3]))
        weight, bias = g.normal(channels, v.shape[1], kernel, kernel), g.normal(channels)
        g.add("Conv", [v.name, weight, bias], (v.shape[0], channels, *v.shape[2:]), pads=[kernel // 2] * 4)


def depthwise(g, v):
    if v.rank == 4:
        g.add("Conv", [v.name, g.normal(v.shape[1], 1, 3, 3)], v.shape, group=v.shape[1], pads=[1] * 4)


def batch_norm(g, v):
    if v.rank > 2:
        size = v.shape[1]
        positive = [g.weight(g.rng.uniform(0.5, 2, size).astype(np.float32)) for _ in range(2)]
        g.add("BatchNormalization", [v.name, positive[0], g.normal(size), g.normal(size), positive[1]], v.shape)


def pool(g, v):
    if v.rank == 4:
        op = g.draw(st.sampled_from(["MaxPool", "AveragePool"]))
        g.add(
            op,
            [v.name],
            v.shape,
            kernel_shape=[3, 3],
            pads=[1] * 4,
            **({} if op == "MaxPool" else {"count_include_pad": 1}),
        )


def global_pool(g, v):
    if v.rank == 4:
        g.add("GlobalAveragePool", [v.name], (*v.shape[:2], 1, 1))


def flatten(g, v):
    size = int(np.prod(v.shape[1:]))
    if g.draw(st.booleans()):
        g.add("Flatten", [v.name], (v.shape[0], size))
    else:
        g.add("Reshape", [v.name, g.ints(0, -1)], (v.shape[0], size))


def widen(g, v):
    if v.rank < 4:
        g.add("Unsqueeze", [v.name, g.ints(1)], (v.shape[0], 1, *v.shape[1:]))


def squeeze(g, v):
    if v.rank > 2 and v.shape[1] == 1:
        g.add("Squeeze", [v.name, g.ints(1)], (v.shape[0], *v.shape[2:]))


def transpose(g, v):
    order = [0, *g.draw(st.permutations(range(1, v.rank)))]
    g.add("Transpose", [v.name], tuple(v.shape[axis] for axis in order), perm=order)


def cut(g, v):
    axis = g.axis(v)
    end = g.draw(st.integers(1, v.shape[axis]))
    g.add("Slice", [v.name, g.ints(0), g.ints(end), g.ints(axis)], (*v.shape[:axis], end, *v.shape[axis + 1 :]))


def concat(g, v):
    axis = g.axis(v)
    other = g.pick(
        lambda w: w.rank == v.rank and w.shape[:axis] + w.shape[axis + 1 :] == v.shape[:axis] + v.shape[axis + 1 :]
    )
    size = v.shape[axis] + other.shape[axis]
    if size <= 16:
        g.add("Concat", [v.name, other.name], (*v.shape[:axis], size, *v.shape[axis + 1 :]), axis=axis)


def reduce(g, v):
    axis, op = g.axis(v), g.draw(st.sampled_from(["ReduceMean", "ReduceSum", "ReduceMax"]))
    g.add(op, [v.name, g.ints(axis)], (*v.shape[:axis], 1, *v.shape[axis + 1 :]), keepdims=1)


def softmax(g, v):
    g.add("Softmax", [v.name], v.shape, axis=-1)


def layer_norm(g, v):
    scale = g.weight(g.rng.uniform(0.5, 2, v.shape[-1]).astype(np.float32))
    g.add("LayerNormalization", [v.name, scale, g.normal(v.shape[-1])], v.shape)


def gather(g, v):
    axis, count = g.axis(v), g.draw(st.integers(1, 4))
    indices = g.ints(*g.rng.integers(0, v.shape[axis], count).tolist())
    g.add("Gather", [v.name, indices], (*v.shape[:axis], count, *v.shape[axis + 1 :]), axis=axis)


def cast(g, v):
    wide = g.add("Cast", [v.name], v.shape, to=TensorProto.DOUBLE)
    g.values.pop()
    g.add("Cast", [wide], v.shape, to=TensorProto.FLOAT)


def where(g, v):
    mask = g.weight(g.rng.random(v.shape[1:]) > 0.3)
    g.add("Where", [mask, v.name, g.weight(np.float32(0.5))], v.shape)


def pad(g, v):
    if v.shape[-1] < 12:
        before = [0] * (v.rank - 1) + [1]
        g.add("Pad", [v.name, g.ints(*before, *before)], (*v.shape[:-1], v.shape[-1] + 2))


def expand(g, v):
    if v.rank > 1 and v.shape[-1] == 1:
        g.add("Expand", [v.name, g.ints(*[1] * (v.rank - 1), 3)], (*v.shape[:-1], 3))


def constant_shapes(g, v):
    """What exporters write: a shape that is computed from constants."""
    half = g.weight(np.array([1], np.int64))
    shape = g.name("v")
    g.nodes.append(helper.make_node("Concat", [half, half], [shape], axis=0))
    ones = g.name("v")
    g.nodes.append(helper.make_node("ConstantOfShape", [shape], [ones], value=numpy_helper.from_array(np.ones(1, "f"))))
    if v.rank == 2:
        g.add("Mul", [v.name, ones], v.shape)


def branch(g, v):
    """An If on an input; its branches read a value from outside."""
    bodies = {}
    for key, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        name = g.name("b")
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        bodies[key] = helper.make_graph([helper.make_node(op, [v.name], [name])], key, [], [output])
    g.add("If", ["flag"], v.shape, **bodies)


def loop(g, v):
    """A Loop of a fixed count over a state of this shape."""
    names = [g.name("l") for _ in range(4)]
    typed = [(names[0], TensorProto.INT64), (names[1], TensorProto.BOOL), (names[2], TensorProto.FLOAT)]
    inputs = [
        helper.make_tensor_value_info(name, kind, [] if kind != TensorProto.FLOAT else None) for name, kind in typed
    ]
    kept = f"{names[1]}_"
    outputs = [
        helper.make_tensor_value_info(kept, TensorProto.BOOL, []),
        helper.make_tensor_value_info(names[3], TensorProto.FLOAT, None),
    ]
    nodes = [helper.make_node("Identity", [names[1]], [kept]), helper.make_node("Tanh", [names[2]], [names[3]])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    g.add("Loop", [g.weight(np.int64(2)), g.weight(np.bool_(True)), v.name], v.shape, body=body)


def quantizers(g, v):
    """A pair as other tools write it."""
    scale, zero = g.weight(np.float32(0.05)), g.weight(np.int8(0))
    name = g.name("q")
    g.nodes.append(helper.make_node("QuantizeLinear", [v.name, scale, zero], [name], g.name("n")))
    g.add("DequantizeLinear", [name, scale, zero], v.shape)


def called(g, v):
    """A call of the model's own function."""
    g.add("Twice", [v.name], v.shape, domain="own")


OPS = (
    *(unary, leaky, clip, arithmetic, with_constant, neutral, matmul, gemm, conv, depthwise, batch_norm, pool),
    *(global_pool, flatten, widen, squeeze, transpose, cut, concat, reduce, softmax, layer_norm, gather, cast, where),
    *(pad, expand, constant_shapes),
)
SHAPES = [(BATCH, 4), (BATCH, 32), (BATCH, 3, 4), (BATCH, 2, 5, 5), (BATCH, 1, 4)]


class Drawn:
    """A model with inputs that it takes; shown as text."""

    def __init__(self, proto: onnx.ModelProto, feeds: dict[str, np.ndarray]):
        self.proto = proto
        self.feeds = feeds

    def __repr__(self):
        return onnx.printer.to_text(self.proto)


@st.composite
def graphs(draw, ops=OPS, depth=12, *, subgraphs=False, functions=False, quantized=False):
    """A model of opset 20 with up to ``depth`` operators, that onnxruntime runs."""
    # onnxruntime 1.31 loses a value between two Casts that a subgraph reads.
    rows = [
        *(op for op in ops if not (subgraphs and op is cast)),
        *[branch, loop] * subgraphs,
        *[called] * functions,
        *[quantizers] * quantized,
    ]
    shape = draw(st.sampled_from(SHAPES))
    g = Graph(draw, np.random.default_rng(draw(st.integers(0, 2**16))), [Value("x", shape)])
    with_constant(g, g.values[0])  # so that there always is a weight
    for _ in range(draw(st.integers(1, depth))):
        draw(st.sampled_from(rows))(g, g.pick())
    free = draw(st.booleans())
    ends = {g.values[-1].name: g.values[-1]}
    if draw(st.booleans()):
        ends.setdefault(other.name, other) if (other := g.pick(lambda v: v.name != "x")) else None
    return Drawn(_model(g, shape, free, list(ends.values())), _feeds(g, shape))


def _model(g, shape, free, ends):
    batch = ["n"] if free else [BATCH]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*batch, *shape[1:]])]
    if any(node.op_type == "If" for node in g.nodes):
        inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    outputs = [helper.make_tensor_value_info(v.name, TensorProto.FLOAT, [*batch, *v.shape[1:]]) for v in ends]
    graph = helper.make_graph(g.nodes, "drawn", inputs, outputs, g.weights)
    imports = [helper.make_opsetid("", OPSET)]
    own = []
    if any(node.domain == "own" for node in g.nodes):
        imports.append(helper.make_opsetid("own", 1))
        body = [helper.make_node("Add", ["a", "a"], ["b"])]
        own = [helper.make_function("own", "Twice", ["a"], ["b"], body, imports[:1])]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=own)


def _feeds(g, shape):
    feeds = {"x": g.rng.standard_normal(shape).astype(np.float32)}
    if any(node.op_type == "If" for node in g.nodes):
        feeds["flag"] = np.array(g.draw(st.booleans()))
    return feeds


def names():
    """Text that hurts where it is not escaped: control and direction characters, paths, markup, very long text."""
    nasty = [
        "\x1b[31m",
        "\0",
        "\u202e",
        "../../x",
        "<script>alert(1)</script>",
        "a" * 5000,
        "%s{0}",
        "\n| x |",
        "\ufeff",
        "'\"",
    ]
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
    return st.one_of(st.sampled_from(nasty), text)
