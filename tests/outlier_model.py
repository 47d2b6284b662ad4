"""A small pre-LN transformer, and ways to give a model systematic activation outliers without changing its function.

Large language models grow a few feature columns that are a hundred times larger than the others (Dettmers et al. 2022,
section 4; Bondarenko et al. 2021). What makes them here is exact:

- ``widen_norms``: gamma and beta of some channels of a normalization times ``factor``, the same rows of every linear
  layer behind it divided by it.
- ``lift_residual``: a constant added to every channel of the residual stream, which LayerNorm takes out again.

``quantize_all`` is the placement to compare with: int8 on everything that sums and normalizations read.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from helpers import Samples

from qexport.calibration.running.execute import open_model

NORMS = {"LayerNormalization": (1, 2), "RMSNormalization": (1,)}  # inputs that scale with the output
LINEARS = ("MatMul", "Gemm")

HEAD = """<ir_version: 10, opset_import: ["" : {opset}]>
g (int64[n, s] ids) => (float[n, s, {hidden}] y) {{ r0 = Gather(table, ids)
"""
BLOCK = """
  h{i} = LayerNormalization <axis = -1> (r{i}, g1_{i}, b1_{i})
  q{i} = MatMul(h{i}, wq_{i})  k{i} = MatMul(h{i}, wk_{i})  v{i} = MatMul(h{i}, wv_{i})
  qs{i} = Reshape(q{i}, heads)  ks{i} = Reshape(k{i}, heads)  vs{i} = Reshape(v{i}, heads)
  qt{i} = Transpose <perm = [0, 2, 1, 3]> (qs{i})
  kt{i} = Transpose <perm = [0, 2, 3, 1]> (ks{i})
  vt{i} = Transpose <perm = [0, 2, 1, 3]> (vs{i})
  l{i} = MatMul(qt{i}, kt{i})  ls{i} = Mul(l{i}, root)  p{i} = Softmax <axis = -1> (ls{i})
  c{i} = MatMul(p{i}, vt{i})  ct{i} = Transpose <perm = [0, 2, 1, 3]> (c{i})  cf{i} = Reshape(ct{i}, flat)
  o{i} = MatMul(cf{i}, wo_{i})  m{i} = Add(r{i}, o{i})
  n{i} = LayerNormalization <axis = -1> (m{i}, g2_{i}, b2_{i})
  u{i} = MatMul(n{i}, wu_{i})  ub{i} = Add(u{i}, bu_{i})  a{i} = Gelu(ub{i})
  d{i} = MatMul(a{i}, wd_{i})  db{i} = Add(d{i}, bd_{i})  r{j} = Add(m{i}, db{i})
"""
TAIL = "  y = LayerNormalization <axis = -1> (r{i}, gf, bf) }}"


def transformer(hidden=64, blocks=2, heads=4, vocabulary=256, seed=0, opset=21):
    """A pre-LN encoder, ``ids`` of ``[n, s]`` to ``[n, s, hidden]``, initialised as GPT-2 is, its norms near 1."""
    rng = np.random.default_rng(seed)
    text = HEAD.format(opset=opset, hidden=hidden)
    text += "".join(BLOCK.format(i=i, j=i + 1) for i in range(blocks)) + TAIL.format(i=blocks)
    proto = onnx.parser.parse_model(text)
    weights = {
        "table": rng.standard_normal((vocabulary, hidden)),
        "heads": np.array([0, 0, heads, hidden // heads]),
        "flat": np.array([0, 0, hidden]),
        "root": np.array((hidden // heads) ** -0.5),
        "gf": 1 + 0.1 * rng.standard_normal(hidden),
        "bf": 0.1 * rng.standard_normal(hidden),
    }
    for i in range(blocks):
        for name in ("wq", "wk", "wv"):
            weights[f"{name}_{i}"] = rng.standard_normal((hidden, hidden)) / np.sqrt(hidden)
        weights[f"wu_{i}"] = rng.standard_normal((hidden, 4 * hidden)) / np.sqrt(hidden)
        for name, size in (("wo", hidden), ("wd", 4 * hidden)):  # what writes to the residual stream, as in GPT-2
            weights[f"{name}_{i}"] = rng.standard_normal((size, hidden)) / np.sqrt(size * 2 * blocks)
        weights[f"bu_{i}"], weights[f"bd_{i}"] = (0.1 * rng.standard_normal(size) for size in (4 * hidden, hidden))
        for norm in (1, 2):
            weights[f"g{norm}_{i}"] = 1 + 0.1 * rng.standard_normal(hidden)
            weights[f"b{norm}_{i}"] = 0.1 * rng.standard_normal(hidden)
    for name, value in weights.items():
        array = value if value.dtype == np.int64 else value.astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def sentences(count, vocabulary=256, seed=1):
    """Samples of 8 to 32 random tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 33, count)
    return Samples({"ids": rng.integers(0, vocabulary, int(length))} for length in lengths)


def widen_norms(model, factor=200.0, channels=2, seed=0):
    """Scale ``channels`` of every normalization that only linear layers read; returns how many there were.

    The model is changed in place and computes the same, to rounding; exactly so if ``factor`` is a power of two.
    """
    rng = np.random.default_rng(seed)
    norms = [node for node in model.graph if node.op_type in NORMS and _read_by_linears(node)]
    for norm in norms:
        gamma = norm.inputs[1]
        chosen = rng.choice(gamma.const_value.shape[-1], channels, replace=False)
        scale = np.ones(gamma.const_value.shape[-1], np.float32)
        scale[chosen] = factor
        for index in NORMS[norm.op_type]:
            if len(norm.inputs) > index and norm.inputs[index] is not None:
                _set(model, norm, index, norm.inputs[index].const_value.numpy() * scale)
        for linear in dict.fromkeys(norm.outputs[0].consumers()):
            kernel = linear.inputs[1].const_value.numpy()
            turned = linear.op_type == "Gemm" and linear.attributes.get_int("transB", 0)
            _set(model, linear, 1, kernel / scale if turned else kernel / scale[:, None])
    return len(norms)


def lift_residual(model, table, offset=100.0):
    """Add ``offset`` to every channel of an embedding table, and so to a pre-LN residual stream from end to end."""
    value = model.graph.initializers[table]
    value.const_value = ir.tensor(value.const_value.numpy() + np.float32(offset), name=table)


def quantize_all(model, data):
    """Put symmetric int8 Q/DQ pairs, of the extremes of ``data``, on all computed inputs of sums and normalizations.

    Returns how many values that were.
    """
    sites = [(node, i, v) for node in model.graph for i, v in enumerate(node.inputs) if _summed(node, v)]
    values = {value.name: value for _, _, value in sites}
    session = open_model(model, taps=list(values))
    reach = dict.fromkeys(values, 0.0)
    for sample in data:
        found = session.run({name: array[None] for name, array in sample.items()}, list(values))
        reach = {name: max(size, float(np.abs(found[name]).max())) for name, size in reach.items()}
    pairs = {name: _pair(model, value, reach[name] / 127) for name, value in values.items()}
    for node, index, value in sites:
        node.replace_input_with(index, pairs[value.name])
    return len(values)


def _summed(node, value):
    return value is not None and value.const_value is None and (node.op_type == "Add" or node.op_type in NORMS)


def _pair(model, value, scale):
    name = f"{value.name}/all"
    held = ir.val(name, ir.DataType.FLOAT, (), const_value=ir.tensor(np.float32(scale), name=name))
    zero = ir.val(f"{name}/zero", ir.DataType.INT8, (), const_value=ir.tensor(np.int8(0), name=f"{name}/zero"))
    for constant in (held, zero):
        model.graph.register_initializer(constant)
    q = ir.node("QuantizeLinear", [value, held, zero])
    dq = ir.node("DequantizeLinear", [q.outputs[0], held, zero])
    model.graph.insert_after(value.producer(), [q, dq])
    dq.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return dq.outputs[0]


def outputs(model, data):
    """The first output of every sample, end to end."""
    session = open_model(model)
    runs = (session.run({name: array[None] for name, array in sample.items()}) for sample in data)
    return np.concatenate([next(iter(found.values())).ravel() for found in runs])


def _read_by_linears(norm):
    """Whether all that reads the output are products with a constant weight, and the parameters are constant."""
    output = norm.outputs[0]
    return (
        not output.is_graph_output()
        and all(use.idx == 0 and _is_linear(use.node) for use in output.uses())
        and all(value is None or value.const_value is not None for value in norm.inputs[1:])
    )


def _is_linear(node):
    return node.op_type in LINEARS and node.inputs[1].const_value is not None and not node.attributes.get("transA")


def _set(model, node, index, numbers):
    """Give ``node`` a constant of its own."""
    name = f"{node.outputs[0].name}/{index}/outliers"
    value = ir.val(name, ir.DataType.FLOAT, numbers.shape, const_value=ir.tensor(numbers.astype(np.float32), name=name))
    model.graph.register_initializer(value)
    node.replace_input_with(index, value)


def decibel(truth, found):
    """Signal over quantization noise in dB."""
    return float(10 * np.log10(np.square(truth).sum() / max(np.square(truth - found).sum(), 1e-30)))
