"""The tokenizer of an artefact: tokens, cuts, and what cannot be read."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, processors

from qexport.errors import DataInvalid
from qexport.runtime.tokenizing import Tokenizer

WORDS = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3, "b": 4, "c": 5, "d": 6, "##d": 7}


def inner(words=WORDS, side=None, most=None, unknown="[UNK]"):
    """A tokenizer of single words that puts [CLS] and [SEP] around them."""
    made = Inner(models.WordPiece(words, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    made.add_special_tokens(["[CLS]", "[SEP]"])
    if most is not None:
        made.enable_truncation(most, direction=side or "right")
        made.enable_padding(length=most, pad_id=5)
    return made


def wrapped(**asked):
    return Tokenizer(inner(**asked).to_str().encode())


def test_text_becomes_tokens_and_text_again():
    tokenizer = wrapped()
    assert tokenizer.encode("a b") == [0, 3, 4, 1]
    assert tokenizer.encode("a b", special=False) == [3, 4]
    assert tokenizer.decode([0, 3, 4, 1]) == "a b"
    assert tokenizer.decode([0, 3], special=True) == "[CLS] a"
    assert (tokenizer.size, tokenizer.token("[SEP]"), tokenizer.token("x")) == (8, 1, None)


def test_it_never_pads_and_cuts_only_on_request():
    tokenizer = wrapped(most=5)
    assert (tokenizer.most, tokenizer.pad, wrapped().pad) == (5, 5, 0)
    assert tokenizer.encode("a b c d a b") == [0, 3, 4, 5, 6, 3, 4, 1]
    assert [one.ids for one in tokenizer.encode_batch(["a", "a b c d a b"])] == [[0, 3, 1], [0, 3, 4, 5, 6, 3, 4, 1]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=9).map(" ".join), max_size=5),
    st.integers(3, 12),
    st.sampled_from(["left", "right"]),
)
def test_cuts_are_those_of_the_library(texts, most, side):
    expected = inner(side=side, most=most)
    expected.no_padding()
    found = wrapped(side=side, most=9).encode_batch(texts, most)
    assert [one.ids for one in found] == [expected.encode(text).ids for text in texts]
    assert [one.types for one in found] == [[0] * len(one.ids) for one in found]
    assert [one.cut for one in found] == [bool(expected.encode(text).overflowing) for text in texts]


def test_the_digest_tells_what_tokens_mean_and_nothing_else():
    swapped = {**WORDS, "a": 4, "b": 3}
    assert wrapped().digest == wrapped(most=5, side="left").digest
    assert wrapped().digest != wrapped(words=swapped).digest
    assert wrapped().digest != wrapped(words={**WORDS, "e": 8}).digest


def test_threads_with_different_limits_do_not_disturb_each_other():
    tokenizer, texts = wrapped(), ["a b c d " * 40] * 20
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda most: tokenizer.encode_batch(texts, most), [4, 9, 30, 80] * 10))
    for most, batch in zip([4, 9, 30, 80] * 10, found, strict=True):
        assert {len(one.ids) for one in batch} == {most}


def test_a_folder_is_loaded_and_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataInvalid, match="no tokenizer") as raised:
        Tokenizer.load(tmp_path)
    assert raised.value.where == str(tmp_path / "tokenizer.json")
    write(tmp_path / "tokenizer.json", inner().to_str())
    assert Tokenizer.load(tmp_path).encode("c") == [0, 5, 1]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", json.dumps({"model": {"type": "None"}}).encode()])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    write(tmp_path / "tokenizer.json", content)
    with pytest.raises(DataInvalid, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)


def test_text_that_is_none_is_refused_with_its_place():
    tokenizer = wrapped()
    with pytest.raises(DataInvalid, match=r"text 1 is not Unicode: '\\ud800' at character 2"):
        tokenizer.encode_batch(["a", "b \ud800"])
    with pytest.raises(DataInvalid, match="text 8 is not Unicode"):
        tokenizer.encode_batch(["a", "b \ud800"], first=7)
    with pytest.raises(DataInvalid, match="text 0 is bytes, expected str"):
        tokenizer.encode(b"a")


def test_a_tokenizer_that_panics_is_told_as_any_that_fails(capfd):
    told = json.loads(inner().to_str())
    told["post_processor"]["special_tokens"] = {}  # which its template names
    tokenizer = Tokenizer(json.dumps(told).encode())
    with pytest.raises(DataInvalid, match="the tokenizer cannot read the text"):
        tokenizer.encode("a")
    assert tokenizer.encode("a", special=False) == wrapped().encode("a", special=False)
    capfd.readouterr()  # the library's own words


def test_an_interrupt_is_no_failure_of_the_tokenizer():
    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    tokenizer = wrapped()
    tokenizer.inner = Interrupted()
    for call in (tokenizer.encode, tokenizer.decode):
        with pytest.raises(KeyboardInterrupt):
            call("a")


def test_no_token_is_called_what_is_not_unicode():
    assert wrapped().token("\ud800") is None


def test_text_without_a_token_is_refused():
    with pytest.raises(DataInvalid, match="the tokenizer cannot read the text"):
        wrapped(unknown="[NONE]").encode("x")


def test_a_limit_below_what_is_put_around_a_text_is_refused():
    with pytest.raises(DataInvalid, match="2 tokens leave no room for text"):
        wrapped().encode_batch(["a"], 2)
