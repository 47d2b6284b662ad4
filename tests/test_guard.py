"""What speculation may lose against plain decoding: simulated, with times that nobody measures."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from qexport.runtime.speculation.guard import DEFAULT, Bounds, Guard

PLAIN = 1.0  # seconds of a plain round


@dataclass
class Arm:
    """A proposer: each of ``ahead`` tokens is taken with a chance once all before it are; a round takes so long."""

    chance: float
    ahead: int = 4
    seconds: float = 1.5
    fires: float = 1.0  # share of rounds in which it has something

    @property
    def speed(self):
        return sum(self.chance**place for place in range(self.ahead + 1)) / self.seconds

    def round(self, rng):
        taken = 0
        while taken < self.ahead and rng.random() < self.chance:
            taken += 1
        return 1 + taken, self.seconds


@dataclass
class Run:
    """A run of a guard over arms by name, asked in their order."""

    guard: Guard
    rng: random.Random
    tokens: float = 0.0
    seconds: float = 0.0
    probes: int = 0
    rounds: dict = field(default_factory=dict)

    def go(self, arms, tokens, *, load=lambda moment: 1.0, told=True, noise=0.05, disturbed=0.02):
        """So many tokens more; the moment's load is told or not; noise is on top of both."""
        end = self.tokens + tokens
        while self.tokens < end:
            name = None
            if self.guard.probing:
                self.probes += 1
            else:
                name = next((name for name, arm in arms.items() if self.allowed(name, arm)), None)
            got, taken = arms[name].round(self.rng) if name else (1, PLAIN)
            factor = load(self.seconds)
            self.tokens, self.seconds = self.tokens + got, self.seconds + taken * factor
            self.rounds[name] = self.rounds.get(name, 0) + 1
            seen = taken * (1 + abs(self.rng.gauss(0, noise))) * (6 if self.rng.random() < disturbed else 1)
            self.guard.observe([name] if name else [], got, *((seen, factor) if told else (seen * factor, 1.0)))
        return self

    def allowed(self, name, arm):
        return self.guard.allows(name) and self.rng.random() < arm.fires

    @property
    def speed(self):
        """Over plain decoding, at the same load."""
        return self.tokens * PLAIN / self.seconds


def runs(arms, tokens, *, seeds=20, steady="draft", **options):
    return [Run(Guard(steady), random.Random(seed)).go(arms, tokens, **options) for seed in range(seeds)]


def mean(found):
    return sum(run.speed for run in found) / len(found)


# ---------------------------------------------------------------- speeds that stay


@pytest.mark.parametrize("chance", [0.6, 0.7, 0.9])
def test_a_proposer_that_pays_is_left_to_do_it(chance):
    arm = Arm(chance)
    assert arm.speed > 1.5
    assert mean(runs({"draft": arm}, 2000)) > 0.97 * arm.speed


@pytest.mark.parametrize("arm", [Arm(0.0), Arm(0.3), Arm(0.5, seconds=3.0), Arm(0.4, ahead=1, seconds=1.6)])
def test_one_that_does_not_costs_next_to_nothing(arm):
    assert arm.speed < 0.96
    assert min(run.speed for run in runs({"draft": arm}, 2000)) > 0.975
    assert mean(runs({"draft": arm}, 20000, seeds=4)) > 0.995


@pytest.mark.parametrize("arm", [Arm(0.0), Arm(0.3), Arm(0.4, ahead=1, seconds=1.6)])
def test_the_first_request_of_all_loses_little_too(arm):
    assert mean(runs({"draft": arm}, 128)) > 0.965


def test_what_is_lost_is_a_loan_and_then_trials_that_become_rare():
    for run in runs({"draft": Arm(0.0)}, 20000, seeds=3):
        trials = 3 + (20000 - 64 - 128 - 256) / DEFAULT.longest
        assert 0.5 * trials < run.seconds / PLAIN - run.tokens < DEFAULT.loan + 0.5 + trials * (DEFAULT.trial + 0.5)


