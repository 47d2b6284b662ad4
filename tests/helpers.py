"""What many tests share: samples in memory, models from text, files of every kind."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import qexport
import qexport.cli
from qexport.calibration.reading.data import sample_digest


class Samples(list):
    """Samples in memory."""

    name = "memory"
    digest = "sha256:0"
    warnings = ()

    @property
    def digests(self):
        return tuple(sample_digest(sample) for sample in self)


def model_from(text, opset=20, **weights):
    """A model from ONNX's text form, the initializers added and shapes inferred."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def save_model(path: Path) -> Path:
    """A product of 32 by 32 and a Relu, in a file."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 32] x) => (float[n, 32] y) { h = MatMul(x, w)
        y = Relu(h) }"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path.write_bytes(proto.SerializeToString())
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command line; returns its exit code and what went to stdout and stderr."""
    code = qexport.cli.run(list(arguments))
    told = capsys.readouterr()
    return code, told.out, told.err


def exported(source: str | Path, output: Path, **asked: object) -> qexport.ExportResult:
    """Export with these options."""
    return qexport.export(source, output=output, options=qexport.ExportOptions(**asked))


def session(model, path=None):
    """A session on one thread; ``path`` takes the graph as onnxruntime rewrote it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if path is not None:
        options.optimized_model_filepath = str(path)
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz_bytes(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def zip_bytes(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def feeds_of(model, seed=1):
    """Random inputs of a model; sizes that are not known are 2 (batch) and 3."""
    rng, feeds = np.random.default_rng(seed), {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else (2 if axis == 0 else 3) for axis, size in enumerate(value.shape)]
        dtype = value.dtype.numpy()
        numbers = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feeds[value.name] = numbers.astype(dtype)
    return feeds
