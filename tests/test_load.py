"""Models of other times and tools, over the whole road."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

import qexport
from qexport.exporter import load
from qexport.exporter.admit import Limits
from qexport.exporter.load import load_source
from qexport.exporter.onnx_file import NOTES, load_onnx
from qexport.exporter.options import BuildOptions


def old_style(folder: Path) -> Path:
    """IR 3, where every initializer is listed as an input too."""
    body = "<ir_version: 3, opset_import: ['': 13]> g (float[N,32] x, float[32,32] w, float[32] b) => (float[N,32] y)"
    model = onnx.parser.parse_model(f"{body} {{ h = MatMul(x, w) k = Add(h, b) y = Relu(k) }}".replace("'", '"'))
    for name, shape in (("w", (32, 32)), ("b", (32,))):
        array = np.random.default_rng(len(shape)).normal(size=shape).astype("f")
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def test_initializers_that_are_inputs_too_become_constants_and_it_is_said_so(tmp_path):
    model = load_onnx(old_style(tmp_path))
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert sorted(model.graph.initializers) == ["b", "w"]
    assert model.meta[NOTES] == ("2 inputs have a value in the model and are constants now",)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_model_whose_initializers_are_inputs_is_quantized_over_the_whole_road(tmp_path):
    x = np.random.default_rng(5).normal(size=(16, 32)).astype("f")
    np.savez(tmp_path / "samples.npz", x=x)
    options = BuildOptions(target="ort-cpu", output=tmp_path / "out", set=("export.never_worse=false",))
    result = qexport.build(old_style(tmp_path), recipe="int8", calib=tmp_path / "samples.npz", options=options)
    assert result.quantized == 1
    assert "2 inputs have a value in the model and are constants now" in result.warnings
    sessions = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (tmp_path / "m.onnx", tmp_path / "out" / "model.onnx")
    ]
    assert [value.name for value in sessions[1].get_inputs()] == ["x"]
    before, after = (session.run(None, {"x": x})[0] for session in sessions)
    assert np.abs(after - before).max() < 0.05 * np.abs(before).max()


def test_a_folder_with_a_model_file_and_no_safetensors_means_that_file(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    (tmp_path / "model.onnx").write_bytes(onnx.parser.parse_model(text).SerializeToString())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    source = load_source(tmp_path)
    assert source.path == tmp_path / "model.onnx"
    assert source.tokenizer == tmp_path / "tokenizer.json"


def test_weights_with_nan_that_were_allowed_are_named_in_the_notes(tmp_path):
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) { h = Mul(x, w) y = Add(h, b) }'
    )
    proto = onnx.parser.parse_model(text)
    for name, value in (("w", np.nan), ("b", 1.0)):
        proto.graph.initializer.append(numpy_helper.from_array(np.array([1, value, 1, 1], "f"), name))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    notes = load_source(tmp_path / "m.onnx", Limits(allow_nonfinite=True)).notes
    assert notes == ("NaN or Inf in initializer 'w', which was allowed",)


@pytest.mark.parametrize("place", ["output", "value_info"])
def test_an_input_that_is_named_again_without_a_type_keeps_its_own(tmp_path, place):
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    proto = onnx.parser.parse_model(text)
    getattr(proto.graph, place).add(name="x").type.tensor_type.shape.SetInParent()
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    model = load_onnx(tmp_path / "m.onnx")
    assert [(value.name, value.dtype, value.shape.rank()) for value in model.graph.inputs] == [
        ("x", ir.DataType.FLOAT, 2)
    ]


def test_the_digest_is_of_the_weights_that_were_read_whatever_their_name_leads_to_by_then(tmp_path, monkeypatch):
    model = onnx.load(old_style(tmp_path))
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    honest = load_source(tmp_path / "m.onnx").info
    (tmp_path / "secret").write_bytes(b"secret")
    real = load.read_onnx

    def swapped(*asked):
        found = real(*asked)
        (tmp_path / "w.bin").rename(tmp_path / "moved")
        (tmp_path / "w.bin").symlink_to("secret")
        return found

    monkeypatch.setattr(load, "read_onnx", swapped)
    assert load_source(tmp_path / "m.onnx").info.digest == honest.digest
