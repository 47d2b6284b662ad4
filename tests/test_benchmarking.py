"""Benches: ways take turns, ratios are paired and have intervals, pictures show what was measured."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from qexport.errors import EnvironmentMismatch, UsageError
from qexport.runtime.accounting.costs import Costs
from qexport.runtime.accounting.machine import Fingerprint, Machine
from qexport.runtime.accounting.profiles import Profile
from qexport.runtime.accounting.records import PrefillRecord, RoundRecord, Run
from qexport.runtime.accounting.utilization import Known
from qexport.runtime.benchmarking import plots
from qexport.runtime.benchmarking.interleaved import Decoded, Timing, Way, compare, interleave, ratio_of_speeds
from qexport.runtime.benchmarking.result import Subject, summarize

HERE = Fingerprint("processor", 2, "runtime 1")
TARGET = Profile(HERE, 1, 128, 1, ((1, 2.0), (5, 2.4), (9, 3.0)), 0.1, Costs(20_000_000, 6144, 10_000_000, 6144))
DRAFT = Profile(HERE, 1, 128, 1, ((1, 0.1), (5, 0.15)), 0.01, Costs(1_600_000, 768, 800_000, 768))
MACHINE = Machine(HERE, 1, ((2 << 20, 80e9), (32 << 20, 40e9), (128 << 20, 30e9)), 105e9, 400e9)
TOKENS = 12


class Clock:
    """Ways to decode with made-up times: each prompt has a difficulty, each way a speed."""

    def __init__(self):
        self.order = []

    def way(self, name, speed, ahead=None, tokens=None):
        return Way(name, lambda prompt: self._decode(name, prompt, speed, ahead, tokens), ahead)

    def _decode(self, name, prompt, speed, ahead, tokens):
        self.order.append((name, prompt))
        difficulty = 1.0 + prompt % 3
        noise = 1 + 0.2 * (len(self.order) % 2)  # every other call is disturbed
        emitted, rounds, clock = TOKENS - 1, [], 0.1
        while emitted > 0:
            count = min(1 + (ahead or 0) // 2, emitted)
            rounds.append(_round(clock, 1e-3 * difficulty * count / speed, count, ahead or 0))
            emitted, clock = emitted - count, rounds[-1].clock
        run = Run(PrefillRecord(0.0, 0.1, (5,), emitted=(1,), native=0.05), tuple(rounds))
        return Decoded(tokens or tuple(range(prompt, prompt + TOKENS)), noise * difficulty / speed, run)


def _round(began, seconds, count, ahead):
    drafted = {"native_draft": seconds / 4, "draft_calls": ahead, "draft_width": ahead, "draft_valid": 20 * ahead}
    told = {"began": began, "clock": began + seconds, "rows": (0,), "width": 1 + ahead, "valid": 20}
    told |= {"proposed": (ahead,), "accepted": (count - 1,), "emitted": (count,)}
    return RoundRecord(**told, proposers=("draft" if ahead else "",), native=seconds / 2, **(drafted if ahead else {}))


@pytest.fixture(scope="module")
def bench():
    clock = Clock()
    ways = [clock.way("plain", 1.0), *(clock.way(f"K = {k}", 1 + k / 8, k) for k in (2, 4, 8))]
    timings = interleave([*ways, clock.way("auto", 1.9), clock.way("lookup", 0.98)], prompts=9, rounds=3)
    return summarize(Subject("target", "draft", TOKENS, Known(MACHINE, TARGET, DRAFT)), timings)


# ---------------------------------------------------------------- taking turns


def test_ways_take_turns_prompt_by_prompt_and_none_is_always_first():
    clock, told = Clock(), []
    interleave([clock.way(name, 1.0) for name in "abc"], prompts=2, rounds=3, told=lambda: told.append(1))
    timed = clock.order[3:]  # the first ones warm up
    assert len(timed) == 2 * 3 * 3
    assert len(told) == 2 * 3
    blocks = [timed[start : start + 3] for start in range(0, len(timed), 3)]
    assert all({name for name, _ in block} == set("abc") for block in blocks)
    assert all(len({prompt for _, prompt in block}) == 1 for block in blocks)
    assert {block[0][0] for block in blocks} == set("abc")


def test_speed_is_that_of_medians_over_rounds_of_all_prompts():
    clock = Clock()
    plain, fast = interleave([clock.way("plain", 1.0), clock.way("fast", 1.5)], prompts=6, rounds=5)
    assert compare(fast, plain).value == pytest.approx(1.5, rel=0.21)
    assert compare(plain, plain).value == 1
    assert plain.tokens_per_second == pytest.approx(6 * TOKENS / plain.seconds.sum())


def test_the_time_of_a_prompt_is_the_median_of_its_rounds():
    run = Run(PrefillRecord(0.0, 0.1, (5,), emitted=(1,)), ())
    rounds = [[1.0, 7.0], [9.0, 5.0], [2.0, 6.0]]
    decoded = tuple(tuple(Decoded((1, 2), seconds, run) for seconds in row) for row in rounds)
    timing = Timing(Way("plain", None), decoded)
    assert timing.seconds.tolist() == [2.0, 6.0]
    assert timing.tokens_per_second == 4 / 8
    assert len(timing.runs) == 6


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        seconds = rng.gamma(4.0, 1.0, 40)
        ratios = rng.gamma(9.0, 1.5 / 9.0, 40)  # of each prompt; 1.5 in the mean, weighted by seconds too
        tokens = np.full(40, 10.0)
        found = ratio_of_speeds((tokens, seconds), (tokens, seconds * ratios))
        held += found.low <= 1.5 <= found.high
        assert found.low <= found.value <= found.high
    assert 0.87 * 200 <= held <= 0.99 * 200


def test_ways_with_more_tokens_are_compared_by_tokens_per_second():
    tokens, seconds = np.array([10.0, 20.0]), np.array([1.0, 2.0])
    assert ratio_of_speeds((2 * tokens, 2 * seconds), (tokens, seconds)).value == 1


@pytest.mark.parametrize(("ways", "prompts", "rounds"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_turns_of_nothing_are_refused(ways, prompts, rounds):
    with pytest.raises(UsageError, match=f"{ways} ways, {prompts} prompts, {rounds} rounds"):
        interleave([Clock().way("plain", 1.0)] * ways, prompts, rounds)


# ---------------------------------------------------------------- the outcome


def test_a_bench_names_the_best_way_and_how_close_the_automatic_choice_comes(bench):
    assert [entry.name for entry in bench.entries] == ["plain", "K = 2", "K = 4", "K = 8", "auto", "lookup"]
    assert bench.best.name == "K = 8"
    assert bench.auto_over_best == pytest.approx(1.9 / 2.0, rel=0.1)
    assert bench.entries[0].speedup.value == 1
    assert all(entry.same == 9 for entry in bench.entries)
    assert (bench.prompts, bench.rounds) == (9, 3)


def test_other_tokens_than_those_of_plain_decoding_are_told():
    clock = Clock()
    ways = [clock.way("plain", 1.0), clock.way("wrong", 1.0, 2, tokens=(1, 2, 3))]
    found = summarize(Subject("target", None, TOKENS, Known(MACHINE, TARGET)), interleave(ways, 4, 1))
    assert found.entries[1].same == 0
    assert found.entries[1].predicted is None  # there is no draft's curve


def test_the_prediction_is_the_formula_on_curves_and_acceptance(bench):
    chances, entry = bench.acceptance.conditional, bench.entries[2]
    expected = 1 + sum(np.prod(chances[: place + 1]) for place in range(4))
    assert entry.predicted == pytest.approx(expected * 2.0 / (2.4 + 4 * 0.1))
    assert bench.entries[0].predicted is None


def test_a_bench_is_json(bench):
    told = json.loads(json.dumps(bench.as_json(), allow_nan=False))
    assert told["schema"] == "qexport.bench/1"
    assert told["best"] == "K = 8"
    assert told["known"]["target"]["curve"][0] == [1, 2.0]
    assert told["entries"][1]["stats"]["schema"] == "qexport.stats/1"
    assert told["entries"][1]["stats"]["hardware"]["draft"]["bound"] in {"memory", "compute"}


# ---------------------------------------------------------------- pictures


def test_each_picture_is_an_svg_of_its_own_and_the_same_every_time(bench):
    found = plots.draw(bench)
    assert set(found) == {"roofline.svg", "acceptance.svg", "speedup.svg"}
    for data in found.values():
        assert ET.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
    assert found == plots.draw(bench)


def test_without_a_draft_there_is_no_picture_of_its_acceptance():
    clock = Clock()
    timings = interleave([clock.way("plain", 1.0), clock.way("lookup", 1.2)], 2, 1)
    found = summarize(Subject("target", None, TOKENS, Known(MACHINE, TARGET)), timings)
    assert set(plots.draw(found)) == {"roofline.svg", "speedup.svg"}


def test_of_a_device_that_nobody_measured_no_shares_are_told():
    clock = Clock()
    timings = interleave([clock.way("plain", 1.0), clock.way("K = 2", 1.2, 2)], 2, 1)
    found = summarize(Subject("target", "draft", TOKENS, Known(None, TARGET, DRAFT)), timings)
    use = found.entries[1].stats.hardware.target
    assert (use.mbu, use.mfu, use.bound) == (None, None, None)
    assert use.bytes > 0
    assert set(plots.draw(found)) == {"acceptance.svg", "speedup.svg"}
    assert found.entries[1].predicted is not None
    json.dumps(found.as_json(), allow_nan=False)


def test_a_curve_lies_below_the_roof_where_the_machine_is_not_that_fast():
    for width, intensity, rate in plots.points(TARGET):
        costs = TARGET.costs
        read = costs.weights + costs.kv * (128 + width)
        done = width * costs.flops + costs.flops_pair * (width * 128 + width * (width + 1) / 2)
        assert intensity == pytest.approx(done / read)
        assert rate == pytest.approx(1e3 * done / TARGET.milliseconds(width))
    assert plots.attainable(MACHINE, 0.5, MACHINE.memory) == 15e9
    assert plots.attainable(MACHINE, 100, MACHINE.memory) == 105e9


def test_without_matplotlib_it_says_what_to_install(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentMismatch, match="matplotlib") as caught:
        plots.draw(bench)
    assert "qexport[report]" in caught.value.hint
