"""K, limits and prices from rounds, made up and real."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cached_models import VOCABULARY, Tiny, portable, serialized

from qexport.errors import UsageError
from qexport.runtime.accounting.records import RoundRecord
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.session import SessionOptions
from qexport.runtime.speculation.cascade import Cascade
from qexport.runtime.speculation.draft import Draft
from qexport.runtime.speculation.guard import Guard
from qexport.runtime.speculation.lookup import Lookup
from qexport.runtime.speculation.policy import Auto
from qexport.runtime.speculation.proposal import Reference, Row
from qexport.runtime.speculation.rounds import Rounds
from qexport.runtime.speculation.terms import Terms


def target(width):
    """t in milliseconds."""
    return 2.0 + 0.1 * (width - 1)


def draft(ahead):
    """u in milliseconds."""
    return 0.2 * ahead


class World:
    """Rounds that take as long as the curves say, on a machine whose pace changes."""

    def __init__(self, policy, *, chance=0.8, batch=1, who="draft", verify=target, slower=1.0, seed=0):
        self.policy, self.chance, self.who, self.verify, self.slower = policy, chance, who, verify, slower
        self.rng, self.clock, self.planned = random.Random(seed), 0.0, []
        self.rows = [Row([1, 2, 3], 2) for _ in range(batch)]

    def go(self, rounds):
        for _ in range(rounds):
            most = self.policy.plan(self.rows)
            self.planned.append(most)
            batch, terms = len(self.rows), self.policy.terms
            ahead = min(most, terms.limits.get(self.who, most)) if most else 0
            accepted = [self.accepted(ahead) for _ in range(batch)]
            for row, count in zip(self.rows, accepted, strict=True):
                row.ids += [0] * (count + 1)
            load = 0.001 * (3.0 if int(10 * self.clock) % 2 else 1.0) * (1 + 0.05 * self.rng.random())
            propose = load * self.slower * draft(ahead) if self.who == "draft" else 0.0
            verify, began = load * self.verify(batch * (ahead + 1)), self.clock
            self.clock += propose + verify + load * 0.1
            self.policy.observe(
                RoundRecord(
                    began=began,
                    clock=self.clock,
                    rows=tuple(range(batch)),
                    width=ahead + 1,
                    valid=0,
                    proposed=(ahead,) * batch,
                    accepted=tuple(accepted),
                    emitted=tuple(count + 1 for count in accepted),
                    proposers=(self.who if ahead else "",) * batch,
                    propose=propose,
                    verify=verify,
                )
            )
        return self

    def accepted(self, ahead):
        taken = 0
        while taken < ahead and self.rng.random() < self.chance:
            taken += 1
        return taken


def best_ahead(chance):
    tokens = [sum(chance**place for place in range(ahead + 1)) for ahead in range(16)]
    times = [target(ahead + 1) + draft(ahead) + 0.1 for ahead in range(16)]
    return min(range(1, 16), key=lambda ahead: times[ahead] / tokens[ahead])


# ---------------------------------------------------------------- K


@pytest.mark.parametrize("chance", [0.55, 0.7, 0.9])
def test_what_is_looked_ahead_becomes_what_is_best_for_the_acceptance(chance):
    world = World(Auto(target, draft, copies=False), chance=chance).go(400)
    chosen = [most for most in world.planned[100:] if most]
    assert np.mean(chosen) == pytest.approx(best_ahead(chance), abs=1)


def test_plain_rounds_come_first_and_now_and_then():
    world = World(Auto(target, draft, copies=False)).go(400)
    assert world.planned[:3] == [0, 0, 0]
    assert all(world.planned[3:10])
    assert 5 < sum(not most for most in world.planned[3:]) < 30


def test_a_draft_that_is_never_right_is_soon_left_alone():
    world = World(Auto(target, draft, copies=False), chance=0.0).go(400)
    assert sum(most > 0 for most in world.planned) < 60


def test_a_draft_that_is_slower_than_was_measured_is_asked_for_less():
    slow = World(Auto(target, draft, copies=False), slower=3.0).go(300)
    told = World(Auto(target, lambda ahead: 3 * draft(ahead), copies=False), slower=3.0).go(300)
    chosen, expected = (np.mean([most for most in world.planned[100:] if most]) for world in (slow, told))
    assert chosen == pytest.approx(expected, abs=0.5)
    assert chosen < best_ahead(0.8) - 1


def test_a_draft_that_rests_is_tried_again_on_other_rows():
    world = World(Auto(target, draft, copies=False), chance=0.0)
    while not world.planned[20:] or any(world.planned[-4:]):
        world.go(1)
    world.go(4)
    assert world.planned[-4:] == [0] * 4
    world.rows = [Row([1, 2, 3], 2)]
    world.go(2)
    assert any(world.planned[-2:])


def test_many_rows_make_looking_ahead_dear():
    alone = World(Auto(target, draft, copies=False)).go(200)
    many = World(Auto(target, draft, copies=False), batch=16).go(200)
    assert np.mean([most for most in many.planned if most]) < 0.8 * np.mean([most for most in alone.planned if most])


def test_fewer_rows_are_measured_anew():
    world = World(Auto(target, draft, copies=False), batch=7).go(20)
    assert world.planned[-1] > 0
    world.rows = world.rows[:4]
    world.go(2)
    assert all(world.planned[-2:])  # much the same
    world.rows = world.rows[:3]
    world.go(3)
    assert world.planned[-3:-1] == [0, 0]
    assert world.planned[-1] > 0


# ---------------------------------------------------------------- copies


def test_copies_may_be_as_long_as_allowed_and_learn_what_a_token_costs():
    policy = Auto(target, most=8)
    World(policy, who="lookup", chance=0.9).go(20)
    assert policy.terms.limits == {"lookup": 8, "reference": 8}
    assert policy.terms.costs == pytest.approx([0.1 * count / 2.1 for count in range(9)], rel=0.05)
    assert policy.terms.rival == 1


def test_copies_that_are_always_wrong_are_stopped_and_others_are_not():
    policy = Auto(target, most=8)
    world = World(policy, who="lookup", chance=0.0).go(100)
    assert policy.terms.limits["lookup"] == 0
    assert policy.terms.limits["reference"] == 8
    assert sum(most > 0 for most in world.planned) == 97  # someone may copy all the time


def test_a_draft_is_the_rival_of_copies():
    policy = Auto(target, draft, Terms())
    World(policy).go(50)
    ahead = policy.terms.limits["draft"]
    tokens = sum(0.8**place for place in range(ahead + 1))
    assert policy.terms.rival == pytest.approx(2.1 * tokens / (target(ahead + 1) + draft(ahead) + 0.1), rel=0.25)
    assert policy.terms.limits["lookup"] == 15


def test_nothing_ahead_is_refused():
    with pytest.raises(UsageError, match="0 tokens ahead"):
        Auto(target, most=0)


def test_rounds_of_a_run_without_proposer_are_ignored():
    World(policy := Auto(target), who="lookup").go(1)
    fresh = Auto(target)
    fresh.observe(
        RoundRecord(0.0, 0.1, (0,), 1, 5, (0,), (0,), (1,), ("",), verify=0.1),
    )
    assert fresh.terms == Auto(target).terms
    assert policy.terms.limits == {}


# ---------------------------------------------------------------- real rounds

TARGET, OTHER = Tiny(positions=300), Tiny(seed=1)
CLOSE = Tiny()
for _name, _array in CLOSE.weights.items():
    CLOSE.weights[_name] = (0.93 * _array + 0.07 * OTHER.weights[_name]).astype(np.float32)
MODELS = {"target": serialized(portable(TARGET)), "close": serialized(portable(CLOSE))}


def generate(proposer, policy, sampling, references=()):
    rows = [Row([3, 1, 4], 3, 0, references), Row([1, 5, 9, 2, 6], 5, 1, references), Row([8], 1, 2, references)]
    rounds = Rounds(Decoder(MODELS["target"], SessionOptions(threads=1)), Sampler(sampling), proposer, policy)
    rounds.begin(rows)
    going = list(rows)
    while going:
        room = [100 + row.prompt - len(row.ids) for row in going]
        stays = [place for place, left in enumerate(room) if left > 0]
        if len(stays) < len(going):
            going = [going[place] for place in stays]
            rounds.keep(stays) if going else None
            continue
        rounds.step(room)
    return [row.ids[row.prompt :] for row in rows]


def test_tokens_are_those_of_plain_decoding_whoever_is_asked_and_however_far():
    greedy = Sampling()
    plain = generate(None, Auto(target), greedy)
    references = (Reference("said", tuple(plain[0])), Reference("half", tuple(plain[1][:50])))
    terms = Terms()
    policy = Auto(target, draft, terms)
    model = Draft(Decoder(MODELS["close"], SessionOptions(threads=1)), Sampler(greedy), VOCABULARY)
    cascade = Cascade([Lookup(terms), model], terms)
    for _ in range(2):
        assert generate(cascade, policy, greedy, references) == plain
    assert generate(Lookup(terms), Auto(target, None, terms), greedy) == plain
    assert generate(model, Auto(target, draft, copies=False), greedy) == plain


def test_drawn_tokens_are_those_of_plain_decoding_where_they_are_copied():
    drawn = Sampling(temperature=1.0, seed=9)
    plain = generate(None, Auto(target), drawn)
    terms = Terms()
    references = (Reference("said", tuple(plain[0])),)
    assert generate(Lookup(terms), Auto(target, None, terms), drawn, references) == plain


def test_what_a_round_of_many_rows_gave_is_told_to_the_guard_by_the_row():
    heard = []

    class Heard(Guard):
        def observe(self, proposers, tokens, taken, load=1.0):
            heard.append(tokens)
            super().observe(proposers, tokens, taken, load)

    policy = Auto(target, draft, guard=Heard("draft"))
    World(policy, chance=1.0, batch=4).go(20)
    assert heard[:3] == [1, 1, 1]
    assert 1 < max(heard) <= 16
