"""Trained decoders and their drafts: the same outputs, however they are made."""

from __future__ import annotations

import pytest
from generating import opened

from qexport.runtime.generation.prompts import Prompt
from qexport.runtime.generation.stops import Stop
from qexport.runtime.sampling.settings import Sampling

PAIRS = [("target", "draft"), ("stories3m", "stories260k")]
WARM = Sampling(temperature=0.8, top_p=0.95, seed=3)
STOP = Stop(32)


@pytest.fixture(scope="module", params=PAIRS, ids=" ".join)
def pair(request, decoders):
    return [decoders(name) for name in request.param]


@pytest.fixture(scope="module")
def plain(pair):
    with opened(pair[0], speculate="off") as generator:
        yield generator


@pytest.fixture(scope="module")
def prompts(samples, plain):
    text = (samples / "decoder/heldout.txt").read_text()
    starts = [line for line in text.splitlines() if len(line) > 200][:3]
    return ["Once upon a time", *(line[: 40 * (1 + place)] for place, line in enumerate(starts))]


@pytest.fixture(scope="module")
def greedy(plain, prompts):
    return plain.complete(prompts, stop=STOP)


def same(found, expected):
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.reason for one in found] == [one.reason for one in expected]


@pytest.mark.parametrize(
    "asked",
    [
        {"speculate": 1, "lookup": False},
        {"speculate": 4, "lookup": False, "batch": 1},
        {"speculate": 8, "batch": 3},
        {"speculate": "auto", "batch": 2},
    ],
    ids=str,
)
def test_greedy_outputs_are_those_of_plain_decoding(pair, prompts, greedy, asked):
    with opened(*pair, **asked) as generator:
        found = generator.complete(prompts, stop=STOP)
    same(found, greedy)
    proposed, accepted = (sum(getattr(one.tally, name) for one in found) for name in ("proposed", "accepted"))
    assert proposed > accepted > 0


def test_copies_alone_change_nothing_either(pair, plain, prompts, greedy):
    with opened(pair[0], speculate=6) as generator:
        same(generator.complete(prompts, stop=STOP), greedy)
        given = [Prompt(prompt, [one.text]) for prompt, one in zip(prompts, greedy, strict=True)]
        found = generator.complete(given, stop=STOP)
    same(found, greedy)
    assert sum(one.tally.calls for one in found) < sum(len(one.tokens) for one in found) / 2
    for one, prompt in zip(found, given, strict=True):
        ids = plain.tokenizer.encode(prompt.references[0], special=False)
        named = [piece for piece in one.copied if piece.span.source == "0"]
        assert sum(piece.count for piece in named) > len(one.tokens) / 4
        for piece in named:
            taken = one.tokens[piece.index : piece.index + piece.count]
            assert list(taken) == ids[piece.span.start : piece.span.start + piece.count]


def test_drawn_outputs_by_the_rule_of_equality_are_those_of_plain_decoding(pair, plain, prompts):
    expected = plain.complete(prompts, WARM, STOP)
    with opened(*pair, speculate=3, rule="equality") as generator:
        same(generator.complete(prompts, WARM, STOP), expected)


def test_stop_strings_end_them_at_the_same_token(pair, plain, prompts, greedy):
    strings = [text for one in greedy for text in (one.text[20:25], one.text[9:11]) if "\ufffd" not in text]
    stop = Stop(32, strings[:6])
    expected = plain.complete(prompts, stop=stop)
    assert {one.reason for one in expected} >= {"stop"}
    with opened(*pair, speculate=5) as generator:
        same(generator.complete(prompts, stop=stop), expected)


def test_pieces_of_a_stream_are_the_text(pair, plain, prompts, greedy):
    with opened(*pair, speculate=4) as generator:
        for prompt, expected in zip(prompts, greedy, strict=True):
            stream = generator.generate(prompt, stop=STOP)
            pieces = [token.text for token in stream]
            assert "".join(pieces) == expected.text
            ids = plain.tokenizer.encode(prompt)
            whole = plain.tokenizer.decode([*ids, *expected.tokens])
            assert whole == plain.tokenizer.decode(ids) + expected.text
