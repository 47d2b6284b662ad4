"""A tiny decoder in the portable layout, and the same forward in plain numpy, written apart from each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qexport.passes.portable import MAX_POSITIONS

LAYERS, HEADS, KV_HEADS, DIM, WIDTH, INNER, VOCABULARY = 2, 4, 2, 8, 32, 48, 50
EPSILON = 1e-5


@dataclass
class Tiny:
    """Weights of a decoder with grouped queries, rotary positions and a gated mixer."""

    seed: int = 0
    positions: int = 1024
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        shapes = {"table": (VOCABULARY, WIDTH), "head": (WIDTH, VOCABULARY), "norm": (WIDTH,)}
        for layer in range(LAYERS):
            shapes |= {f"{layer}.q": (WIDTH, HEADS * DIM), f"{layer}.o": (HEADS * DIM, WIDTH)}
            shapes |= {f"{layer}.{name}": (WIDTH, KV_HEADS * DIM) for name in "kv"}
            shapes |= {f"{layer}.gate": (WIDTH, INNER), f"{layer}.up": (WIDTH, INNER), f"{layer}.down": (INNER, WIDTH)}
            shapes |= {f"{layer}.norm1": (WIDTH,), f"{layer}.norm2": (WIDTH,)}
        for name, shape in shapes.items():
            noise = rng.standard_normal(shape) / np.sqrt(shape[0])
            self.weights[name] = (1 + 0.1 * noise if "norm" in name else 1.5 * noise).astype(np.float32)

    def angles(self):
        """[positions, DIM / 2]."""
        return np.outer(np.arange(self.positions), 100.0 ** -(np.arange(0, DIM, 2) / DIM))


# ---------------------------------------------------------------- the reference: whole rows, nothing kept


def forward(tiny, ids):
    """Logits float64 [sequence, vocabulary] of one row, all positions at once."""
    ids = np.asarray(ids)
    w = {name: array.astype(np.float64) for name, array in tiny.weights.items()}
    hidden = w["table"][ids]
    for layer in range(LAYERS):
        x = _norm(hidden, w[f"{layer}.norm1"])
        q, k, v = (_heads(x @ w[f"{layer}.{name}"]) for name in "qkv")
        q, k = _rotate(tiny, q), _rotate(tiny, k)
        mixed = np.empty_like(q)
        for head in range(HEADS):
            owner = head * KV_HEADS // HEADS
            for t in range(len(ids)):
                scores = k[owner, : t + 1] @ q[head, t] / np.sqrt(DIM)
                chances = np.exp(scores - scores.max())
                mixed[head, t] = chances @ v[owner, : t + 1] / chances.sum()
        hidden = hidden + mixed.transpose(1, 0, 2).reshape(len(ids), -1) @ w[f"{layer}.o"]
        x = _norm(hidden, w[f"{layer}.norm2"])
        gate = x @ w[f"{layer}.gate"]
        hidden = hidden + (gate / (1 + np.exp(-gate)) * (x @ w[f"{layer}.up"])) @ w[f"{layer}.down"]
    return _norm(hidden, w["norm"]) @ w["head"]


def _norm(x, gamma):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * gamma


def _heads(x):
    return x.reshape(len(x), -1, DIM).transpose(1, 0, 2)


def _rotate(tiny, x):
    cos, sin = (f(tiny.angles()[: x.shape[1]]) for f in (np.cos, np.sin))
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


# ---------------------------------------------------------------- the graph


class _Graph:
    def __init__(self, tiny, dtype):
        self.dtype = dtype
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="tiny")
        for name, array in tiny.weights.items():
            self.weight(name, array.astype(dtype.numpy()))

    def __getitem__(self, name):
        return self.graph.initializers[name]

    def weight(self, name, array):
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def ints(self, *numbers):
        name = f"ints_{'_'.join(map(str, numbers))}"
        return self.graph.initializers.get(name) or self.weight(name, np.array(numbers, np.int64))

    def port(self, name, dtype, *shape):
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def out(self, value, name, dtype, *shape):
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.outputs.append(value)

    def __call__(self, op, *inputs, **attributes):
        node = ir.node(op, list(inputs), attributes)
        self.graph.append(node)
        return node.outputs[0]


def portable(tiny, dtype=ir.DataType.FLOAT, *, extra=False, **metadata):
    """The decoder as a model in the portable layout; ``extra`` adds an input ``bias`` float [batch, vocabulary]."""
    g = _Graph(tiny, dtype)
    ids, positions = (g.port(name, ir.DataType.INT64, "batch", "sequence") for name in ("input_ids", "position_ids"))
    write = g.port("write_indices", ir.DataType.INT64, "batch")
    cache = ("batch", KV_HEADS, "max_seq", DIM)
    names = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    past = {name: g.port(f"past_key_values.{name}", dtype, *cache) for name in names}
    columns = g(
        "Range", g.weight("zero", np.array(0)), g("Squeeze", _length(g, past["0.key"])), g.weight("1", np.array(1))
    )
    seen = g("LessOrEqual", columns, g("Unsqueeze", positions, g.ints(1, 3)))
    mask = g(
        "Where", seen, g.weight("seen", np.array(0, dtype.numpy())), g.weight("unseen", np.array(-1e4, dtype.numpy()))
    )
    tables = [g.weight(name, f(tiny.angles()).astype(dtype.numpy())) for name, f in (("cos", np.cos), ("sin", np.sin))]
    hidden, present = g("Gather", g["table"], ids), {}
    for layer in range(LAYERS):
        x = g("RMSNormalization", hidden, g[f"{layer}.norm1"], epsilon=EPSILON)
        q, k, v = (
            _split(g, g("MatMul", x, g[f"{layer}.{name}"]), n)
            for name, n in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), strict=True)
        )
        q, k = (g("RotaryEmbedding", part, *tables, positions) for part in (q, k))
        for kind, new in (("key", k), ("value", v)):
            name = f"{layer}.{kind}"
            present[name] = g("TensorScatter", past[name], new, write, axis=-2, mode="linear")
        mixed = g("Attention", q, present[f"{layer}.key"], present[f"{layer}.value"], mask)
        merged = g("Reshape", g("Transpose", mixed, perm=[0, 2, 1, 3]), g.ints(0, 0, HEADS * DIM))
        hidden = g("Add", hidden, g("MatMul", merged, g[f"{layer}.o"]))
        x = g("RMSNormalization", hidden, g[f"{layer}.norm2"], epsilon=EPSILON)
        gate = g("MatMul", x, g[f"{layer}.gate"])
        inner = g("Mul", g("Mul", gate, g("Sigmoid", gate)), g("MatMul", x, g[f"{layer}.up"]))
        hidden = g("Add", hidden, g("MatMul", inner, g[f"{layer}.down"]))
    logits = g("MatMul", g("RMSNormalization", hidden, g["norm"], epsilon=EPSILON), g["head"])
    logits = g("Cast", logits, to=ir.DataType.FLOAT)
    if extra:
        bias = g.port("bias", ir.DataType.FLOAT, "batch", VOCABULARY)
        logits = g("Add", logits, g("Unsqueeze", bias, g.ints(1)))
    g.out(logits, "logits", ir.DataType.FLOAT, "batch", "sequence", VOCABULARY)
    for name, value in present.items():
        g.out(value, f"present.{name}", dtype, *cache)
    model = ir.Model(g.graph, ir_version=11, producer_name="tests")
    model.metadata_props.update({MAX_POSITIONS: str(tiny.positions), **metadata})
    return model


def _length(g, past):
    return g("Shape", past, start=2, end=3)


def _split(g, x, heads):
    return g("Transpose", g("Reshape", x, g.ints(0, 0, heads, DIM)), perm=[0, 2, 1, 3])


def serialized(model):
    """The bytes of the model's file."""
    return ir.to_proto(model).SerializeToString()
