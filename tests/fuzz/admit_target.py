"""Model files: whatever bytes come, they are refused with a reason, or loaded, inspected and admitted again."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from fuzz.script import Tape, edit
from qexport.errors import QexportError
from qexport.exporter.admit import admit_proto, parse
from qexport.exporter.looking.inspect import inspect_model
from qexport.exporter.onnx_file import load_onnx

_HEAD = '<ir_version: 10, opset_import: ["": 20, "f": 1]>'
_SEEDS = (
    "g (float[n, 4] x, bool c) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> { [a] h = Mul(x, w) [b] y = Relu(h) }",
    """g (float[n, 4] x) => (float[n, k] y) <float s = {0.1}, int8 z = {0}> {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = f.F(d) }
    <domain: "f", opset_import: ["": 20]> F (a) => (b) { k = Constant <value = float {2.0}> () b = Add(a, k) }""",
    """g (float[n, 4] x, bool c) => (float[n, 4] y) <int64[2] s = {2, 4}> {
        e = Expand(x, s) y = If (c) <then_branch = t () => (float[n, 4] u) { u = Relu(e) },
        else_branch = o () => (float[n, 4] v) { v = Reshape(e, s) }> }""",
    """g (float[2, 4] x) => (float[2, 4] y) <int64 m = {3}, bool k = {1}> {
        y = Loop (m, k, x) <body = b (int64 i, bool j, float[2, 4] p) => (bool r, float[2, 4] t) {
        r = Identity(j) t = Tanh(p) }> }""",
)


@functools.cache
def seeds() -> tuple[onnx.ModelProto, ...]:
    """Sound models that scripts begin with; the last has its weight in a file."""
    found = [onnx.parser.parse_model(f"{_HEAD} {text}") for text in _SEEDS]
    outside = onnx.ModelProto()
    outside.CopyFrom(found[0])
    tensor = outside.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return (*found, outside)


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Where models lie, with 4 KB of weights beside them; removed at the end of the process."""
    made = tempfile.TemporaryDirectory(prefix="fuzz-")
    Path(made.name, "w.bin").write_bytes(bytes(range(64)) * 64)
    return made


def demand_shown(error: QexportError) -> None:
    """What is shown of an error is short and escaped, whatever names are in it."""
    shown = str(error)
    assert shown.replace("\n", "").isprintable(), shown
    assert len(shown) < 2000, len(shown)


def one_input(data: bytes) -> None:
    """Read ``data`` as a model (its first byte even) or as a script that edits one (odd)."""
    tape, root = Tape(data), Path(folder().name)
    mode = tape.below(256)
    if mode % 2:
        model = onnx.ModelProto()
        model.CopyFrom(seeds()[(mode // 2) % len(seeds())])
        edit(model, tape)
        content = model.SerializeToString()
    else:
        content = tape.rest()
    try:
        admit_proto(parse(content, "model"), where="model", root=root)
        (root / "model.onnx").write_bytes(content)
        model = load_onnx(root / "model.onnx")
    except QexportError as error:
        if error.exit_code == 1:
            raise
        demand_shown(error)
        return
    inspect_model(model)
    admit_proto(parse(ir.to_proto(model).SerializeToString(), "again"), where="again")
