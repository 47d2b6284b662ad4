"""Text in, text out, on tiny decoders: what comes, from whom, and what is left behind."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from cached_models import VOCABULARY, Tiny
from generating import broken, greedy, kept, made_of, near, opened, pools, tokenizer, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import BuildFailed, UsageError
from qexport.runtime.accounting.stats import account
from qexport.runtime.cache import Cache
from qexport.runtime.decoder import Decoder
from qexport.runtime.generation import models as generation_models
from qexport.runtime.generation.stops import Stop
from qexport.runtime.sampling.sampler import NotFiniteError
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation.chains import Chains
from qexport.runtime.speculation.draft import Draft
from qexport.runtime.speculation.proposal import NOTHING
from qexport.runtime.speculation.unrolled import Unrolled

TARGET = Tiny()
WARM = Sampling(temperature=1.0, seed=5)
PROMPTS = [[5, 9, 17], [3], [8, 8, 41, 2, 30, 11, 7], [49, 1], [20, 21, 22, 23]]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "target", TARGET)


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """Right for most tokens, not for all."""
    return write_folder(tmp_path_factory.mktemp("models") / "draft", near(TARGET, 0.05))


@pytest.fixture(scope="module")
def plain(target):
    with opened(target, speculate="off") as generator:
        yield generator


@pytest.fixture(scope="module")
def drafted(target, draft):
    with opened(target, draft, speculate=4, lookup=False) as generator:
        yield generator


def told(generator, prompts, sampling=None, stop=None):
    return [(one.tokens, one.text, one.reason) for one in generator.complete(prompts, sampling, stop)]


# ---------------------------------------------------------------- what comes


def test_plain_decoding_is_what_the_model_says(plain):
    for prompt in PROMPTS[:2]:
        found = plain.complete([prompt], stop=Stop(20, eos=False))[0]
        assert list(found.tokens) == greedy(TARGET, prompt, 20)
        assert (found.reason, found.tally.calls, found.tally.proposed) == ("length", 19, 0)


def test_a_text_is_continued_and_its_pieces_are_the_text(plain):
    stream = plain.generate("the band", WARM, Stop(40, eos=False))
    assert stream.completion is None
    tokens = list(stream)
    assert [token.index for token in tokens] == list(range(40))
    found = stream.completion
    assert found.text == "".join(token.text for token in tokens)
    assert found.tokens == tuple(token.id for token in tokens)
    assert not any(token.accepted or token.proposer or token.span for token in tokens)
    read = tokenizer()
    prompt = read.encode("the band").ids
    assert read.decode([*prompt, *found.tokens]) == read.decode(prompt) + found.text


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_outputs_are_the_same_however_far_a_draft_looks(plain, target, draft, data):
    ahead = data.draw(st.integers(1, 8))
    sampling = data.draw(st.sampled_from([Sampling(), Sampling(temperature=0.7, top_k=12, repetition_penalty=1.2)]))
    count = data.draw(st.integers(1, 24))
    prompts = data.draw(
        st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=4)
    )
    free = plain.complete(prompts, sampling, Stop(count, eos=False))
    text = free[0].text
    at = data.draw(st.integers(0, max(len(text) - 1, 0)))
    strings = [one for one in (text[at : at + 3], "zz") if one and "\ufffd" not in one]
    stop = Stop(count, strings, ids=[free[-1].tokens[-1]])
    with opened(target, draft, speculate=ahead, rule="equality", batch=data.draw(st.integers(1, 4))) as generator:
        assert told(generator, prompts, sampling, stop) == told(plain, prompts, sampling, stop)


def test_drawn_outputs_do_not_depend_on_how_far_a_draft_looks_or_how_many_rows_are_together(target, draft):
    found = []
    for ahead, batch in ((1, 1), (2, 5), (3, 2), (8, 3)):
        with opened(target, draft, speculate=ahead, lookup=False, batch=batch) as generator:
            found.append(told(generator, PROMPTS, WARM, Stop(30)))
    assert found[1:] == found[:1] * 3


def test_an_output_does_not_depend_on_its_neighbours(drafted):
    first = told(drafted, PROMPTS, WARM, Stop(25))
    others = [PROMPTS[0], [11, 12], PROMPTS[2], [1], [2], [3]]
    second = told(drafted, others, WARM, Stop(25))
    assert (second[0], second[2]) == (first[0], first[2])
    assert second[1] != first[1]


def test_rows_with_the_same_prompt_draw_different_tokens_and_a_seed_draws_them_again(plain):
    found = told(plain, [PROMPTS[0]] * 3, WARM, Stop(12))
    assert len({tokens for tokens, _, _ in found}) == 3
    assert told(plain, [PROMPTS[0]] * 3, WARM, Stop(12)) == found
    assert told(plain, [PROMPTS[0]] * 3, Sampling(temperature=1.0, seed=6), Stop(12)) != found


def test_rows_come_as_they_are_decided_and_end_at_different_places(drafted):
    ends = [one.tokens for one in drafted.complete(PROMPTS, WARM, Stop(30, eos=False))]
    stop = Stop(30, ids=sorted({tokens[3 + 5 * row] for row, tokens in enumerate(ends)}), eos=False)
    batch = drafted.batch(PROMPTS, WARM, stop)
    news = list(batch)
    for row, found in enumerate(batch.completions):
        assert tuple(token.id for number, token in news if number == row) == found.tokens
        assert found.tokens[-1] in stop.ids or len(found.tokens) == 30
        assert found.tokens == ends[row][: len(found.tokens)]
    assert len({len(found.tokens) for found in batch.completions}) > 2
    assert [number for number, _ in news[:5]] == [0, 1, 2, 3, 4]


def test_most_tokens_of_a_near_draft_are_taken_and_said_to_be(drafted):
    stream = drafted.generate(PROMPTS[2], stop=Stop(40, eos=False))
    tokens = list(stream)
    tally = stream.completion.tally
    assert {token.proposer for token in tokens} == {"", "draft"}
    assert sum(token.accepted for token in tokens) >= tally.accepted - 4 > 12
    assert tally.calls < 20


def test_a_string_named_like_a_special_token_stops_at_it(plain):
    free = plain.complete([[5, 6]], Sampling(logit_bias={0: 4.0}, temperature=1.0), Stop(200, eos=False))[0]
    assert 0 in free.tokens
    for stop in (Stop(200, ["<end>"], eos=False), Stop(200)):
        found = plain.complete([[5, 6]], Sampling(logit_bias={0: 4.0}, temperature=1.0), stop)[0]
        assert found.tokens == free.tokens[: free.tokens.index(0) + 1]
        assert (found.reason, "<end>" in found.text) == ("stop", False)


def test_outputs_end_where_the_model_has_no_more_positions(tmp_path):
    folders = [write_folder(tmp_path / name, made_of(TARGET.weights, 24)) for name in ("target", "draft")]
    for asked in ({"speculate": "off"}, {"draft": folders[1], "speculate": 5}):
        with opened(folders[0], **asked) as generator:
            found = generator.complete([[1] * 4, [2] * 23], stop=Stop(99, eos=False))
            assert [(len(one.tokens), one.reason) for one in found] == [(20, "length"), (1, "length")]


def test_a_draft_with_fewer_positions_stops_looking_ahead(tmp_path, target, plain):
    short = write_folder(tmp_path / "draft", made_of(near(TARGET, 0.05).weights, 16))
    with opened(target, short, speculate=4, lookup=False) as generator:
        assert told(generator, PROMPTS, stop=Stop(30)) == told(plain, PROMPTS, stop=Stop(30))


def test_what_a_run_took_is_told(drafted):
    batch = drafted.batch(PROMPTS, stop=Stop(9, eos=False))
    list(batch)
    (run,) = batch.runs
    emitted = sum(run.prefill.emitted) + sum(sum(record.emitted) for record in run.rounds)
    assert emitted == 9 * len(PROMPTS)
    ends = {found.tokens[5] for found in batch.completions}  # which many a round has gone beyond
    cut = drafted.batch(PROMPTS, stop=Stop(9, ids=tuple(ends), eos=False))
    assert len(list(cut)) == account(cut.runs).tokens < emitted
    assert [found.tally.calls for found in batch.completions] == [
        sum(row in record.rows for record in run.rounds) for row in range(len(PROMPTS))
    ]


# ---------------------------------------------------------------- what goes wrong


def test_a_row_without_numbers_fails_alone(tmp_path, plain):
    with opened(write_folder(tmp_path / "target", broken(43)), speculate="off", batch=3) as generator:
        found = generator.complete([PROMPTS[0], [43], PROMPTS[1], PROMPTS[4]], stop=Stop(8, eos=False))
        assert [one.reason for one in found] == ["length", "failed", "length", "length"]
        assert isinstance(found[1].error, NotFiniteError)
        assert found[1].tokens == ()
        alive = plain.complete([PROMPTS[0], PROMPTS[1], PROMPTS[4]], stop=Stop(8, eos=False))
        assert [found[row].tokens for row in (0, 2, 3)] == [one.tokens for one in alive]
        stream = generator.generate([43])
        with pytest.raises(NotFiniteError, match="position 1 is nan"):
            list(stream)
        assert stream.completion.reason == "failed"
        assert generator.complete([PROMPTS[0]], stop=Stop(8, eos=False))[0].tokens == found[0].tokens


def test_a_row_that_fails_later_keeps_what_it_said(tmp_path, plain):
    said = plain.complete([PROMPTS[0]], stop=Stop(20, eos=False))[0].tokens
    bad = said[4]
    keeps = said[: said.index(bad) + 1]
    with opened(write_folder(tmp_path / "target", broken(bad)), speculate="off") as generator:
        found = generator.complete([PROMPTS[0]], stop=Stop(20, eos=False))[0]
    assert (found.tokens, found.reason) == (keeps, "failed")


def test_what_is_proposed_makes_no_output_fail(tmp_path, plain):
    """Masked columns are no part of the sum, but for NaN, which nothing times zero is."""
    weights = {**TARGET.weights, "head": np.zeros_like(TARGET.weights["head"])}
    weights["head"][:, 43] = TARGET.weights["norm"]  # mostly the token after which the target has no numbers
    folders = [write_folder(tmp_path / "target", broken(43)), write_folder(tmp_path / "draft", made_of(weights))]
    with opened(*folders, speculate=3, lookup=False, batch=2) as generator:
        batch = generator.batch(PROMPTS, stop=Stop(8, eos=False))
        news = list(batch)
    expected = plain.complete(PROMPTS, stop=Stop(8, eos=False))
    assert [(one.tokens, one.reason) for one in batch.completions] == [(one.tokens, one.reason) for one in expected]
    for row, one in enumerate(expected):
        assert tuple(token.id for number, token in news if number == row) == one.tokens
        assert account([batch.run_of(row)]).tokens == len(one.tokens)
    rounds = [record for run in batch.runs for record in run.rounds]
    assert any(record.width > 1 + max(record.proposed) for record in rounds)  # what was proposed did not count
    assert all(record.native <= record.verify for record in rounds)


@pytest.mark.parametrize("bad", [range(VOCABULARY), [7, 8, 9]])
def test_a_draft_without_numbers_is_left_alone(tmp_path, target, plain, bad):
    with opened(target, write_folder(tmp_path / "draft", broken(*bad)), speculate=4) as generator:
        assert told(generator, PROMPTS, stop=Stop(16)) == told(plain, PROMPTS, stop=Stop(16))
        assert [one.reason for one in generator.complete(PROMPTS, WARM, Stop(16, eos=False))] == ["length"] * 5


def test_a_draft_that_breaks_down_is_left_alone(monkeypatch, drafted, plain):
    calls, extend = [], Decoder.extend

    def failing(self, ids, counts=None):
        if self._session is drafted.draft._session:
            calls.append(1)
            if len(calls) > 4:
                raise BuildFailed("the device is gone")
        return extend(self, ids, counts)

    monkeypatch.setattr(Decoder, "extend", failing)
    assert told(drafted, PROMPTS, stop=Stop(16)) == told(plain, PROMPTS, stop=Stop(16))
    assert len(calls) == 5


# ---------------------------------------------------------------- a draft that has drafted for long


@pytest.fixture
def unrolled(monkeypatch, target, draft):
    """A generator whose draft is unrolled from the first request on."""
    monkeypatch.setattr(generation_models, "UNROLL_AFTER", 0)
    with opened(target, draft, speculate=4, lookup=False) as generator:
        yield generator


@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(temperature=1.0, top_k=9)], ids=str)
def test_a_draft_in_one_call_says_what_it_says_step_by_step(monkeypatch, drafted, unrolled, sampling):
    expected = drafted.complete(PROMPTS, sampling, Stop(24))
    monkeypatch.setattr(Draft, "propose", lambda *_: pytest.fail("step by step"))
    if sampling.top_k:
        with pytest.raises(pytest.fail.Exception, match="step by step"):
            unrolled.complete(PROMPTS, sampling, Stop(24))
        return
    found = unrolled.complete(PROMPTS, sampling, Stop(24))
    assert [(one.tokens, one.tally) for one in found] == [(one.tokens, one.tally) for one in expected]


def test_a_draft_is_unrolled_once_it_has_drafted_for_long(monkeypatch, target, draft):
    monkeypatch.setattr(generation_models, "UNROLL_AFTER", 12)
    asked = []
    for kind in (Draft, Unrolled):
        monkeypatch.setattr(kind, "propose", lambda self, rows, most: asked.append(type(self)) or [NOTHING] * len(rows))
    with opened(target, draft, speculate=4, lookup=False) as generator:
        for expected in (Draft, Draft, Unrolled):
            generator.complete(PROMPTS[:1], stop=Stop(10, eos=False))
            assert set(asked) == {expected}
            asked.clear()


def test_a_draft_that_cannot_be_unrolled_goes_on_step_by_step(monkeypatch, unrolled, plain):
    expected = told(plain, PROMPTS, stop=Stop(16))
    monkeypatch.setattr(Chains, "session", broken_down)
    assert told(unrolled, PROMPTS, stop=Stop(16)) == expected
    assert unrolled.complete(PROMPTS, stop=Stop(16))[0].tally.accepted > 0
    assert unrolled.draft.chains() is None


def broken_down(*_):
    raise BuildFailed("the device is gone")


# ---------------------------------------------------------------- what is left behind


@pytest.fixture
def caches(monkeypatch):
    """The caches that are alive."""
    found, init = weakref.WeakSet(), Cache.__init__

    def noted(self, *arguments, **options):
        init(self, *arguments, **options)
        found.add(self)

    monkeypatch.setattr(Cache, "__init__", noted)
    return found


@pytest.mark.parametrize("kind", ["drafted", "unrolled"])
def test_memory_is_free_when_a_request_ends_is_closed_or_is_dropped(request, kind, caches):
    drafted = request.getfixturevalue(kind)
    for pool in pools(drafted):
        pool.close()
    gc.collect()
    gc.disable()  # nothing here waits for the collector
    try:
        stream = drafted.generate(PROMPTS[0], stop=Stop(9, eos=False))
        assert len(caches) == 0
        next(stream)
        assert len(caches) == 2
        stream.close()
        stream.close()
        assert len(caches) == 0
        assert list(stream) == []
        assert stream.completion is None

        stream = drafted.generate(PROMPTS[0], stop=Stop(9, eos=False))
        next(stream)
        del stream
        assert len(caches) == 0

        stream = drafted.generate(PROMPTS[0], stop=Stop(9, eos=False))
        assert len(list(stream)) == 9
        assert set(caches) == kept(drafted)
        again = [id(cache) for cache in caches]
        for _ in range(3):
            assert len(list(drafted.generate(PROMPTS[0], stop=Stop(9, eos=False)))) == 9
            assert set(caches) == kept(drafted)
            assert sorted(map(id, caches)) == sorted(again)

        with drafted.batch(PROMPTS) as batch:
            next(batch)
        assert set(caches) == kept(drafted)
        for pool in pools(drafted):
            pool.close()
        assert len(caches) == 0
    finally:
        gc.enable()


def test_a_request_that_never_began_costs_nothing(drafted, caches):
    drafted.batch(PROMPTS).close()
    assert len(caches) == 0


def test_threads_share_a_generator(drafted):
    alone = [told(drafted, [prompt], WARM, Stop(20)) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: told(drafted, [prompt], WARM, Stop(20)), PROMPTS * 4))
    assert found == alone * 4


def test_requests_may_be_read_in_turn(drafted):
    streams = [drafted.generate(prompt, WARM, Stop(12, eos=False)) for prompt in PROMPTS]
    found = [[token.id for token in row] for row in zip(*zip(*streams, strict=True), strict=True)]
    assert found == [list(drafted.complete([prompt], WARM, Stop(12, eos=False))[0].tokens) for prompt in PROMPTS]


def test_a_closed_generator_answers_no_more(target):
    generator = opened(target)
    generator.close()
    generator.close()
    with pytest.raises(UsageError, match="the model is closed"):
        list(generator.generate([1]))


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_flat(drafted):
    process, sizes = psutil.Process(), []
    for number in range(10_000):
        stream = drafted.generate(PROMPTS[number % 5], stop=Stop(3, ["zz"], eos=False))
        next(stream)
        if number % 3:
            list(stream)
        if number % 500 == 499:
            sizes.append(process.memory_info().rss)
    late = sizes[4:]
    assert max(late) - min(late) < 4 << 20
