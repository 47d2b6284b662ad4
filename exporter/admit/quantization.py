"""Scales and zero points of a model that is already quantized: every runtime accepts bad ones and returns zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from qexport.errors import ModelInvalid
from qexport.exporter.admit.external import pieces, reference
from qexport.exporter.admit.subject import Subject, place, quoted, standard
from qexport.exporter.admit.tensors import needed_bytes, type_name

Dims = tuple[int | None, ...]

# operator -> input positions of (scale, zero point)
SCALES: dict[str, tuple[tuple[int, int], ...]] = {
    "QuantizeLinear": ((1, 2),),
    "DequantizeLinear": ((1, 2),),
    "QLinearConv": ((1, 2), (4, 5), (6, 7)),
    "QLinearMatMul": ((1, 2), (4, 5), (6, 7)),
}
# type of a scale -> its smallest number that is not denormal
SMALLEST: dict[int, float] = {
    TensorProto.FLOAT: 2.0**-126,
    TensorProto.FLOAT16: 2.0**-14,
    TensorProto.BFLOAT16: 2.0**-126,
    TensorProto.FLOAT8E8M0: 0.0,
}
QUANTIZED = frozenset(
    {
        *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16),
        *(TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2, TensorProto.FLOAT4E2M1),
        *(TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ),
    }
)
ZERO_POINTS = {"QuantizeLinear": QUANTIZED, "DequantizeLinear": QUANTIZED | {TensorProto.INT32}}


@dataclass(frozen=True, slots=True)
class Names:
    """What is known about the names a body sees."""

    constants: dict[str, TensorProto]
    producers: dict[str, onnx.NodeProto]
    shapes: dict[str, Dims]
    outer: Names | None

    def constant(self, name: str) -> TensorProto | None:
        """The tensor behind a name, if it is constant."""
        return self.constants.get(name) or (self.outer.constant(name) if self.outer else None)

    def shape(self, name: str) -> Dims | None:
        """Dimensions, ``None`` for those that are not fixed; looks through QuantizeLinear, which keeps them."""
        tensor = self.constant(name)
        if tensor is not None:
            return tuple(tensor.dims)
        producer = self.producers.get(name)
        if name not in self.shapes and producer is not None and producer.op_type == "QuantizeLinear":
            name = _input(producer, 0)
            tensor = self.constant(name)
            return tuple(tensor.dims) if tensor is not None else self.shapes.get(name)
        return self.shapes.get(name)


def check_scales(subject: Subject) -> None:
    """Apply every rule to every node that has scales; raise ``ModelInvalid``."""
    known: dict[int, Names] = {}
    for index, body in subject.running():
        quantizing = [node for node in body.proto.node if node.op_type in SCALES and not _foreign(node)]
        for node in quantizing:
            names = _names(subject, index, known)
            for rule in RULES:
                complaint = rule(node, names, subject)
                if complaint:
                    where = place(node) if body.where == "graph" else f"{body.where}, {place(node)}"
                    raise ModelInvalid(complaint, where=where, hint="quantize the float model again")


def _foreign(node: onnx.NodeProto) -> bool:
    return standard(node.domain) not in ("", "com.microsoft")


def _names(subject: Subject, index: int, known: dict[int, Names]) -> Names:
    if index not in known:
        body = subject.bodies[index]
        outer = _names(subject, body.parent, known) if body.parent is not None else None
        producers = {name: node for node in body.proto.node for name in node.output}
        constants = {node.output[0]: tensor for node in body.proto.node for tensor in _constant(node)}
        values = list(body.proto.value_info)
        if isinstance(body.proto, onnx.GraphProto):
            constants.update((tensor.name, tensor) for tensor in body.proto.initializer)
            values += [*body.proto.input, *body.proto.output]
        shapes = {v.name: _dims(v) for v in values if v.type.tensor_type.HasField("shape")}
        known[index] = Names(constants, producers, shapes, outer)
    return known[index]


def _constant(node: onnx.NodeProto) -> Iterator[TensorProto]:
    if node.op_type != "Constant" or standard(node.domain):
        return
    for attribute in node.attribute:
        if attribute.name == "value":
            yield attribute.t
        elif attribute.name == "value_float":
            yield TensorProto(data_type=TensorProto.FLOAT, float_data=[attribute.f])
        elif attribute.name == "value_floats":
            count = len(attribute.floats)
            yield TensorProto(data_type=TensorProto.FLOAT, dims=[count], float_data=attribute.floats)


def _dims(value: onnx.ValueInfoProto) -> Dims:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in dims)


def _input(node: onnx.NodeProto, position: int) -> str:
    return node.input[position] if position < len(node.input) else ""


def _scale_and_zero(node: onnx.NodeProto, names: Names) -> tuple[TensorProto | None, TensorProto | None]:
    return names.constant(_input(node, 1)), names.constant(_input(node, 2))


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


# ---------------------------------------------------------------- rules: a complaint or None


def _bad_scale(node: onnx.NodeProto, names: Names, subject: Subject) -> str | None:
    """A scale is positive, finite, not denormal; computed scales cannot be looked at."""
    for position, _ in SCALES[node.op_type]:
        tensor = names.constant(_input(node, position))
        if tensor is None:
            continue
        if tensor.data_type not in SMALLEST:
            return f"the scale {quoted(_input(node, position))} has type {type_name(tensor.data_type)}"
        numbers = _numbers(tensor, subject)
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers > 0) & (numbers >= SMALLEST[tensor.data_type])))
        if bad.size:
            label = f"{quoted(_input(node, position))}" + (f"[{bad[0]}]" if numbers.size > 1 else "")
            number = float(numbers[bad[0]])
            return f"the scale {label} is {number:g}; a scale is positive, finite and not denormal"
    return None


def _numbers(tensor: TensorProto, subject: Subject) -> NDArray[np.float64]:
    if tensor.data_location == TensorProto.EXTERNAL:
        assert subject.root is not None, "external data without a folder was refused before"
        data = b"".join(pieces(subject.root, reference(tensor, ""), needed_bytes(tensor)))
        tensor = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=data)
    return np.asarray(numpy_helper.to_array(tensor)).astype(np.float64).ravel()


def _bad_zero_type(node: onnx.NodeProto, names: Names, _: Subject) -> str | None:
    """The zero point has a quantized type, the same as the integers it belongs to."""
    zero = _scale_and_zero(node, names)[1]
    if zero is None or node.op_type not in ZERO_POINTS:
        return None
    if zero.data_type not in ZERO_POINTS[node.op_type]:
        return f"the zero point {quoted(node.input[2])} has type {type_name(zero.data_type)}"
    if node.op_type == "QuantizeLinear":
        declared = _attribute(node, "output_dtype", 0)
        if declared not in (0, zero.data_type):
            return f"the zero point has type {type_name(zero.data_type)}, output_dtype is {type_name(declared)}"
        return None
    data = _integer_type(_input(node, 0), names)
    if data is not None and data != zero.data_type:
        return f"the zero point has type {type_name(zero.data_type)}, the data has {type_name(data)}"
    return None


def _integer_type(name: str, names: Names) -> int | None:
    """Type of the integers that a DequantizeLinear reads, where it can be seen."""
    tensor = names.constant(name)
    if tensor is not None:
        return tensor.data_type
    producer = names.producers.get(name)
    if producer is None or producer.op_type != "QuantizeLinear":
        return None
    if _input(producer, 2):
        zero = names.constant(producer.input[2])
        return zero.data_type if zero is not None else None
    return _attribute(producer, "output_dtype", 0) or int(TensorProto.UINT8)


def _bad_zero_length(node: onnx.NodeProto, names: Names, _: Subject) -> str | None:
    """There are as many zero points as scales."""
    scale, zero = _scale_and_zero(node, names)
    if scale is None or zero is None or node.op_type not in ZERO_POINTS:
        return None
    have, need = int(np.prod(zero.dims)), int(np.prod(scale.dims))
    return None if have == need else f"has {need} scales but {have} zero points"


def _bad_axis(node: onnx.NodeProto, names: Names, _: Subject) -> str | None:
    """Per channel: the axis exists and there is one scale per channel. Blocked: one per block."""
    scale = _scale_and_zero(node, names)[0]
    if scale is None or node.op_type not in ZERO_POINTS:
        return None
    block = _attribute(node, "block_size", 0)
    count = int(np.prod(scale.dims))
    if len(scale.dims) > 1 and not block:
        return f"the scale has dimensions {list(scale.dims)}; without block_size it has at most one"
    if count <= 1 and not block:
        return None
    dims = names.shape(_input(node, 0))
    axis = _attribute(node, "axis", 1)
    if dims is None:
        return None
    if not -len(dims) <= axis < len(dims):
        return f"axis {axis} is out of range for {quoted(node.input[0])} with {len(dims)} dimensions"
    if block:
        return _bad_blocks(dims, axis, block, tuple(scale.dims))
    channels = dims[axis]
    if channels is not None and channels != count:
        return f"has {count} scales, but axis {axis} of {quoted(node.input[0])} has {channels} channels"
    return None


def _bad_blocks(dims: Dims, axis: int, block: int, have: tuple[int, ...]) -> str | None:
    if block < 0:
        return f"block_size is {block}"
    wanted = [
        -(-dim // block) if dim is not None and index == axis % len(dims) else dim for index, dim in enumerate(dims)
    ]
    fits = len(wanted) == len(have) and all(need in (None, count) for need, count in zip(wanted, have, strict=True))
    return None if fits else f"the scale has dimensions {list(have)}, blocks of {block} need {wanted}"


RULES = (_bad_scale, _bad_zero_type, _bad_zero_length, _bad_axis)