def test_a_proposer_that_makes_no_difference_makes_none():
    arm = Arm(0.5, ahead=2, seconds=1.75)
    assert arm.speed == 1
    assert mean(runs({"draft": arm}, 2000)) == pytest.approx(1, abs=0.02)


def test_plain_decoding_is_measured_in_at_most_two_of_128_tokens():
    for run in runs({"draft": Arm(0.9)}, 5000, seeds=3):
        assert 0.8 * run.tokens / 70 < run.probes <= 3 + run.tokens / 64
    for run in runs({"lookup": Arm(0.9, fires=0.1)}, 5000, seeds=3):
        assert run.probes < 10  # it happens by itself


# ---------------------------------------------------------------- speeds that change


def test_a_proposer_that_begins_to_pay_is_found_again_and_one_that_stops_is_stopped():
    good, bad = Arm(0.8), Arm(0.1)
    for seed in range(10):
        run = Run(Guard("draft"), random.Random(seed))
        for arm in (good, bad, good, bad):
            run.go({"draft": arm}, 3000)
        always = run.tokens / (2 * 3000 / good.speed + 2 * 3000 / bad.speed)
        best = run.tokens / (2 * 3000 / good.speed + 2 * 3000)
        assert run.speed > max(always, 1)
        assert run.speed > 0.9 * best


def test_what_is_earned_may_be_lost_again_but_no_more():
    for seed in range(10):
        run = Run(Guard("draft"), random.Random(seed)).go({"draft": Arm(0.8)}, 1000)
        before = run.seconds - run.tokens
        run.go({"draft": Arm(0.0)}, 300)
        assert run.seconds - run.tokens - before < DEFAULT.savings + DEFAULT.loan + 3 * (DEFAULT.trial + 1)


def test_who_has_earned_again_begins_with_short_rests_again():
    guard = Guard(bounds=Bounds(rest=10.0, savings=4.0))

    def lose():
        while guard.allows("lookup"):
            guard.observe(["lookup"], 1, 1.5)
        rested = 0
        while not guard.allows("lookup"):
            guard.observe([], 1, 1.0)
            rested += 1
        return rested

    guard.observe([], 1, 1.0)
    assert [lose() for _ in range(3)] == [10, 20, 40]
    guard.observe(["lookup"], 4, 1.5)
    assert lose() == 10


def test_who_pays_on_the_whole_begins_each_text_anew():
    guard = Guard("draft")
    run = Run(guard, random.Random(0))
    run.go({"draft": Arm(0.8)}, 1500)
    for _ in range(3):
        guard.forgive()
        run.go({"draft": Arm(0.1)}, 128)  # texts that it is not good at
    guard.forgive()
    assert guard.allows("draft")
    before = run.seconds
    run.go({"draft": Arm(0.8)}, 256)
    assert 256 / (run.seconds - before) > 0.8 * Arm(0.8).speed


def test_other_texts_end_a_rest_but_not_for_a_proposer_that_never_pays():
    guard = Guard("draft")
    run = Run(guard, random.Random(0))
    trials = []
    for _ in range(40):
        guard.forgive()
        before = run.rounds.get("draft", 0)
        run.go({"draft": Arm(0.0)}, 128)
        trials.append(run.rounds.get("draft", 0) > before)
    assert all(trials[:2])
    assert sum(trials[10:]) < 10
    assert run.speed > 0.985


# ---------------------------------------------------------------- machines that change


def waves(moment):
    """Four times slower for half of the time, in pieces of 30 seconds."""
    return 4.0 if int(moment / 30) % 2 else 1.0


def test_a_machine_whose_pace_changes_all_the_time_misleads_nobody_who_is_told():
    arm, bad = Arm(0.7), Arm(0.2)
    for run in runs({"draft": arm}, 2000, seeds=8, load=waves):
        assert run.rounds.get(None, 0) < 0.1 * sum(run.rounds.values())
    for run in runs({"draft": bad}, 2000, seeds=8, load=waves):
        assert run.rounds["draft"] < 0.1 * sum(run.rounds.values())


