"""What a generator refuses before it does any work."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from cached_models import VOCABULARY, Tiny, portable, serialized
from generating import made_of, opened, seal, tokenizer, write_folder
from helpers import save_model

from qexport.errors import DataInvalid, IntegrityError, ModelInvalid, QexportError, UsageError
from qexport.runtime.generation.generator import GenerateOptions, Generator
from qexport.runtime.generation.prompts import Prompt
from qexport.runtime.generation.stops import Stop
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.session import SessionOptions
from qexport.runtime.speculation.proposal import Reference

SHORT = 16  # positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "model", made_of(Tiny().weights, SHORT))


@pytest.fixture(scope="module")
def generator(folder):
    with opened(folder) as found:
        yield found


@pytest.fixture
def copied(tmp_path, folder):
    return shutil.copytree(folder, tmp_path / "copy")


def refused(call, *arguments, **asked) -> QexportError:
    with pytest.raises(QexportError) as raised:
        call(*arguments, **asked)
    assert type(raised.value) is not QexportError
    return raised.value


def edit(folder, name, **settings):
    (folder / name).write_text(json.dumps(settings))
    seal(folder)


# ---------------------------------------------------------------- prompts


def test_a_prompt_without_tokens_is_refused_and_the_beginning_offered(generator, copied):
    for prompt in ("", []):
        error = refused(generator.generate, prompt)
        assert (type(error), error.where, error.what) == (
            DataInvalid,
            "prompt 0",
            "there is nothing to continue: no tokens",
        )
        assert error.hint == "give some text, or '<end>', which texts of this model begin with"
    edit(copied, "tokenizer_config.json", bos_token=None)
    with opened(copied) as other:
        assert refused(other.generate, "").hint == "give some text"
    assert generator.complete(["<end>"], stop=Stop(2, eos=False))[0].reason == "length"


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(generator):
    assert len(generator.complete([[1] * (SHORT - 1)], stop=Stop(9))[0].tokens) == 1
    for count in (SHORT, 5000):
        error = refused(generator.batch, ["ab", [1] * count])
        assert str(error) == (
            f"prompt 1: {count} tokens, and the model has {SHORT} positions: there is no room for another"
            f" (give {SHORT - 1} tokens at most)"
        )
        assert error.exit_code == 5


def test_a_text_of_megabytes_is_refused_before_it_is_tokenized(generator, monkeypatch):
    monkeypatch.setattr(type(generator.tokenizer), "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    error = refused(generator.generate, "ab" * (1 << 20))
    assert "2097152 characters are more than 16 positions hold" in error.what


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, VOCABULARY], "token 1 is 50, the model has a vocabulary of 50"),
        ([-1], "token 0 is -1"),
        ([2**70], "token 0 is 1180591620717411303424"),
        ([1.5], "token 0 is 1.5, expected an integer"),
        (["a"], "token 0 is 'a', expected an integer"),
    ],
)
def test_tokens_that_do_not_exist_are_refused(generator, ids, said):
    error = refused(generator.generate, ids)
    assert error.what.startswith(said)
    assert type(error) is DataInvalid


def test_text_that_is_not_unicode_is_refused(generator):
    assert "not Unicode" in refused(generator.generate, "a\ud800").what


@pytest.mark.parametrize("prompt", [None, 5, b"\1\2", {1: 2}, {1, 2}, bytearray(b"\1")], ids=str)
def test_what_is_neither_text_nor_tokens_is_refused(generator, prompt):
    error = refused(generator.batch, ["ab", prompt])
    assert str(error) == f"prompt 1: it is a {type(prompt).__name__}, expected text or tokens"
    assert error.exit_code == 5


def test_one_text_is_not_several_prompts(generator):
    assert refused(generator.batch, "ab").what == "prompts are one text, expected several"
    for other in (b"ab", {"ab": 1}, None, 7):
        assert refused(generator.batch, other).what == f"prompts are a {type(other).__name__}, expected several"
    assert generator.complete([]) == []


def test_settings_are_given_as_settings(generator):
    assert refused(generator.generate, "ab", {"temperature": 1}).hint == "write Sampling(...)"
    assert refused(generator.generate, "ab", stop=5).hint == "write Stop(...)"


def test_references_are_tokens_of_the_model(generator):
    for ids, said in (
        ((1, 50), "token 1 is 50"),
        ((-1,), "token 0 is -1"),
        (("a",), "token 0 is 'a'"),
        (None, "it is a"),
    ):
        error = refused(generator.generate, "ab", references=["the end", Reference("notes", ids)])
        assert error.where == "prompt 0, reference 1"
        assert error.what.startswith(said)
    assert (
        refused(generator.generate, "ab", references="notes").what == "references are a str, expected a list of texts"
    )
    assert refused(generator.batch, [Prompt("ab", None)]).exit_code == 2


def test_references_of_megabytes_are_refused_before_they_are_tokenized(generator, monkeypatch):
    monkeypatch.setattr(type(generator.tokenizer), "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    error = refused(generator.generate, [1], references=["ab" * (1 << 22)] * 3)
    assert str(error).startswith("prompt 0: the references have 25165824 characters, expected 16777216 or fewer")


def test_references_are_texts_and_not_too_long(generator):
    list(generator.generate("ab", references=["the end", Reference("notes", (1, 2))], stop=Stop(2)))
    long = Reference("notes", (1,) * ((1 << 20) + 1))
    error = refused(generator.batch, ["a", Prompt("b", [long])])
    assert str(error).startswith("prompt 1: the references have 1048577 tokens, expected 1048576 or fewer")
    assert refused(generator.generate, "a", references=[7]).what == "reference 0 is a int, expected text or a Reference"


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 0, "top_k": 5}, "temperature is 0, which is greedy"),
        ({"temperature": 0, "top_p": 0.5}, "temperature is 0, which is greedy"),
        ({"temperature": 0, "min_p": 0.5}, "temperature is 0, which is greedy"),
        ({"temperature": 1, "top_k": -1}, "top_k"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"temperature": 1, "top_p": float("nan")}, "top_p"),
        ({"temperature": 1, "min_p": 1.5}, "min_p"),
        ({"temperature": 1, "min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"seed": -1}, "seed"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias"),
        ({"logit_bias": {-3: 1.0}}, "logit_bias"),
        ({"logit_bias": {3: 1e308}}, "logit_bias is 1e+308"),
        ({"logit_bias": {3: 10**400}}, "logit_bias"),
        ({"logit_bias": {3: "1"}}, "logit_bias is '1' for token 3"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias is 1.0 for token '3'"),
        ({"logit_bias": {3.5: 1.0}}, "logit_bias"),
        ({"logit_bias": [(3, 1.0)]}, "logit_bias is a list"),
        ({"logit_bias": None}, "logit_bias"),
        ({"temperature": "0.8"}, "temperature is '0.8'"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 1e-310}, "temperature is 1e-310"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": 1, "top_k": 2.5}, "top_k is 2.5"),
        ({"temperature": 1, "top_k": "5"}, "top_k is '5'"),
        ({"temperature": 1, "top_p": "5"}, "top_p is '5'"),
        ({"temperature": 1, "min_p": None}, "min_p is None"),
        ({"repetition_penalty": 1e308}, "repetition_penalty is 1e+308"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty is 5e-324"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_settings_out_of_their_range_are_refused_by_name(asked, named):
    error = refused(Sampling, **asked)
    assert error.what.startswith(named)
    assert type(error) is UsageError


def test_settings_that_name_tokens_beyond_the_vocabulary_are_refused(generator):
    error = refused(generator.generate, "ab", Sampling(logit_bias={49: 1.0, 50: 1.0}))
    assert error.what == "logit_bias names token 50, the model has a vocabulary of 50"
    assert refused(generator.generate, "ab", stop=Stop(ids=[77])).what.startswith("a stop id names token 77")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"speculate": 0}, "speculate is 0"),
        ({"speculate": -3}, "speculate is -3"),
        ({"speculate": 65}, "speculate is 65"),
        ({"speculate": 1.5}, "speculate is 1.5"),
        ({"speculate": True}, "speculate is True"),
        ({"speculate": "on"}, "speculate is 'on'"),
        ({"rule": "typical"}, "unknown rule 'typical'"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"batch": "8"}, "batch is '8'"),
    ],
)
def test_options_out_of_their_range_are_refused(asked, said):
    assert refused(GenerateOptions, **asked).what.startswith(said)


@pytest.mark.parametrize(
    "sampling",
    [
        *(Sampling(temperature, logit_bias={5: bias}) for temperature in (1e-30, 1e30) for bias in (1e30, -1e30)),
        *(Sampling(logit_bias=dict.fromkeys(range(50), bias)) for bias in (1e30, -1e30)),
        *(Sampling(1e-30, repetition_penalty=penalty, logit_bias={5: 1e30}) for penalty in (1e-9, 1e9)),
        Sampling(np.float32(0.5), np.int64(10**9), top_p=5e-324, seed=np.int64(2**63 - 1)),
    ],
    ids=str,
)
def test_settings_at_the_ends_of_their_ranges_draw_tokens(generator, sampling):
    assert generator.complete([[1], [2]], sampling, Stop(np.int64(3), eos=False))[1].reason == "length"


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("positions", [1, 2, 3, 4, 5])
def test_a_model_with_hardly_any_positions_says_what_it_has_room_for(tmp_path, positions):
    folder = write_folder(tmp_path / "model", made_of(Tiny().weights, positions))
    with opened(folder, draft=folder) as found:
        for prompt in ([1] * count for count in range(1, positions)):
            assert len(found.complete([prompt], stop=Stop(9, eos=False))[0].tokens) == positions - len(prompt)


def test_a_folder_that_is_no_export_is_told_what_makes_one(tmp_path, samples):
    assert refused(opened, tmp_path / "none").what == "no such folder"
    assert "qexport export" in refused(opened, tmp_path).hint
    source = samples / "decoder/stories260k"
    assert refused(opened, source).hint == f"qexport export {source} -o DIR makes one of it"


def test_a_graph_that_is_no_portable_decoder_is_refused(copied):
    save_model(copied / "model.onnx")
    seal(copied)
    error = refused(opened, copied)
    assert type(error) is ModelInvalid
    assert error.where == str(copied)
    assert error.hint == "qexport export writes decoders in this layout"
    error = refused(opened, write_folder(copied.parent / "good"), draft=copied)
    assert (type(error), error.where) == (ModelInvalid, str(copied))


def test_a_decoder_that_reads_what_another_model_gives_is_refused(copied):
    (copied / "model.onnx").write_bytes(serialized(portable(Tiny(), extra=True)))
    seal(copied)
    error = refused(opened, copied)
    assert (type(error), error.what) == (ModelInvalid, "it reads bias, which another model gives")


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "generation_config.json"])
def test_a_file_that_was_edited_is_refused(copied, name):
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(bytes(data))
    error = refused(opened, copied)
    assert (type(error), error.where) == (IntegrityError, str(copied / name))


def test_a_folder_without_its_manifest_or_with_another_is_refused(copied):
    (copied / "manifest.json").write_text("{}")
    assert refused(opened, copied).exit_code in (4, 11)
    (copied / "manifest.json").unlink()
    assert refused(opened, copied).exit_code in (2, 4)


def test_a_folder_without_a_tokenizer_is_refused(copied):
    (copied / "tokenizer.json").unlink()
    seal(copied)
    error = refused(opened, copied)
    assert (type(error), error.what) == (DataInvalid, "no tokenizer")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copied):
    more = tokenizer()
    more.add_tokens(["another"])
    (copied / "tokenizer.json").write_text(more.to_str())
    seal(copied)
    assert refused(opened, copied).what == "the tokenizer knows 51 tokens, the model's logits are 50"


def test_settings_that_are_not_json_are_refused(copied):
    (copied / "generation_config.json").write_text("{")
    seal(copied)
    assert str(refused(opened, copied)) == f"{copied / 'generation_config.json'}: not JSON"


def test_a_draft_with_another_tokenizer_is_refused_with_the_first_token_that_differs(tmp_path, folder):
    names = tokenizer().get_vocab()
    swapped = {**names, "c": names["d"], "d": names["c"]}
    told = json.loads(tokenizer().to_str())
    told["model"]["vocab"] = swapped
    other = write_folder(tmp_path / "draft", made=type(tokenizer()).from_str(json.dumps(told)))
    error = refused(opened, folder, draft=other)
    assert (type(error), error.where) == (DataInvalid, str(other))
    assert error.what == "its tokenizer is not that of the target: token 3 is 'd', there 'c'"


def test_a_draft_may_have_other_padding(tmp_path, folder):
    wide = tokenizer()
    fewer = json.loads(wide.to_str())
    last = max(fewer["model"]["vocab"], key=fewer["model"]["vocab"].get)
    del fewer["model"]["vocab"][last]
    same = type(wide).from_str(json.dumps(fewer))
    target, draft = (write_folder(tmp_path / name, made=same) for name in ("target", "draft"))
    with opened(target, draft=draft) as generator:
        assert isinstance(generator, Generator)
    error = refused(opened, folder, draft=draft)
    assert error.what.endswith(f"token 49 is nothing, there {last!r}")


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"eos_token_id": 7}, {7}),
        ({"eos_token_id": [7, 9]}, {7, 9}),
        ({"eos_token_id": None}, {0}),
        ({}, {0}),
        ({"eos_token_id": "7"}, {0}),
    ],
)
def test_tokens_that_end_an_output_are_those_of_the_settings(copied, settings, ends):
    edit(copied, "generation_config.json", **settings)
    (copied / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    seal(copied)
    with opened(copied) as generator:
        assert generator.target.folder.ends == ends


@pytest.mark.parametrize("token", [50, 10**30])
def test_an_end_that_the_model_cannot_say_is_refused(copied, token):
    edit(copied, "generation_config.json", eos_token_id=[7, token])
    error = refused(opened, copied)
    assert (type(error), error.where) == (DataInvalid, str(copied))
    assert error.what == f"token {token} is to end its texts, the model has a vocabulary of 50"


def test_names_of_tokens_that_are_not_unicode_name_none(copied):
    edit(copied, "generation_config.json")
    edit(copied, "tokenizer_config.json", eos_token="\ud800")
    with opened(copied) as generator:
        assert generator.target.folder.ends == frozenset()


def test_types_of_caches_are_no_matter(tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "model.onnx").write_bytes(serialized(portable(Tiny(), ir.DataType.FLOAT16)))
    seal(folder)
    with opened(folder) as generator:
        assert generator.complete([[1, 2]], stop=Stop(3, eos=False))[0].reason == "length"


def test_threads_are_those_that_were_asked_for(folder):
    with opened(folder) as generator:
        assert generator.options.session == SessionOptions(threads=1)
