"""Faults that break a sound model, each with the exit code it deserves; and models with one of them, drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, numpy_helper
from strategies import graphs

Fault = Callable[[onnx.ModelProto], None]


def external(**entries):
    def change(m):
        tensor = m.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    return change


def tensor(**fields):
    def change(m):
        found = m.graph.initializer[0]
        for name, value in fields.items():
            found.ClearField(name)
            (getattr(found, name).extend if name in ("dims", "float_data") else lambda v, n=name: setattr(found, n, v))(
                value
            )

    return change


def deep(m):
    outer = m.graph.node.add(op_type="If", input=["deep_flag"], output=["deep"])
    m.graph.initializer.append(numpy_helper.from_array(np.bool_(True), "deep_flag"))
    for level in range(40):
        for key in ("then_branch", "else_branch"):
            attribute = outer.attribute.add(name=key, type=AttributeProto.GRAPH)
            attribute.g.name = key
            attribute.g.output.add(name=f"{key}{level}")
            attribute.g.node.add(op_type="Identity", input=["x"], output=[f"{key}{level}"])
        inner = outer.attribute[1].g.node[0]
        inner.op_type, inner.input[:] = "If", ["deep_flag"]
        outer = inner
    outer.op_type, outer.input[:] = "Identity", ["x"]


def bomb(m):
    m.graph.initializer.append(numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "bomb_shape"))
    m.graph.node.add(op_type="ConstantOfShape", input=["bomb_shape"], output=["bomb"])


def zero_scale(m):
    m.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero_scale"))
    m.graph.node.add(op_type="QuantizeLinear", input=["x", "zero_scale"], output=["scaled"])


def deepen(value: onnx.ValueInfoProto) -> None:
    for _ in range(65):
        value.type.tensor_type.shape.dim.add(dim_value=1)


FAULTS: dict[str, tuple[int, Fault]] = {
    "reads nothing's value": (3, lambda m: m.graph.node[0].input.__setitem__(0, "nowhere")),
    "reads itself": (3, lambda m: m.graph.node[-1].input.__setitem__(0, m.graph.node[-1].output[0])),
    "writes twice": (3, lambda m: m.graph.node.append(m.graph.node[0])),
    "writes the input": (3, lambda m: m.graph.node.add(op_type="Relu", input=["x"], output=["x"])),
    "an attribute without a name": (3, lambda m: m.graph.node[0].attribute.add(name="", type=2, i=1)),
    "an attribute of no type": (3, lambda m: m.graph.node[0].attribute.add(name="__note", i=1)),
    "an input left out that is not optional": (3, lambda m: m.graph.node[0].input.__setitem__(0, "")),
    "an output left out that is not optional": (
        3,
        lambda m: m.graph.node.add(op_type="Relu", input=["x"], output=[""]),
    ),
    "a reference outside of functions": (
        3,
        lambda m: m.graph.node.add(op_type="If", input=["x"], output=["z"]).attribute.add(
            name="then_branch", type=onnx.AttributeProto.GRAPH, ref_attr_name="given"
        ),
    ),
    "all outputs left out": (3, lambda m: m.graph.node.add(op_type="Split", input=["x"], output=["", ""])),
    "unknown operator": (3, lambda m: setattr(m.graph.node[0], "op_type", "Rleu")),
    "foreign domain": (6, lambda m: setattr(m.graph.node[0], "domain", "acme")),
    "opset of the future": (3, lambda m: setattr(m.opset_import[0], "version", 999)),
    "no opset": (3, lambda m: m.ClearField("opset_import")),
    "ir of the future": (3, lambda m: setattr(m, "ir_version", 999)),
    "too few bytes": (3, lambda m: setattr(m.graph.initializer[0], "raw_data", m.graph.initializer[0].raw_data[:-1])),
    "too many bytes": (
        3,
        lambda m: setattr(m.graph.initializer[0], "raw_data", m.graph.initializer[0].raw_data + b"\0"),
    ),
    "negative dimension": (3, tensor(dims=[-1])),
    "an input of more dimensions than arrays have": (3, lambda m: deepen(m.graph.input[0])),
    "an output of more dimensions than arrays have": (3, lambda m: deepen(m.graph.output[0])),
    "more dimensions than arrays have": (3, tensor(dims=[1] * 65)),
    "dimensions that overflow": (3, tensor(dims=[1 << 40, 1 << 40])),
    "unknown type": (3, tensor(data_type=99)),
    "data twice": (3, lambda m: m.graph.initializer[0].float_data.append(1)),
    "nan": (3, lambda m: m.graph.initializer.append(numpy_helper.from_array(np.array([np.nan, 1], "f"), "nan"))),
    "file outside": (4, external(location="../x")),
    "absolute file": (4, external(location="/etc/hostname")),
    "unknown key": (4, external(location="x", __class__="x")),
    "memory as file": (4, external(location="*/_ORT_MEM_ADDR_/*", offset="1")),
    "weight twice": (3, lambda m: m.graph.initializer.append(m.graph.initializer[0])),
    "output of nothing": (3, lambda m: setattr(m.graph.output[0], "name", "nowhere")),
    "no outputs": (3, lambda m: m.graph.ClearField("output")),
    "unknown attribute": (3, lambda m: m.graph.node[0].attribute.add(name="no", type=AttributeProto.INT)),
    "too many inputs": (3, lambda m: m.graph.node[0].input.extend(["x"] * 3)),
    "too deep": (3, deep),
    "too large": (9, bomb),
    "scale of zero": (3, zero_scale),
}


@st.composite
def broken(draw):
    """A sound model with one fault: its bytes, the name of the fault, and the exit code it deserves."""
    proto = onnx.ModelProto()
    proto.CopyFrom(draw(graphs(depth=4)).proto)
    fault = draw(st.sampled_from(sorted(FAULTS)))
    code, change = FAULTS[fault]
    change(proto)
    return proto.SerializeToString(), fault, code