def test_calls_that_take_longer_than_was_said_are_found_out_beside_plain_ones():
    rng, guard = random.Random(0), Guard("draft")
    rounds = 0
    for moment in range(600):  # a round is said to take 1.2 and takes 2.4 times what a plain one does, for 1.5 tokens
        load = waves(moment)
        if guard.probing or not guard.allows("draft"):
            guard.observe([], 1, 1.0, load)
        else:
            rounds += 1
            guard.observe(["draft"], rng.choice([1, 2]), 1.2, 2 * load)
    assert rounds < 80
    assert guard.speed("draft") == pytest.approx(1.5 / 2.4, rel=0.3)


def test_disturbed_rounds_do_not_stop_a_good_proposer():
    arm = Arm(0.7)
    found = runs({"draft": arm}, 2000, disturbed=0.1)
    assert mean(found) > 0.93 * arm.speed


# ---------------------------------------------------------------- several proposers


def test_copies_must_do_better_than_the_draft_that_would_be_asked_otherwise():
    draft = Arm(0.8, seconds=1.4)
    slow, quick = Arm(0.5, ahead=2, seconds=1.2, fires=0.5), Arm(0.9, ahead=8, seconds=1.3, fires=0.5)
    assert 1 < slow.speed < draft.speed < quick.speed
    for run in runs({"lookup": slow, "draft": draft}, 4000, seeds=5):
        assert run.rounds["lookup"] < 0.1 * run.rounds["draft"]
    for run in runs({"lookup": quick, "draft": draft}, 4000, seeds=5):
        assert run.rounds["lookup"] > 0.7 * run.rounds["draft"]


def test_a_round_of_both_is_the_doing_of_the_copies():
    guard = Guard("draft")
    for _ in range(3):
        guard.observe([], 1, 1.0)
    for _ in range(20):
        guard.observe(["draft"], 3, 1.5)
    for _ in range(20):
        guard.observe(["draft", "lookup"], 1.2, 1.8)
    assert not guard.allows("lookup")
    assert guard.allows("draft")
    assert guard.speed("draft") == pytest.approx(2)


# ---------------------------------------------------------------- what is told


def test_speed_is_told_as_soon_as_both_are_known():
    guard = Guard()
    assert guard.speed("lookup") is None
    guard.observe(["lookup"], 4, 2.0)
    assert guard.speed("lookup") is None
    guard.observe([], 1, 1.1)  # behind another: does not count
    assert guard.speed("lookup") is None
    guard.observe([], 1, 1.0)
    assert guard.speed("lookup") == 2
    assert guard.speed("draft") is None


def test_plain_decoding_comes_first_and_again_when_something_changed():
    guard = Guard()
    for _ in range(3):
        assert guard.probing
        guard.observe([], 1, 1.0)
    assert not guard.probing
    guard.renew()
    assert guard.probing
    guard.observe([], 1, 1.0)
    assert not guard.probing


def test_plain_rounds_behind_others_do_not_count_as_they_take_longer():
    guard = Guard()
    for _ in range(3):
        guard.observe([], 1, 1.0)
    for _ in range(100):
        guard.observe(["lookup"], 2, 2.0)
        guard.observe([], 1, 1.5)
        if guard.probing:
            guard.observe([], 1, 1.0)
    assert guard.speed("lookup") == 1


def test_a_loan_bounds_what_is_lost_before_the_first_rest():
    guard = Guard(bounds=Bounds(loan=3.0, rest=10.0))
    for _ in range(3):
        guard.observe([], 1, 1.0)
    rounds = 0
    while guard.allows("lookup"):
        guard.observe(["lookup"], 1, 1.5)
        rounds += 1
    assert rounds == 7  # the seventh half makes it more than 3
    rested = 0
    while not guard.allows("lookup"):
        guard.observe([], 1, 1.0)
        rested += 1
    assert rested == 10
    for _ in range(3):
        guard.observe(["lookup"], 1, 1.5)
    assert not guard.allows("lookup")  # a trial is 1
    for _ in range(19):
        guard.observe([], 1, 1.0)
    assert not guard.allows("lookup")
    guard.observe([], 1, 1.0)
    assert guard.allows("lookup")
