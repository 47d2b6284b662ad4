"""``qexport export`` of what needs torch: modules, pickles, transformers."""

from __future__ import annotations

import json

import decoder_models
import encoder_models
import numpy as np
import pytest
from helpers import call, exported


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


MODULE = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
"""


@pytest.mark.torch
def test_a_torch_module_is_exported_with_its_described_inputs(capsys, tmp_path, torch):
    (tmp_path / "net.py").write_text(MODULE)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32))
    source, given = f"{tmp_path / 'net.py'}:make", ["--input", "x:float32[batch,8]", "--data", str(tmp_path / "x.npz")]
    code, told, err = call(capsys, "export", source, *given, "-o", str(tmp_path / "out"), "--json")
    assert code == 0, err
    result = json.loads(told)
    assert (result["door"], result["layout"]) == ("torch", "plain")
    assert result["parts"]["model.onnx"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 8]}]
    assert result["verification"]["reference"] == "the torch module itself"
    assert result["verification"]["checks"][0]["what"] == "4 batches" or result["verification"]["checks"][0]["numbers"]
    for wrong_flags in (["--dtype", "float16"], ["--task", "x"], ["--text", "x.txt"]):
        code, _, err = call(capsys, "export", source, *given, *wrong_flags, "-o", str(tmp_path / "other"))
        assert code == 2, err


@pytest.mark.torch
def test_a_pickled_checkpoint_is_read_where_a_person_allows_it(tmp_path, torch):
    folder = decoder_models.write(tmp_path / "in", decoder_models.settle("mistral"))
    weights = decoder_models.weights(json.loads((folder / "config.json").read_text()))
    truth = exported(folder, tmp_path / "safe")
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    result = exported(folder, tmp_path / "out", allow_pickle=True)
    assert result.files["model.onnx"].digest == truth.files["model.onnx"].digest
    assert result.source.bytes > truth.source.bytes / 2


@pytest.mark.torch
def test_an_encoder_is_exported_by_way_of_transformers(tmp_path, torch):
    pytest.importorskip("transformers")
    folder = encoder_models.write(tmp_path / "in", "bert")
    result = exported(folder, tmp_path / "out", via="torch")
    assert result.door == "torch"
    assert [port.name for port in result.parts["model.onnx"].outputs] == ["last_hidden_state"]
