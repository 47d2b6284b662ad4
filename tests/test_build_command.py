"""``qexport build`` from the command line, over the whole road."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import call, save_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model.onnx")


def build(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    return call(capsys, "build", *arguments)


def samples(folder: Path, count: int = 16) -> Path:
    path = folder / "samples.npz"
    data = np.random.default_rng(1).standard_normal((count, 32)).astype(np.float32)
    np.savez(path, x=data)
    return path


def test_int8_without_data_is_a_usage_error_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    code, out, err = build(capsys, str(model), "--int8", "-o", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert "--calib" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["int8", "float16", "float32"])
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_every_shipped_recipe_builds_a_tiny_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, recipe: str, target: str
) -> None:
    before = model.read_bytes()
    out = tmp_path / "out"
    data = ["--calib", str(samples(tmp_path))] if recipe == "int8" else []
    data += ["--set", "export.never_worse=false"]  # whether int8 pays on a tiny model is left to chance
    code, told, err = build(capsys, str(model), "--recipe", recipe, "--target", target, *data, "-o", str(out), "--json")
    assert code == 0, err
    result = json.loads(told)
    assert result["schema"] == "qexport.result/1"
    assert result["target"] == target
    assert (result["quantized"] > 0) == (recipe == "int8")
    assert {"model.onnx", "manifest.json", "result.json", "report.md", "report.html", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    assert model.read_bytes() == before


def test_a_build_ends_with_a_short_summary_and_keeps_progress_off_stdout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "out"
    code, told, err = build(
        capsys, str(model), "--int8", "--calib", str(samples(tmp_path)), "--target", "ort-cpu", "-o", str(out)
    )
    assert code == 0, err
    assert len(told.splitlines()) <= 15
    assert told.splitlines()[-1].startswith("next")
    assert " s] " in err


def test_a_folder_whose_name_is_no_text_holds_a_whole_artefact(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xc3\xa9 \xff\xfe"))
    folder.mkdir()
    model, out = save_model(folder / "model.onnx"), folder / "out"
    arguments = [str(model), "--calib", str(samples(folder)), "--target", "ort-cpu", "-o", str(out)]
    for _ in range(2):  # the second build replaces the first
        code, told, err = build(capsys, *arguments, "--json")
        assert code == 0, err
    for result in (json.loads(told), json.loads((out / "result.json").read_bytes())):
        assert os.fsencode(result["source"]["path"]) == os.fsencode(model)
        assert os.fsencode(result["directory"]) == os.fsencode(out)
    assert os.fsencode(json.loads((out / "manifest.json").read_bytes())["source"]["path"]) == os.fsencode(model)
    (out / "report.md").read_text("utf-8")
    code, told, err = build(capsys, *arguments)
    assert code == 0, err
    assert "café" in told


def test_a_model_that_yields_nan_itself_cannot_be_judged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 32] x) => (float[n, 32] y) { y = Log(x) }'
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    out = tmp_path / "out"
    arguments = ["--recipe", "float32", "--target", "ort-cpu", "--calib", str(samples(tmp_path)), "-o", str(out)]
    code, _, err = build(capsys, str(path), *arguments)
    assert code == 5
    assert "of the float model holds NaN or infinity" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--set", "quantize.min_sqrn=18"), "did you mean 'min_sqnr'?"),
        (("--target", "ort-cpuu"), "error: target: unknown target 'ort-cpuu'\nhint: did you mean 'ort-cpu'?"),
        (("--recipe", "int9"), "int8"),
    ],
)
def test_a_misspelt_name_in_a_build_is_a_usage_error_with_a_hint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, arguments: tuple[str, ...], hint: str
) -> None:
    data = samples(tmp_path)
    code, out, err = build(capsys, str(model), *arguments, "--calib", str(data), "-o", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert hint in err
    assert not (tmp_path / "out").exists()
