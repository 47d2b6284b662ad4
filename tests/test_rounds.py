"""The loop on a tiny decoder: the same tokens as a forward in plain numpy, however far a draft looks ahead."""

from __future__ import annotations

import cached_models
import numpy as np
import pytest
from cached_models import VOCABULARY, Tiny, forward, portable, serialized

from qexport.errors import DataInvalid, UsageError
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.session import SessionOptions
from qexport.runtime.speculation import prefill
from qexport.runtime.speculation.chains import Chains
from qexport.runtime.speculation.draft import Draft
from qexport.runtime.speculation.proposal import NOTHING, Effort, Proposal, Row
from qexport.runtime.speculation.rounds import Fixed, Rounds
from qexport.runtime.speculation.unrolled import Unrolled

ONE = SessionOptions(threads=1)
POSITIONS = 90
TARGET, OTHER = Tiny(positions=POSITIONS), Tiny(seed=1, positions=POSITIONS)
CLOSE = Tiny(positions=POSITIONS)  # says the same most of the time
for _name, _array in CLOSE.weights.items():
    CLOSE.weights[_name] = (0.93 * _array + 0.07 * OTHER.weights[_name]).astype(np.float32)
MODELS = {name: serialized(portable(tiny)) for name, tiny in (("target", TARGET), ("close", CLOSE), ("other", OTHER))}
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8]]


def decoder(name="target"):
    return Decoder(MODELS[name], ONE, capacity=16)


DRAWN = [Sampling(0.9, seed=3), Sampling(1.3, top_k=12, top_p=0.9, repetition_penalty=1.2)]


def run(prompts, sampling, *, draft=None, most=4, tokens=30, streams=None, coupled=False):
    """Tokens of each row, and the rounds."""
    sampler = Sampler(sampling, coupled)
    proposer = Draft(decoder(draft), sampler, VOCABULARY) if isinstance(draft, str) else draft
    rounds = Rounds(decoder(), sampler, proposer, Fixed(most))
    rows = [Row(list(ids), len(ids), stream) for ids, stream in zip(prompts, streams or range(99), strict=False)]
    found = [rounds.begin(rows)]
    going = list(range(len(rows)))
    while going:
        room = [tokens - (len(rows[index].ids) - rows[index].prompt) for index in going]
        stays = [place for place, left in enumerate(room) if left > 0]
        if len(stays) < len(going):
            going = [going[place] for place in stays]
            if going:
                rounds.keep(stays)
            continue
        found.append(rounds.step(room))
    return [row.ids[row.prompt :] for row in rows], found


def greedy(prompt, tokens=30):
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(forward(TARGET, ids)[-1].argmax()))
    return ids[len(prompt) :]


TRUTH = [greedy(prompt) for prompt in PROMPTS]


def test_plain_decoding_says_what_numpy_says():
    assert run(PROMPTS, Sampling())[0] == TRUTH


@pytest.mark.parametrize("draft", ["target", "close", "other"])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_greedy_tokens_are_those_of_plain_decoding_however_good_the_draft_is(draft, most):
    found, rounds = run(PROMPTS, Sampling(), draft=draft, most=most)
    assert found == TRUTH
    accepted = sum(sum(one.record.accepted) for one in rounds[1:])
    proposed = sum(sum(one.record.proposed) for one in rounds[1:])
    assert accepted == proposed if draft == "target" else accepted < proposed
    if draft == "target":
        assert len(rounds) == 1 + -(-29 // (most + 1))


@pytest.mark.parametrize("widest", [1, 3, 4])
def test_prompts_that_are_read_in_pieces_say_the_same(monkeypatch, widest):
    monkeypatch.setattr(prefill, "WIDEST", widest)
    found, rounds = run(PROMPTS, Sampling(), draft="close")
    assert found == TRUTH
    assert rounds[0].record.calls == -(-8 // widest)


@pytest.mark.parametrize("sampling", DRAWN)
def test_drawn_tokens_depend_neither_on_how_far_the_draft_looks_nor_on_the_batch(sampling):
    first, rounds = run(PROMPTS, sampling, draft="close", most=1)
    assert 0 < sum(sum(one.record.accepted) for one in rounds[1:]) < sum(sum(one.record.proposed) for one in rounds[1:])
    for most in (2, 3, 6):
        assert run(PROMPTS, sampling, draft="close", most=most)[0] == first
    alone = [run([prompt], sampling, draft="close", most=4, streams=[row])[0][0] for row, prompt in enumerate(PROMPTS)]
    assert alone == first


@pytest.mark.parametrize("sampling", DRAWN)
def test_a_draft_that_draws_with_the_numbers_of_the_target_leaves_every_token_as_it_is(sampling):
    truth, _ = run(PROMPTS, sampling)
    for most in (1, 4):
        found, rounds = run(PROMPTS, sampling, draft="close", most=most, coupled=True)
        assert found == truth
        assert sum(sum(one.record.accepted) for one in rounds[1:]) > 5


class Parrot:
    """Proposes fixed numbers of certain tokens: right ones up to a point, wrong ones behind it."""

    name, effort = "parrot", Effort()

    def __init__(self, truth, right):
        self.truth, self.right = truth, right

    def begin(self, rows):
        self.rows = list(range(len(rows)))

    def keep(self, rows):
        self.rows = [self.rows[index] for index in rows]

    def propose(self, rows, most):
        found = []
        for number, row, more in zip(self.rows, rows, most, strict=True):
            start = len(row.ids) - row.prompt
            ids = self.truth[number][start : start + more]
            ids = [token if place < self.right else (token + 1) % VOCABULARY for place, token in enumerate(ids)]
            found.append(Proposal(tuple(ids), proposer=self.name) if ids else NOTHING)
        return found


@pytest.mark.parametrize("right", [0, 1, 4])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.1, top_p=0.95, seed=11)])
def test_copied_tokens_leave_what_is_drawn_as_it_is(sampling, right):
    truth, _ = run(PROMPTS, sampling)
    found, rounds = run(PROMPTS, sampling, draft=Parrot(truth, right))
    assert found == truth
    for one in rounds[1:]:
        for proposed, accepted in zip(one.record.proposed, one.record.accepted, strict=True):
            assert accepted == min(proposed, right)


