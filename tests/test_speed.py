"""Exports and builds of decoders say what calls take on the machine that wrote them, and never fail for it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import cached_models
import decoder_models
import onnx_ir as ir
import pytest
from helpers import call, exported, save_model

from qexport.errors import BuildFailed, EnvironmentMismatch
from qexport.exporter.outcome import speed
from qexport.runtime.accounting.curve import Setting, profile_of, stored_profile
from qexport.runtime.accounting.machine import count_threads, fingerprint
from qexport.runtime.accounting.profiles import FILE, read_profiles
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions
from qexport.safe_io import publish

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "samples/decoder/stories260k"


def kept(folder, model):
    """What ``keep_profile`` says of a model that was written into a folder; the folder is published."""
    with publish(folder) as stage:
        stage.write_bytes("model.onnx", cached_models.serialized(model))
        warnings = speed.keep_profile(stage, model)
        stage.write_json("manifest.json", {"schema": "qexport.manifest/1", "files": list(stage.files)})
    return warnings


def test_an_export_of_a_decoder_keeps_its_profile_under_the_receipt(tmp_path):
    result = exported(STORIES, tmp_path / "out")
    assert result.warnings == ()
    known = read_profiles(tmp_path / "out" / FILE)
    assert [profile.threads for profile in known] == sorted({1, count_threads(0)})
    assert FILE in result.files
    assert FILE in json.loads((tmp_path / "out/manifest.json").read_text())["files"]
    profile = stored_profile(tmp_path / "out", Setting(fingerprint(), 1))
    decoder = Decoder(tmp_path / "out/model.onnx", SessionOptions(threads=1))
    assert profile_of(tmp_path / "out", decoder, Setting(fingerprint(), 1)) == profile
    assert profile.costs.kv == 4 * sum(heads * size for heads, size in decoder.signature.caches.values())
    assert profile.costs.weights < (tmp_path / "out/model.onnx").stat().st_size


def test_a_build_for_processors_keeps_it_too_and_one_for_engines_does_not(capsys, tmp_path):
    folder = decoder_models.write(tmp_path / "source", decoder_models.settle("mistral"))
    for target, there in (("ort-cpu", True), ("tensorrt", False)):
        out = tmp_path / target
        options = ["--recipe", "float32", "--target", target, "--set", "export.engine=false"]
        code, _, err = call(capsys, "build", str(folder), *options, "-o", str(out))
        assert code == 0, err
        assert (out / FILE).exists() == there
    assert "profile.json" in json.loads((tmp_path / "ort-cpu/manifest.json").read_text())["files"]


def test_measuring_takes_less_than_a_second(tmp_path):
    model = cached_models.portable(cached_models.Tiny())
    began = time.perf_counter()
    assert kept(tmp_path / "out", model) == ()
    assert time.perf_counter() - began < 1.5  # one on a machine with nothing else to do
    assert read_profiles(tmp_path / "out" / FILE)


@pytest.mark.parametrize("case", ["no decoder", "large", "bfloat16", "needs an encoder", "no onnxruntime"])
def test_what_cannot_be_measured_here_goes_without_and_without_a_word(tmp_path, monkeypatch, case):
    model = cached_models.portable(cached_models.Tiny())
    if case == "no decoder":
        model = ir.load(save_model(tmp_path / "relu.onnx"))
    elif case == "large":
        monkeypatch.setattr(speed, "MOST", 1000)
    elif case == "bfloat16":
        for value in model.graph.inputs[3:]:
            value.type = ir.TensorType(ir.DataType.BFLOAT16)
    elif case == "needs an encoder":
        model.graph.inputs.append(ir.Value(name="cross_key_values.0.key"))
    else:
        monkeypatch.setattr(speed, "Decoder", _raises(EnvironmentMismatch("onnxruntime is not installed")))
    assert kept(tmp_path / "out", model) == ()
    assert not (tmp_path / "out" / FILE).exists()


def test_a_failure_is_a_warning_and_the_export_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "Decoder", _raises(BuildFailed("onnxruntime failed")))
    result = exported(STORIES, tmp_path / "out")
    assert result.warnings == ("how long the decoder takes was not measured: onnxruntime failed",)
    assert not (tmp_path / "out" / FILE).exists()
    assert (tmp_path / "out/model.onnx").exists()


def _raises(error):
    def fail(*_, **__):
        raise error

    return fail
