"""Small models for the folding of scales and offsets: from text, with random constants and names for all nodes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

RNG = np.random.default_rng(0)


def build(body, inputs="float[b, s, 8] a", outputs="float[b, s, n] out", opset=23, **constants):
    """A model from text; ``name="4x8"`` in ``constants`` are random numbers of that shape, arrays are as they are."""
    imports = f'["" : {opset}, "com.microsoft" : 1, "other" : 1]'
    proto = onnx.parser.parse_model(
        f"<ir_version: 10, opset_import: {imports}> g ({inputs}) => ({outputs}) {{ {body} }}"
    )
    for name, told in constants.items():
        numbers = random(told) if isinstance(told, str) else np.asarray(told)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers, name))
    for node in proto.graph.node:
        node.name = f"{node.op_type}/{node.output[0]}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def random(shape):
    sizes = [int(size) for size in shape.split("x") if size]
    return (0.5 + np.abs(RNG.standard_normal(sizes))).astype(np.float32) * RNG.choice([-1, 1], sizes).astype(np.float32)


def value_named(model, name):
    found = {value.name: value for node in model.graph for value in node.outputs}
    return found[name]


def give_shapes(model, **shapes):
    for name, shape in shapes.items():
        value = value_named(model, name)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