def test_a_row_ends_exactly_where_the_model_has_no_more_positions():
    prompt = list(range(40)) + list(range(40))
    for draft in (None, "target"):
        found, _ = run([prompt], Sampling(), draft=draft, tokens=POSITIONS - 80)
        assert found == [greedy(prompt, 10)]
    with pytest.raises(DataInvalid, match="the model has 90 positions"):
        run([list(range(45)) * 3], Sampling())


def test_a_draft_with_fewer_positions_stops_proposing_where_it_ends():
    short = serialized(portable(Tiny(positions=20)))
    sampler = Sampler(Sampling())
    for sampling in (Sampling(), Sampling(1.0, seed=2)):
        sampler = Sampler(sampling)
        truth = run(PROMPTS[:1], sampling)[0]
        found, rounds = run(PROMPTS[:1], sampling, draft=Draft(Decoder(short, ONE), sampler, VOCABULARY))
        assert sampling.temperature or found == truth
        assert len(found[0]) == 30
        assert rounds[-1].record.proposed == (0,)
        assert sum(sum(one.record.accepted) for one in rounds[1:]) > 8


def test_a_row_whose_logits_are_none_fails_alone(monkeypatch):
    truth, _ = run(PROMPTS[:2], Sampling())
    real = Decoder.extend

    def poisoned(self, ids, counts=None):
        logits = real(self, ids, counts)
        if self.lengths[0] > 12:
            logits[0] = np.nan
        return logits

    sampler = Sampler(Sampling())
    rounds = Rounds(decoder(), sampler, None, Fixed(1))
    rows = [Row(list(ids), len(ids), 0) for ids in PROMPTS[:2]]
    rounds.begin(rows)
    monkeypatch.setattr(Decoder, "extend", poisoned)
    while not (found := rounds.step([9, 9])).outcomes[0].failure:
        assert found.outcomes[0].tokens
    assert "is nan" in str(found.outcomes[0].failure)
    assert found.outcomes[0].tokens == ()
    rounds.keep([1])
    monkeypatch.setattr(Decoder, "extend", real)
    while len(rows[1].ids) - rows[1].prompt < 30:
        rounds.step([1])
    assert rows[1].ids[rows[1].prompt :] == truth[1]


def test_a_draft_without_numbers_is_not_asked_for_more_and_changes_nothing(monkeypatch):
    sampler = Sampler(Sampling())
    draft = Draft(decoder("close"), sampler, VOCABULARY)
    monkeypatch.setattr(draft, "_fit", lambda scores: scores * np.nan)
    found, rounds = run(PROMPTS, Sampling(), draft=draft)
    assert found == TRUTH
    assert all(not any(one.record.proposed) for one in rounds[1:])
    assert sum(one.record.draft_calls for one in rounds[1:]) == 1


@pytest.mark.parametrize("size", [VOCABULARY - 7, VOCABULARY + 5])
def test_a_draft_may_have_another_padding_of_its_vocabulary(size):
    for sampling in (Sampling(), Sampling(1.0, seed=5)):
        sampler = Sampler(sampling)
        draft = Draft(decoder("close"), sampler, VOCABULARY)
        fit, pad = draft._fit, np.full(5, 9.0, np.float32)
        draft._fit = lambda scores, fit=fit, pad=pad: fit(
            scores[:size] if size < VOCABULARY else np.append(scores, pad)
        )
        found, rounds = run(PROMPTS, sampling, draft=draft)
        assert sampling.temperature or found == TRUTH
        assert sum(sum(one.record.accepted) for one in rounds[1:]) > 0
        assert all(token < size for one in rounds[1:] for row in one.outcomes for token in row.proposal.ids)


