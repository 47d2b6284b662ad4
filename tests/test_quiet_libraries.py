"""Libraries write no lines of their own beside those of the command."""

from __future__ import annotations

import subprocess
import sys

import onnx


def test_notes_of_libraries_are_not_shown(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    model = onnx.parser.parse_model(text)
    model.configuration.add(name="two", num_devices=2)  # onnx_ir warns when it cannot write that
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    command = [sys.executable, "-m", "qexport", "build", "m.onnx", "--recipe", "float32", "--target", "ort-cpu"]
    done = subprocess.run([*command, "-o", "out", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if not line.startswith("[")] == []
