"""samples/babyllama.py: a made-up file of llama2.c says the same before and after."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING
from qexport.exporter.references.decoder import open_reference

SCRIPT = Path(__file__).resolve().parents[1] / "samples/babyllama.py"
WIDTH, INNER, LAYERS, HEADS, KEY_HEADS, CONTEXT, HEAD = 24, 40, 2, 4, 2, 16, 6
TEXTS = ("<unk>", "<s>", "</s>", "\u2581", *"abc", "ab", "\u2581ab", "abc", "\u20ac", "bc", "ca", "aa", "ba", "cc")
ROWS = len(TEXTS)


@pytest.fixture(scope="module")
def babyllama():
    spec = importlib.util.spec_from_file_location("babyllama", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["babyllama"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["babyllama"]


def made_up(tied):
    """Header and parts, named as in llama2.c's run.c, in the order of the file."""
    random = np.random.default_rng(1)
    keys, table = KEY_HEADS * HEAD, np.outer(np.arange(CONTEXT), 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD))
    shapes = {
        "token_embedding": (ROWS, WIDTH),
        "rms_att": (LAYERS, WIDTH),
        "wq": (LAYERS, WIDTH, WIDTH),
        "wk": (LAYERS, keys, WIDTH),
        "wv": (LAYERS, keys, WIDTH),
        "wo": (LAYERS, WIDTH, WIDTH),
        "rms_ffn": (LAYERS, WIDTH),
        "w1": (LAYERS, INNER, WIDTH),
        "w2": (LAYERS, WIDTH, INNER),
        "w3": (LAYERS, INNER, WIDTH),
        "rms_final": (WIDTH,),
    }
    parts = {name: random.normal(1 if "rms" in name else 0, 0.4, shape) for name, shape in shapes.items()}
    parts |= {"cosines": np.cos(table), "sines": np.sin(table)}
    if not tied:
        parts["wcls"] = random.normal(0, 0.4, (ROWS, WIDTH))
    header = struct.pack("<7i", WIDTH, INNER, LAYERS, HEADS, KEY_HEADS, ROWS if tied else -ROWS, CONTEXT)
    return header + b"".join(part.astype("<f4").tobytes() for part in parts.values()), parts


def norm(x, weight):
    return weight * x / np.sqrt(np.mean(x * x) + 1e-5)