def without_numbers_behind(tiny, *tokens):
    """A model's bytes: behind these tokens it has none, nor in any column that is beside one of theirs."""
    weights = {**tiny.weights, "table": tiny.weights["table"].copy()}
    weights["table"][list(tokens)] = np.nan
    made = Tiny(positions=POSITIONS)
    made.weights = weights
    return serialized(portable(made))


def said(target, draft, seed, *, most, alone=False, kind=Draft):
    """Tokens of eight rows up to where they fail; ``alone`` where each round has room for one, so none is proposed."""
    sampler = Sampler(Sampling(1.2, seed=seed))
    proposer = kind(Decoder(draft, ONE) if kind is Draft else Chains(draft, ONE), sampler, VOCABULARY)
    rounds = Rounds(Decoder(target, ONE), sampler, proposer, Fixed(most))
    rows = [Row([3, 1, 4 + stream % 2], 3, stream) for stream in range(8)]
    found, going = rounds.begin(rows), list(range(8))
    while True:
        stays = [
            place
            for place, row in enumerate(rounds.rows)
            if found.outcomes[place].failure is None and len(row.ids) < 3 + 12
        ]
        if not stays:
            return [row.ids for row in rows]
        if len(stays) < len(going):
            rounds.keep(stays)
        going = stays
        found = rounds.step([1 if alone else 3 + 12 - len(row.ids) for row in rounds.rows])


BAD = (2, 7, 11, 19, 23, 31, 40, 44)


@pytest.mark.parametrize("kind", [Draft, Unrolled])
def test_what_was_drawn_is_not_drawn_again_because_the_target_has_no_numbers_behind_it(kind):
    target = without_numbers_behind(TARGET, *BAD)
    cut = 0
    for seed in range(3):
        truth = said(target, MODELS["close"], seed, most=1, alone=True, kind=kind)
        cut += sum(row[-1] in BAD for row in truth)
        for most in (1, 3):
            assert said(target, MODELS["close"], seed, most=most, kind=kind) == truth
    assert cut > 8


@pytest.mark.parametrize("kind", [Draft, Unrolled])
def test_a_draft_is_not_left_out_for_what_it_drew_because_it_has_no_numbers_behind_it(kind):
    draft, lost = without_numbers_behind(CLOSE, *BAD), 0
    for seed in range(3):
        truth = said(MODELS["target"], draft, seed, most=1, alone=True, kind=kind)
        lost += sum(not set(BAD).isdisjoint(row) for row in truth)
        for most in (1, 3):
            assert said(MODELS["target"], draft, seed, most=most, kind=kind) == truth
    assert lost > 8


def test_a_draft_that_knows_fewer_tokens_leaves_only_rows_alone_that_have_others():
    fewer = Tiny(positions=POSITIONS)
    size = VOCABULARY - 7
    fewer.weights = {**CLOSE.weights, "table": CLOSE.weights["table"][:size], "head": CLOSE.weights["head"][:, :size]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached_models, "VOCABULARY", size)
        model = serialized(portable(fewer))
    sampler = Sampler(Sampling(0.9, seed=4))
    for kind, opened in ((Draft, Decoder), (Unrolled, Chains)):
        prompts = [[3, size, 4], *PROMPTS]
        found, rounds = run(prompts, sampler.settings, draft=kind(opened(model, ONE), sampler, VOCABULARY))
        alone, _ = run(PROMPTS[:1], sampler.settings, draft=kind(opened(model, ONE), sampler, VOCABULARY), streams=[1])
        assert found[1] == alone[0]
        assert all(one.record.proposed[0] == 0 for one in rounds[1:] if 0 in one.record.rows)
        assert sum(sum(one.record.accepted) for one in rounds[1:]) > 5


def test_records_add_up_to_what_came_out():
    tokens, rounds = run(PROMPTS, Sampling(), draft="close")
    got = [0, 0, 0]
    for index, count in enumerate(rounds[0].record.emitted):
        got[index] += count
    for one in rounds[1:]:
        record = one.record
        for row, accepted, emitted, proposed in zip(
            record.rows, record.accepted, record.emitted, record.proposed, strict=True
        ):
            assert emitted == accepted + 1 <= proposed + 1 <= record.width
            got[row] += emitted
        assert record.seconds == pytest.approx(record.propose + record.verify + record.accept)
        assert 0 < record.native <= record.verify
        assert not any(record.proposed) or 0 < record.native_draft <= record.propose
    assert got == [len(found) for found in tokens] == [30, 30, 30]


def test_looking_no_token_ahead_is_refused():
    with pytest.raises(UsageError, match="0 tokens ahead, expected at least 1"):
        Fixed(0)
