"""Recognise files that are not ONNX by their first bytes, so that the message can say what they are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qexport.errors import ModelInvalid, QexportError, UnsafeInput


@dataclass(frozen=True, slots=True)
class Kind:
    """A file type: a pattern its first bytes match, its name, what to do instead, and the error it deserves."""

    pattern: re.Pattern[bytes]
    name: str
    hint: str
    error: type[QexportError] = ModelInvalid


_EXPORT = "export the model to ONNX first"
_PICKLE = "a pickle runs code when it is read; export the model to ONNX, or save the weights as safetensors"

SAFETENSORS = "a safetensors file"

KINDS = tuple(
    Kind(re.compile(pattern, re.DOTALL | re.IGNORECASE), name, *rest)
    for pattern, name, *rest in (
        (rb"version https://git-lfs\.github\.com", "a git-lfs pointer, not the file itself", "run: git lfs pull"),
        (rb"\x80[\x02-\x05]", "a Python pickle", _PICKLE, UnsafeInput),
        (rb"c[a-z_][\w.]*\n[a-z_]\w*\n|\(?[dl]p\d+\n|\([cSVI].*\n", "a Python pickle", _PICKLE, UnsafeInput),
        (rb"PK(\x03\x04|\x05\x06)", "a zip archive (a PyTorch checkpoint or .npz?)", _EXPORT),
        (rb"\s*<(!doctype html|html|head|body|script)", "an HTML page", "a login or error page was saved; fetch again"),
        (rb"\s*<\?xml", "an XML file (OpenVINO?)", _EXPORT),
        (rb"[fv]trt|.{4}\{.*[fv]trt", "a TensorRT engine", "give the ONNX model that it was built from"),
        (rb".{8}\{\"", SAFETENSORS, "give the folder with config.json, or an ONNX model"),
        (rb"\s*[\[{]\s*[\"{\]}]", "a JSON file", "give the .onnx file beside it"),
        (rb".{4}ORTM", "an onnxruntime .ort file", "give the ONNX model that it was made from"),
        (rb".{4}TFL3", "a TensorFlow Lite file", _EXPORT),
        (rb"\x89HDF", "an HDF5 file (Keras?)", _EXPORT),
        (rb"GGUF", "a GGUF file", _EXPORT),
        (rb"\x93NUMPY", "a NumPy array", "give it as calibration data"),
        (rb"\x1f\x8b|7z\xbc\xaf|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ|.{257}ustar", "an archive", "unpack it first"),
        (rb"\x7fELF", "a program or library", "give an ONNX model"),
    )
)


def find_kind(head: bytes) -> Kind | None:
    """The first kind whose pattern starts ``head``, the first KiB of a file."""
    return next((kind for kind in KINDS if kind.pattern.match(head)), None)


def refuse_other_kinds(head: bytes) -> None:
    """Raise the error of the kind that ``head`` is of."""
    kind = find_kind(head)
    if kind is not None:
        raise kind.error(f"not an ONNX model but {kind.name}", hint=kind.hint)