def spoken(parts, ids):
    """Logits [tokens, ROWS] as run.c computes them: a token at a time, neighbours turned by the tables of the file."""
    kept, logits = [[] for _ in range(LAYERS)], []
    for at, token in enumerate(ids):
        x = parts["token_embedding"][token]
        for i in range(LAYERS):
            y = norm(x, parts["rms_att"][i])
            turn = parts["cosines"][at] + 1j * parts["sines"][at]
            query, key = (((w[i] @ y).reshape(-1, HEAD // 2, 2) @ [1, 1j]) * turn for w in (parts["wq"], parts["wk"]))
            kept[i].append((key, (parts["wv"][i] @ y).reshape(KEY_HEADS, HEAD)))
            heads = []
            for head, asked in enumerate(query):
                group = head // (HEADS // KEY_HEADS)
                scores = np.array([np.real(asked @ keys[group].conj()) for keys, _ in kept[i]]) / np.sqrt(HEAD)
                weights = np.exp(scores - scores.max())
                heads.append(weights / weights.sum() @ np.array([values[group] for _, values in kept[i]]))
            x = x + parts["wo"][i] @ np.concatenate(heads)
            y = norm(x, parts["rms_ffn"][i])
            gate = parts["w1"][i] @ y
            x = x + parts["w2"][i] @ (gate / (1 + np.exp(-gate)) * (parts["w3"][i] @ y))
        logits.append(parts.get("wcls", parts["token_embedding"]) @ norm(x, parts["rms_final"]))
    return np.array(logits)


def field(number, value):
    """One field of a protobuf message; all that is needed here is shorter than 128."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    kind = 5 if isinstance(value, float) else 2
    content = struct.pack("<f", value) if kind == 5 else bytes([len(value)]) + value
    return bytes([number << 3 | kind]) + content


def sentencepiece_model(texts=TEXTS, model_type=2, rule=b"identity"):
    pieces = b""
    for i, text in enumerate(texts):
        kind = {0: 2, 1: 3, 2: 3}.get(i, 1)
        pieces += field(1, field(1, text.encode()) + field(2, -float(i)) + (field(3, kind) if kind > 1 else b""))
    return pieces + field(2, field(3, model_type)) + field(3, field(1, rule))


@pytest.fixture
def files(tmp_path):
    def write(tied=True, **said):
        data, parts = made_up(tied)
        (tmp_path / "model.bin").write_bytes(data)
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**said))
        return tmp_path / "model.bin", tmp_path / "tokenizer.model", tmp_path / "out", parts

    return write


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_model_says_what_the_c_program_says(babyllama, files, tied):
    model, tokenizer, out, parts = files(tied)
    babyllama.convert(model, tokenizer, out)
    ids = np.array([[1, 8, 4, 5, 6, 7, 9, 3, 3, 15, 2, 11]])
    reference = open_reference(json.loads((out / "config.json").read_text()), Folder(out), SCORING)
    logits = reference({"input_ids": ids})["logits"][0]
    assert np.ptp(logits) > 1
    np.testing.assert_allclose(logits, spoken(parts, ids[0]), atol=2e-5)


@pytest.mark.torch
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_a_converted_model(babyllama, files, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, tokenizer, out, parts = files(tied)
    babyllama.convert(model, tokenizer, out)
    ids = [1, 8, 4, 5, 6, 7, 9, 3, 3, 15, 2, 11]
    with torch.no_grad():
        logits = transformers.LlamaForCausalLM.from_pretrained(out)(input_ids=torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(logits, spoken(parts, ids), atol=2e-5)


def test_a_converted_tokenizer_merges_the_best_piece_first_and_reads_spaces_as_sentencepiece_does(babyllama, files):
    model, tokenizer, out, _ = files()
    babyllama.convert(model, tokenizer, out)
    converted = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert converted.encode("ab").tokens == ["<s>", "\u2581ab"]
    assert converted.encode("  abc  bca ").tokens == ["<s>", "\u2581ab", "c", "\u2581", "bc", "a"]
    assert converted.encode("c\u20acx").tokens == ["<s>", "\u2581", "c", "\u20ac", "<unk>"]
    assert converted.decode(converted.encode("abc ab").ids) == "abc ab"
    assert converted.encode("").ids == [1]


def test_refuses_files_that_do_not_belong_together(babyllama, files):
    model, tokenizer, out, _ = files(texts=TEXTS[:-1])
    result = CliRunner().invoke(babyllama.main, [str(model), str(tokenizer), "-o", str(out)])
    assert result.exit_code == 1
    assert "15 pieces" in result.output
    assert not out.exists()


@pytest.mark.parametrize("said", [{"model_type": 1}, {"rule": b"nmt_nfkc"}])
def test_refuses_other_kinds_of_sentencepiece(babyllama, files, said):
    model, tokenizer, out, _ = files(**said)
    with pytest.raises(ValueError, match="only sentencepiece models of type bpe"):
        babyllama.convert(model, tokenizer, out)


def test_refuses_a_file_with_too_few_or_too_many_bytes_and_one_that_begins_otherwise(babyllama):
    data, _ = made_up(tied=True)
    for wrong in (data[:-4], data + b"\0\0\0\0", data[4:]):
        with pytest.raises(ValueError, match=r"bytes, the file has|does not begin"):
            babyllama.read_model(wrong)
    with pytest.raises(ValueError, match="shorter than the header"):
        babyllama.read_model(data[:20])
