"""Broken and hostile folders, models and options: the right exit code, one line, nothing published, nothing touched."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
from pathlib import Path

import decoder_models
import encoder_models
import numpy as np
import pytest
from helpers import call
from safetensors.numpy import load_file, save_file

from qexport.exporter.load import load_source

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
HOSTILE = "\x1b[31m\u202e<script>"


def tiny(path: Path, **changes) -> Path:
    """A decoder; changes are to its settings alone."""
    folder = decoder_models.write(path, decoder_models.settle("mistral"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def snapshot(path: Path) -> dict[str, str]:
    """Digests of regular files, and where links lead."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_symlink():
            found[str(file)] = os.readlink(file)
        elif file.is_file() and file.stat().st_size < 1 << 20:
            found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def refused(capsys, tmp_path, *arguments: str) -> tuple[int, str]:
    """Export in vain; returns the exit code and the one line, after all that must hold of any failure."""
    before, names = snapshot(tmp_path), set(os.listdir(tmp_path))
    code, out, err = call(capsys, "export", *arguments, "-o", str(tmp_path / "out"))
    told = err.strip().splitlines()
    assert code not in (0, 1), err
    assert out == ""
    errors = [line for line in told if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert all(c.isprintable() for line in told for c in line)
    again, out, _ = call(capsys, "export", *arguments, "-o", str(tmp_path / "out"), "--json")
    failure = json.loads(out)
    assert (again, failure["exit_code"], failure["schema"]) == (code, code, "qexport.error/1")
    assert set(os.listdir(tmp_path)) == names
    assert snapshot(tmp_path) == before
    return code, err


# ---------------------------------------------------------------- shards and their index


def sharded(path: Path) -> dict[str, str]:
    """Split the weights into three; returns the map."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    placed = {}
    for part in range(3):
        name = f"model-{part + 1:05}-of-00003.safetensors"
        mine = {tensor: tensors[tensor] for tensor in sorted(tensors)[part::3]}
        save_file(mine, path / name)
        placed |= dict.fromkeys(mine, name)
    index(path, placed)
    return placed


def index(path: Path, placed: object) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": placed}))


def lead(path: Path, placed: dict[str, str], name: str) -> None:
    index(path, placed | {NORM: name})


def repeat(path: Path, placed: dict[str, str]) -> None:
    """Put a tensor into a second file."""
    other = next(name for name in placed.values() if name != placed[NORM])
    save_file(load_file(path / other) | {NORM: np.zeros(32, np.float32)}, path / other)


def link(path: Path, placed: dict[str, str], target: str) -> None:
    (path / "x.safetensors").symlink_to(target)
    lead(path, placed, "x.safetensors")


def fifo(path: Path, placed: dict[str, str]) -> None:
    os.mkfifo(path / "x.safetensors")
    lead(path, placed, "x.safetensors")


def other_file(path: Path, placed: dict[str, str]) -> None:
    """Say that a tensor is in a file that does not have it."""
    lead(path, placed, next(name for name in placed.values() if name != placed[NORM]))


def spelled(text: bytes):
    return lambda path, _: (path / INDEX).write_bytes(text)


def pickled(path: Path, placed: dict[str, str]) -> None:
    (path / "evil.bin").write_bytes(b"\x80\x04\x95")
    lead(path, placed, "evil.bin")


SHARDS = {
    "missing": (lambda path, placed: (path / placed[NORM]).unlink(), 3, "are missing"),
    "above": (lambda path, placed: lead(path, placed, "../x.safetensors"), 4, "leads out"),
    "above, later": (lambda path, placed: lead(path, placed, "a/../../x.safetensors"), 4, "leads out"),
    "absolute": (lambda path, placed: lead(path, placed, "/etc/hostname"), 4, "leads out"),
    "device": (lambda path, placed: lead(path, placed, "/dev/zero"), 4, "leads out"),
    "empty name": (lambda path, placed: lead(path, placed, ""), 4, "leads out"),
    "nul": (lambda path, placed: lead(path, placed, "a\0b"), 4, "not the name of a file"),
    "long name": (lambda path, placed: lead(path, placed, "x" * 300), 3, "are missing"),
    "hostile name": (lambda path, placed: lead(path, placed, HOSTILE), 3, "are missing"),
    "link out": (lambda path, placed: link(path, placed, "/etc/hostname"), 4, "leads out"),
    "link loop": (lambda path, placed: link(path, placed, "x.safetensors"), 3, "are missing"),
    "fifo": (fifo, 4, "not a regular file"),
    "folder": (lambda path, placed: lead(path, placed, "."), 4, "leads out"),
    "pickle": (pickled, 4, "a Python pickle"),
    "settings": (lambda path, placed: lead(path, placed, "config.json"), 3, "a JSON file"),
    "number": (lambda path, placed: index(path, placed | {NORM: 1}), 3, "weight_map"),
    "list": (lambda path, placed: index(path, list(placed)), 3, "weight_map"),
    "nothing": (lambda path, placed: index(path, {}), 3, "weight_map"),
    "repeated": (repeat, 3, "is also in"),
    "elsewhere": (other_file, 3, "as the index says"),
    "ghost": (lambda path, placed: index(path, placed | {"ghost": placed[NORM]}), 3, "'ghost'"),
    "no json": (spelled(b"{"), 3, "not JSON"),
    "no text": (spelled(b"\xff\xfe{"), 3, "not JSON"),
    "deep": (spelled(b"[" * 100_000), 3, "not JSON"),
    "twice": (spelled(b'{"weight_map": {}, "weight_map": {}}'), 3, "twice"),
    "huge": (lambda path, _: os.truncate(path / INDEX, 1 << 40), 9, "the limit is"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_an_index_that_lies_or_leads_out_is_refused(capsys, tmp_path, case):
    damage, code, words = SHARDS[case]
    folder = tiny(tmp_path / "in")
    damage(folder, sharded(folder))
    found, err = refused(capsys, tmp_path, str(folder))
    assert (found, words in err) == (code, True), err


def test_an_index_that_leaves_a_tensor_out_is_read_as_its_files_are(capsys, tmp_path):
    folder = tiny(tmp_path / "in")
    placed = sharded(folder)
    index(folder, {name: file for name, file in placed.items() if name != NORM})
    assert call(capsys, "export", str(folder), "-o", str(tmp_path / "out"))[0] == 0


# ---------------------------------------------------------------- safetensors


def lied(data: bytes, **changes: object) -> bytes:
    """The same file with another header entry of one tensor."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header[NORM] |= changes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


FILES = {
    "empty": (lambda data: b"", 3, "not a safetensors file"),
    "cut in the length": (lambda data: data[:7], 3, "not a safetensors file"),
    "cut in the header": (lambda data: data[:100], 3, "not a safetensors file"),
    "cut at the end": (lambda data: data[:-1], 3, "not a safetensors file"),
    "more at the end": (lambda data: data + b"\xff" * 64, 3, "not a safetensors file"),
    "noise": (lambda data: np.random.default_rng(0).bytes(4096), 3, "not a safetensors file"),
    "git-lfs": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", 3, "git lfs pull"),
    "web page": (lambda data: b"<!DOCTYPE html><html>", 3, "an HTML page"),
    "pickle": (lambda data: b"\x80\x04\x95" + bytes(64), 4, "a Python pickle"),
    "length of the header": (lambda data: struct.pack("<Q", 1 << 63) + data[8:], 3, "header too large"),
    "beyond the file": (lambda data: lied(data, data_offsets=[0, 1 << 40]), 3, "offset"),
    "overlapping": (lambda data: lied(data, data_offsets=[0, 128]), 3, "offset"),
    "below zero": (lambda data: lied(data, data_offsets=[-128, 0]), 3, "invalid value"),
    "terabytes": (lambda data: lied(data, shape=[1 << 40]), 3, "invalid shape"),
    "more than there are": (lambda data: lied(data, shape=[1 << 33, 1 << 33]), 3, "overflow"),
    "unknown type": (lambda data: lied(data, dtype="X9"), 3, "unknown variant"),
    "whole numbers": (lambda data: lied(data, dtype="I32"), 3, "is of type I32"),
    "8-bit floats": (lambda data: lied(data, dtype="F8_E4M3", shape=[128]), 3, "is [128]"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_of_weights_is_refused(capsys, tmp_path, case):
    damage, code, words = FILES[case]
    folder = tiny(tmp_path / "in")
    file = folder / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    found, err = refused(capsys, tmp_path, str(folder))
    assert (found, words in err) == (code, True), err


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("family", ["mistral", "bert"])
def test_m28_weights_that_are_not_finite_are_named_with_their_file(capsys, tmp_path, family, number):
    folder = tiny(tmp_path / "in") if family == "mistral" else encoder_models.write(tmp_path / "in", "bert")
    tensors = load_file(folder / WEIGHTS)
    name = UP if family == "mistral" else "embeddings.word_embeddings.weight"
    tensors[name][-1, -1] = number
    save_file(tensors, folder / WEIGHTS)
    code, err = refused(capsys, tmp_path, str(folder))
    assert code == 3
    assert f"{folder / WEIGHTS}: NaN or infinity in weight {name!r}" in err
    assert "stage" not in err


def test_m28_a_build_says_so_before_it_does_anything_and_lets_them_in_where_asked(capsys, tmp_path):
    from qexport.errors import ModelInvalid
    from qexport.exporter.admit import Limits

    folder = tiny(tmp_path / "in")
    tensors = load_file(folder / WEIGHTS)
    tensors[UP][0, 0] = np.nan
    save_file(tensors, folder / WEIGHTS)
    code, _, err = call(capsys, "build", str(folder), "--recipe", "float32", "-o", str(tmp_path / "out"))
    assert (code, UP in err) == (3, True), err
    with pytest.raises(ModelInvalid):
        load_source(folder)
    assert load_source(folder, Limits(allow_nonfinite=True)).info.nodes > 50


def test_weights_beyond_the_type_are_told_with_the_types_that_hold_them(capsys, tmp_path):
    folder = tiny(tmp_path / "in")
    tensors = load_file(folder / WEIGHTS)
    tensors[UP][0, 0] = -1e5
    save_file(tensors, folder / WEIGHTS)
    code, err = refused(capsys, tmp_path, str(folder), "--dtype", "float16")
    assert (code, "reaches 1e+05, float16 ends at 6.55e+04" in err, "bfloat16" in err) == (3, True, True), err


def test_weights_whose_products_overflow_are_told_and_do_not_warn(capsys, tmp_path):
    folder = tiny(tmp_path / "in")
    tensors = load_file(folder / WEIGHTS)
    tensors[UP][0] = 3e38
    save_file(tensors, folder / WEIGHTS)
    code, err = refused(capsys, tmp_path, str(folder))
    assert (code, "the source gives NaN or infinity" in err, "Warning" in err) == (5, True, False), err


# ---------------------------------------------------------------- settings


SETTINGS = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "sliding_window")
BENT = {
    "0": 0,
    "-1": -1,
    "10^9": 10**9,
    "10^30": 10**30,
    "1.5": 1.5,
    "4.0": 4.0,
    "text": "4",
    "true": True,
    "list": [4],
}


WIDE = ("sliding_window", "10^9")  # allowed: no row is that long, and nothing is taken for it


@pytest.mark.parametrize(("name", "value"), [pair for pair in itertools.product(SETTINGS, BENT) if pair != WIDE])
def test_settings_that_are_no_sizes_are_refused_before_memory_is_taken(capsys, tmp_path, name, value):
    code, err = refused(capsys, tmp_path, str(tiny(tmp_path / "in", **{name: BENT[value]})))
    assert code == 3, err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": float("inf")}, "finite number"),
        ({"rope_theta": "10000"}, "is no number"),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "less than"),
        ({"tie_word_embeddings": "no"}, "neither true nor false"),
        ({"model_type": HOSTILE}, "unknown model_type"),
        ({"model_type": "x" * 100_000}, "unknown model_type"),
        ({"architectures": [HOSTILE]}, "is not built from"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ],
)
def test_settings_that_mean_nothing_are_refused(capsys, tmp_path, changes, words):
    code, err = refused(capsys, tmp_path, str(tiny(tmp_path / "in", **changes)))
    assert (code, words in err) == (4 if "auto_map" in changes else 3, True), err
    assert len(err) < 5000


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xe9", b"\0" * 9, b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_damaged_file_of_settings_is_refused(capsys, tmp_path, text):
    folder = tiny(tmp_path / "in")
    (folder / "config.json").write_bytes(text)
    assert refused(capsys, tmp_path, str(folder))[0] == 3


def test_a_setting_that_is_there_twice_is_refused(capsys, tmp_path):
    folder = tiny(tmp_path / "in")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-1] + ', "vocab_size": 50}')
    code, err = refused(capsys, tmp_path, str(folder))
    assert (code, "'vocab_size' is there twice" in err) == (3, True), err


@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json", "preprocessor_config.json"])
def test_n03_code_of_a_folder_is_refused_wherever_it_is_named(capsys, tmp_path, name):
    folder = tiny(tmp_path / "in")
    (folder / name).write_text(json.dumps({"auto_map": {"AutoProcessor": "x.Y"}}))
    code, err = refused(capsys, tmp_path, str(folder))
    assert (code, f"{name} asks to run code" in err) == (4, True), err


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer_config.json"])
def test_m11_files_that_are_none_are_not_waited_for(capsys, tmp_path, name):
    folder = tiny(tmp_path / "in")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    code, err = refused(capsys, tmp_path, str(folder))
    assert (code, "not a regular file" in err) == (4, True), err
