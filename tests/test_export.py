"""``qexport export`` over the whole road: folders, files and modules in; a proven folder, or nothing, out."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import decoder_models
import encoder_models
import numpy as np
import onnx
import pytest
import t5_models
import vit_models
from helpers import call, exported, save_model

from qexport.errors import DataInvalid, GateFailed, UsageError
from qexport.exporter import export as road
from qexport.exporter.doors import own_folder
from qexport.exporter.load import load_source
from qexport.runtime.decoder import Decoder

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "samples/decoder/stories260k"
RESNET = ROOT / "samples/resnet20"
APPENDED = ROOT / "tests/models/llama_past_optimum.onnx"
FILES = {"model.onnx", "manifest.json", "export.json"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def tiny(path, **changes):
    """A decoder without a tokenizer."""
    return decoder_models.write(path, decoder_models.settle("mistral", **changes))


def tokenizer(folder, words):
    """A tokenizer that knows so many words, and its numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"[UNK]": 0} | {str(n): n for n in range(1, words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(made.to_str())


# ---------------------------------------------------------------- what comes out


def test_a_decoder_leaves_in_the_portable_layout_with_a_receipt(capsys, tmp_path):
    before = {path: path.read_bytes() for path in STORIES.iterdir()}
    out = tmp_path / "out"
    code, told, err = call(capsys, "export", str(STORIES), "-o", str(out), "--json")
    assert code == 0, err
    result = json.loads(told)
    assert result["schema"] == "qexport.export/1"
    assert (result["door"], result["family"], result["layout"]) == ("qexport", "llama", "cached")
    assert result["warnings"] == []
    assert not result["verification"]["made_up"]
    checks = {check["what"]: check for check in result["verification"]["checks"]}
    assert list(checks) == [
        "prompt of 20",
        "8 single steps",
        "wide step of 5, after going back",
        "step of 63, up to 96 tokens",
        "batch of 3 rows of different lengths",
    ]
    assert all(check["argmax"] == 1 for check in checks.values())
    assert names(out) == FILES | {
        "profile.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["schema"] == "qexport.manifest/1"
    assert manifest["source"]["digest"] == result["source"]["digest"]
    assert manifest["verification"] == result["verification"]
    assert manifest["tools"]["onnx"]
    for name, info in manifest["files"].items():
        data = (out / name).read_bytes()
        assert info == {"bytes": len(data), "digest": f"sha256:{hashlib.sha256(data).hexdigest()}"}
    assert set(manifest["files"]) == names(out) - {"manifest.json"}
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    assert {path: path.read_bytes() for path in STORIES.iterdir()} == before


def test_what_was_written_decodes(tmp_path):
    exported(STORIES, tmp_path / "out")
    ids = np.arange(3, 23)[None]
    decoder = Decoder(tmp_path / "out/model.onnx")
    truth = decoder_models.truth_of(STORIES, ids)
    assert np.abs(decoder.extend(ids) - truth).max() < 1e-4


def test_the_summary_says_what_was_held_against_what(capsys, tmp_path):
    code, told, err = call(capsys, "export", str(STORIES), "-o", str(tmp_path / "out"))
    assert code == 0, err
    lines = dict(line.split(None, 1) for line in told.splitlines())
    assert lines["source"].startswith(str(STORIES))
    assert "opset 24" in lines["written"]
    assert "in numpy" in lines["verified"]
    assert "allowed" in lines["worst"]
    assert lines["next"].startswith("qexport build ")
    assert " s] verify" in err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decoders_are_written_in_sixteen_bits(tmp_path, dtype):
    result = exported(STORIES, tmp_path / "out", dtype=dtype)
    caches = [port for port in result.parts["model.onnx"].inputs if port.name.startswith("past")]
    assert len(caches) == 10
    assert {port.dtype for port in caches} == {dtype}
    assert {port.dtype for port in result.parts["model.onnx"].outputs if port.name == "logits"} == {"float32"}
    assert max(check.rms for check in result.verification.checks) < 0.02
    assert min(check.argmax for check in result.verification.checks) > 0.9


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["mistral", "qwen2, yarn", "qwen3, chosen windows", "bitnet, tied"])
def test_families_pass_with_room_to_spare(tmp_path, name, dtype):
    result = exported(decoder_models.write(tmp_path / "in", decoder_models.settle(name)), tmp_path / "out", dtype=dtype)
    for check in result.verification.checks:
        assert check.rms < 0.8 * check.allowed_rms
        assert check.error < 0.5 * check.allowed_error


def test_decoders_are_written_for_scoring_where_asked(tmp_path):
    result = exported(STORIES, tmp_path / "out", layout="scoring")
    assert result.layout == "scoring"
    assert [port.name for port in result.parts["model.onnx"].inputs] == ["input_ids", "attention_mask"]
    assert result.verification.data == "twelve sentences of prose"


def test_minilm_is_exported_without_torch(tmp_path, minilm):
    result = exported(minilm, tmp_path / "out")
    assert (result.layout, result.family) == ("plain", "bert")
    assert {check.output for check in result.verification.checks} == {"last_hidden_state", "sentence_embedding"}
    assert max(check.error for check in result.verification.checks) < 1e-5
    assert "model.onnx.data" in names(tmp_path / "out")
    source = load_source(tmp_path / "out")
    assert source.tokenizer is not None
    assert source.info.parameters == result.parts["model.onnx"].parameters


@pytest.mark.parametrize("task", encoder_models.TASKS)
def test_the_head_of_an_encoder_is_chosen(tmp_path, task):
    folder = encoder_models.write(tmp_path / "in", "roberta", task)
    result = exported(folder, tmp_path / "out", task=task)
    assert result.task == task
    assert result.verification.made_up
    outputs = {port.name for port in result.parts["model.onnx"].outputs}
    assert outputs == {check.output for check in result.verification.checks}


def test_an_encoder_decoder_leaves_in_two_parts(tmp_path):
    result = exported(t5_models.write(tmp_path / "in"), tmp_path / "out")
    assert set(result.parts) == {"model.onnx", "encoder.onnx"}
    assert FILES | {"encoder.onnx", "config.json"} == names(tmp_path / "out")
    assert result.layout == "cached"
    assert min(check.argmax for check in result.verification.checks) == 1


def test_a_vision_model_is_verified_on_made_up_pictures_and_says_so(tmp_path):
    result = exported(vit_models.write(tmp_path / "in"), tmp_path / "out")
    assert result.verification.data == "smooth pictures"
    assert "made up" in result.warnings[0]


def test_a_file_of_another_exporter_comes_out_as_it_is(tmp_path):
    result = exported(RESNET / "resnet20.onnx", tmp_path / "out", data=RESNET / "test.npz")
    assert (result.door, result.layout, result.warnings) == ("onnx", "plain", ())
    assert result.verification.data == "test.npz"
    assert [check.what for check in result.verification.checks] == ["a batch of 8", "4 samples, each alone"]
    assert load_source(tmp_path / "out").info.parameters == result.source.parameters


def test_a_decoder_of_another_exporter_gets_the_portable_layout(tmp_path):
    result = exported(APPENDED, tmp_path / "out")
    assert (result.door, result.layout) == ("onnx", "cached")
    assert result.verification.made_up
    assert len(result.verification.checks) == 5


@pytest.mark.parametrize("name", ["opt_past_optimum", "gpt2_past_optimum", "llama_past_dynamo23"])
def test_its_rows_are_as_long_as_it_has_positions(tmp_path, name):
    exported(ROOT / f"tests/models/{name}.onnx", tmp_path / "out")
    assert (tmp_path / "out/model.onnx").exists()


def test_an_export_can_be_exported_again(tmp_path):
    exported(STORIES, tmp_path / "one")
    result = exported(tmp_path / "one", tmp_path / "two")
    assert (result.door, result.layout) == ("onnx", "cached")
    one, two = (load_source(tmp_path / name).model for name in ("one", "two"))
    assert [node.op_type for node in one.graph] == [node.op_type for node in two.graph]


def test_an_earlier_export_is_replaced(tmp_path):
    exported(STORIES, tmp_path / "out")
    result = exported(tiny(tmp_path / "in"), tmp_path / "out")
    assert result.family == "mistral"
    assert names(tmp_path / "out") == FILES | {"profile.json", "config.json"}


def test_weights_beyond_a_size_lie_in_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(road, "INLINE", 1000)
    result = exported(STORIES, tmp_path / "out")
    assert result.files["model.onnx.data"].bytes > 1_000_000
    assert load_source(tmp_path / "out").info.parameters == result.parts["model.onnx"].parameters


# ---------------------------------------------------------------- inputs to verify on


def test_text_of_a_person_is_what_is_read(tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text("Once there was a tree that wanted to be a ship.\n" * 30)
    assert exported(STORIES, tmp_path / "one", text=text).verification.data == "prose.txt"
    assert exported(STORIES, tmp_path / "two", text=text, layout="scoring").verification.data == "prose.txt"


def test_token_numbers_of_a_person_are_what_is_read(tmp_path):
    rows = np.random.default_rng(0).integers(3, 500, (4, 50))
    np.savez(tmp_path / "ids.npz", input_ids=rows)
    result = exported(STORIES, tmp_path / "out", data=tmp_path / "ids.npz")
    assert result.verification.data == "ids.npz"
    assert "step of 21, up to 50 tokens" in {check.what for check in result.verification.checks}


def test_without_a_tokenizer_token_numbers_are_made_up_and_a_warning_says_so(tmp_path):
    result = exported(tiny(tmp_path / "in"), tmp_path / "out")
    assert result.verification.made_up
    assert "token numbers" in result.warnings[0]


def test_text_without_a_tokenizer_is_refused(capsys, tmp_path):
    (tmp_path / "prose.txt").write_text("Once upon a time.")
    folder = tiny(tmp_path / "in")
    code, _, err = call(
        capsys, "export", str(folder), "-o", str(tmp_path / "out"), "--text", str(tmp_path / "prose.txt")
    )
    assert code == DataInvalid.exit_code
    assert "tokenizer" in err
    assert names(tmp_path) == {"in", "prose.txt"}


def test_a_tokenizer_with_more_words_than_the_model_is_refused_at_the_start(tmp_path, monkeypatch):
    folder = tiny(tmp_path / "in")
    tokenizer(folder, 51)
    monkeypatch.setattr(road, "verify", None)
    with pytest.raises(DataInvalid, match="numbers up to 50"):
        exported(folder, tmp_path / "out")
    tokenizer(folder, 50)
    monkeypatch.undo()
    (tmp_path / "prose.txt").write_text(" ".join(str(n % 50) for n in range(300)))
    assert not exported(folder, tmp_path / "out", text=tmp_path / "prose.txt").verification.made_up


def test_too_little_text_and_two_sources_of_it_are_refused(tmp_path):
    (tmp_path / "prose.txt").write_text("a")
    with pytest.raises(DataInvalid, match="too few"):
        exported(STORIES, tmp_path / "out", text=tmp_path / "prose.txt")
    with pytest.raises(UsageError, match="exclude each other"):
        exported(STORIES, tmp_path / "out", text=tmp_path / "prose.txt", data=tmp_path / "prose.txt")


# ---------------------------------------------------------------- nothing is published


def wrong(config, folder, form):
    return real_reference({**config, "rms_norm_eps": 0.1, "rope_parameters": {"rope_theta": 500.0}}, folder, form)


real_reference = own_folder.find_reference


@pytest.mark.parametrize("layout", ["cached", "scoring"])
def test_an_export_that_differs_from_its_source_is_not_published(capsys, tmp_path, monkeypatch, layout):
    out = tmp_path / "out"
    exported(STORIES, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(own_folder, "find_reference", wrong)
    code, told, err = call(capsys, "export", str(STORIES), "-o", str(out), "--layout", layout, "--json")
    assert code == GateFailed.exit_code
    failure = json.loads(told)
    assert "expected" in failure["what"]
    assert "logits" in failure["where"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert names(tmp_path) == {"out"}
    del err


@pytest.mark.parametrize("stage", ["_write", "verify"])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, stage):
    def stop(*_args, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr(road, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        exported(STORIES, tmp_path / "deep/out")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 2, "no such file or folder"),
        (["{stories}", "--dtype", "int8"], 2, "known: float32, float16, bfloat16"),
        (["{stories}", "--via", "magic"], 2, "known: auto, qexport, torch, optimum"),
        (["{stories}", "--layout", "flat"], 2, "known: cached, scoring"),
        (["{stories}", "--task", "classification"], 2, "leave --task out"),
        (["{stories}", "--input", "x:float32[batch]"], 2, "--input describes torch modules"),
        (["{encoder}", "--task", "sorting"], 2, "known: embedding"),
        (["{onnx}", "--dtype", "float16"], 2, "qexport build --recipe float16"),
        (["{onnx}", "--task", "embedding"], 2, "leave --task out"),
        (["{onnx}", "--via", "torch"], 2, "config.json"),
        (["{appended}", "--layout", "scoring"], 2, "leave --layout out"),
        (["{stories}", "--data", "nowhere.npz"], 2, "nowhere.npz"),
        (["{unknown}"], 3, "mistral"),
        (["{code}"], 4, "auto_map"),
        (["{pickle}"], 4, "pickle"),
    ],
)
def test_a_mistake_is_told_and_leaves_nothing(capsys, tmp_path, arguments, code, words):
    places = {"stories": STORIES, "appended": APPENDED, "onnx": save_model(tmp_path / "m.onnx")}
    places["encoder"] = encoder_models.write(tmp_path / "encoder", "bert")
    for name, changes in (("unknown", {"model_type": "mistrall"}), ("code", {"auto_map": {"AutoModel": "x.Y"}})):
        places[name] = tiny(tmp_path / name)
        config = json.loads((places[name] / "config.json").read_text()) | changes
        (places[name] / "config.json").write_text(json.dumps(config))
    places["pickle"] = tiny(tmp_path / "pickle")
    (places["pickle"] / "model.safetensors").rename(places["pickle"] / "pytorch_model.bin")
    before = names(tmp_path)
    given = [argument.format(**places) for argument in arguments]
    found, _, err = call(capsys, "export", *given, "-o", str(tmp_path / "out"))
    assert (found, words in err) == (code, True), err
    assert names(tmp_path) == before


def test_the_output_may_not_hold_the_source_or_files_of_others(capsys, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(STORIES, folder)
    for out in (folder, tmp_path):
        code, _, err = call(capsys, "export", str(folder), "-o", str(out))
        assert code == 2, err
    assert names(folder) == names(STORIES)


def test_a_missing_shard_is_named(capsys, tmp_path):
    folder = tiny(tmp_path / "in")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, err = call(capsys, "export", str(folder), "-o", str(tmp_path / "out"))
    assert code == 3
    assert "model-00001-of-00002.safetensors" in err
