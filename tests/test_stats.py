"""Accounts of runs: formulas on worked numbers, percentiles as numpy has them, what rows saw of a batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.cli import accounts
from qexport.cli.common import make_console
from qexport.runtime.accounting.acceptance import count_acceptance, expected_tokens, predict_speedup
from qexport.runtime.accounting.costs import Costs
from qexport.runtime.accounting.machine import Fingerprint, Machine
from qexport.runtime.accounting.profiles import Profile
from qexport.runtime.accounting.records import PrefillRecord, RoundRecord, Run
from qexport.runtime.accounting.stats import account, token_seconds
from qexport.runtime.accounting.utilization import Known, mbu

HERE = Fingerprint("processor", 2, "runtime 1")


def a_round(began=0.0, seconds=0.01, emitted=(1,), proposed=None, accepted=None, **changes):
    rows = tuple(range(len(emitted)))
    proposed = (0,) * len(rows) if proposed is None else proposed
    accepted = tuple(n - 1 for n in emitted) if accepted is None else accepted
    told = {"began": began, "clock": began + seconds, "rows": rows, "width": 1 + max(proposed), "valid": 0}
    told |= {"proposed": proposed, "accepted": accepted, "emitted": emitted}
    told |= {"proposers": tuple("draft" if n else "" for n in proposed)}
    return RoundRecord(**(told | changes))


def a_run(*rounds, prompts=(5,), seconds=0.1, **changes):
    told = PrefillRecord(began=0.0, clock=seconds, prompts=prompts, emitted=(1,) * len(prompts), **changes)
    return Run(told, tuple(rounds))


def a_profile(curve, costs=None, **changes):
    told = {"fingerprint": HERE, "threads": 1, "valid": 128, "batch": 1, "curve": curve, "prefill": 0.1}
    return Profile(**(told | changes), costs=costs or Costs(weights=0, kv=0, flops=0))


# ---------------------------------------------------------------- worked numbers


def test_seven_billion_weights_in_16_bits_at_14_ms_use_half_of_two_terabytes_per_second():
    assert mbu(7e9 * 2, 14e-3, 2e12) == pytest.approx(0.5)
    costs = Costs(weights=14_000_000_000, kv=0, flops=14_000_000_000)
    machine = Machine(HERE, 1, ((1 << 27, 2e12),), flops=312e12)
    rounds = [a_round(seconds=15e-3, native=14e-3) for _ in range(10)]
    use = account([a_run(*rounds)], Known(machine, a_profile(((1, 14.0),), costs))).hardware.target
    assert use.mbu == pytest.approx(0.5)
    assert use.mfu == pytest.approx(1e12 / 312e12)
    assert use.bound == "memory"
    assert use.intensity == pytest.approx(1)


def test_utilization_counts_what_had_to_be_done_and_no_padding():
    costs = Costs(weights=1000, kv=10, flops=200, flops_pair=3)
    machine = Machine(HERE, 1, ((1 << 20, 1e6),), flops=1e6)
    # two rows of 20 tokens each, one of them with three proposed tokens: 4 + 1 tokens, though the call has 2 x 4
    one = a_round(emitted=(2, 1), proposed=(3, 0), width=4, valid=40, native=0.01)
    use = account([a_run(one, prompts=(20, 20))], Known(machine, a_profile(((1, 1.0),), costs))).hardware.target
    assert use.bytes == 1000 + 10 * (40 + 5)
    looked_at = (21 + 22 + 23 + 24) + 21
    assert use.operations == 5 * 200 + 3 * looked_at
    assert use.mbu == pytest.approx(use.bytes / 0.01 / 1e6)
    assert use.mfu == pytest.approx(use.operations / 0.01 / 1e6)


def test_a_prompt_is_counted_by_its_triangle_of_pairs():
    costs = Costs(weights=1000, kv=10, flops=200, flops_pair=3)
    machine = Machine(HERE, 1, ((1 << 20, 1e6),), flops=1e6)
    run = a_run(prompts=(4, 2), native=0.05, calls=2)
    use = account([run], Known(machine, a_profile(((1, 1.0),), costs))).hardware.prefill
    assert use.operations == 6 * 200 + 3 * (1 + 2 + 3 + 4 + 1 + 2)
    assert use.bytes == 2 * 1000 + 6 * 10
    assert use.calls == 2


def test_drafts_are_accounted_beside_the_target():
    target, draft = Costs(1000, 10, 200), Costs(100, 1, 20, 2)
    machine = Machine(HERE, 1, ((1 << 20, 1e6),), flops=1e6)
    # four steps of one row with 20, 21, 22, 23 tokens before them
    drafted = {"draft_calls": 4, "draft_width": 4, "draft_valid": 20 + 21 + 22 + 23, "native_draft": 0.002}
    one = a_run(a_round(emitted=(3,), proposed=(4,), valid=20, native=0.01, **drafted))
    known = Known(machine, a_profile(((1, 10.0), (5, 12.0)), target), a_profile(((1, 0.5),), draft))
    found = account([one], known).hardware
    assert found.draft.bytes == 4 * 100 + (86 + 4)
    assert found.draft.operations == 4 * 20 + 2 * (21 + 22 + 23 + 24)
    assert found.draft.calls == 4
    assert found.bytes_per_token == (found.target.bytes + found.draft.bytes) / 3
    assert found.predicted_speedup == pytest.approx(3 * 10 / (12 + 4 * 0.5))


def test_overhead_is_what_is_outside_of_backends():
    one = a_round(
        seconds=0.010, propose=0.003, verify=0.005, accept=0.001, native=0.0045, native_draft=0.0025, transfer=0.0005
    )
    found = account([a_run(one)])
    assert found.overhead == pytest.approx(1 - (0.0045 + 0.0025 + 0.0005) / 0.010)
    split = found.split
    assert (split.prefill, split.draft, split.accept, split.transfer) == (0.1, 0.003, 0.001, 0.0005)
    assert split.verify == pytest.approx(0.0045)
    assert split.other == pytest.approx(0.001)
    assert sum((split.draft, split.verify, split.accept, split.transfer, split.other)) == pytest.approx(0.010)


# ---------------------------------------------------------------- latencies


@given(st.lists(st.tuples(st.floats(1e-4, 1.0), st.integers(1, 9)), min_size=1, max_size=30))
def test_percentiles_are_those_of_numpy_and_tokens_share_the_time_of_their_round(told):
    clock, rounds = 0.0, []
    for seconds, count in told:
        rounds.append(a_round(clock, seconds, (count,), (count - 1,)))
        clock = rounds[-1].clock + 3.0  # what the caller does between rounds
    expected = np.concatenate([np.full(count, seconds / count) for seconds, count in told])
    found = account([a_run(*rounds)])
    np.testing.assert_allclose(token_seconds(rounds), expected, rtol=1e-6)
    np.testing.assert_allclose(
        [found.tpot.mean, found.tpot.p50, found.tpot.p95],
        1e3 * np.array([expected.mean(), np.percentile(expected, 50), np.percentile(expected, 95)]),
        rtol=1e-6,
    )
    assert found.round.p95 == pytest.approx(1e3 * np.percentile([seconds for seconds, _ in told], 95))
    assert found.tokens_per_second == pytest.approx(sum(n for _, n in told) / sum(s for s, _ in told))
    assert found.tokens == 1 + sum(n for _, n in told)


def test_time_to_the_first_token_is_that_of_the_prefill_of_each_row():
    found = account([a_run(prompts=(3, 4, 5), seconds=0.2), a_run(prompts=(3,), seconds=0.4)])
    assert (found.ttft.p50, found.ttft.mean) == (pytest.approx(200), pytest.approx(250))
    assert (found.rows, found.prompt_tokens, found.tokens) == (4, 15, 4)
    assert found.tpot is None
    assert found.round is None
    assert found.tokens_per_second == 0


def test_measured_speedup_is_relative_to_the_baseline_of_the_same_run():
    found = account([a_run(a_round(seconds=0.01, emitted=(3,), proposed=(2,)))], baseline=150.0)
    assert found.speedup == pytest.approx(2)
    assert account([a_run(a_round())]).speedup is None


def test_tokens_per_call_count_rows_that_were_there():
    rounds = [a_round(emitted=(4, 2), proposed=(3, 3)), a_round(emitted=(3,), proposed=(3,), rows=(1,))]
    found = account([a_run(*rounds, prompts=(5, 5))])
    assert found.target_calls == 2
    assert found.tokens_per_call == pytest.approx(9 / 3)


def test_a_row_sees_its_own_tokens_and_waits_for_all():
    rounds = [
        a_round(seconds=0.01, emitted=(4, 2), proposed=(3, 1)),
        a_round(seconds=0.02, emitted=(3,), proposed=(3,), rows=(1,)),
    ]
    run = a_run(*rounds, prompts=(5, 7))
    first, second = account([run.of_row(0)]), account([run.of_row(1)])
    assert (first.tokens, second.tokens) == (5, 6)
    assert (first.prompt_tokens, second.prompt_tokens) == (5, 7)
    assert (first.target_calls, second.target_calls) == (1, 2)
    assert (first.proposers[0].accepted, second.proposers[0].accepted) == (3, 1 + 2)
    assert (first.proposers[0].proposed, second.proposers[0].proposed) == (3, 1 + 3)
    assert second.split.other == pytest.approx(0.03)
    assert first.tokens + second.tokens == account([run]).tokens


# ---------------------------------------------------------------- acceptance


def test_acceptance_is_counted_by_position_and_proposer():
    rounds = [
        a_round(emitted=(4,), proposed=(3,)),
        a_round(emitted=(1,), proposed=(3,)),
        a_round(emitted=(2,), proposed=(1,)),
        a_round(emitted=(2,), proposed=(3,)),
        a_round(emitted=(3,), proposed=(2,), proposers=("lookup",)),
        a_round(),
    ]
    draft, lookup = count_acceptance(rounds)
    assert (draft.proposer, draft.rounds, draft.proposed, draft.accepted) == ("draft", 4, 10, 5)
    assert draft.rate == 0.5
    # position 0: 3 of 4; position 1: reached by 2 of the 3 that had one there, taken once; position 2: reached by one
    assert draft.conditional == (3 / 4, 1 / 2, 1)
    assert draft.cumulative == (3 / 4, 1 / 3, 1 / 3)
    assert (lookup.rounds, lookup.accepted, lookup.conditional) == (1, 2, (1, 1))


@given(st.floats(0, 0.99), st.integers(0, 12))
def test_expected_tokens_follow_the_closed_form_for_a_constant_chance(chance, ahead):
    assert expected_tokens([chance], ahead) == pytest.approx((1 - chance ** (ahead + 1)) / (1 - chance))


def test_expected_tokens_are_those_of_a_simulation():
    chances, rng = [0.9, 0.6, 0.8], np.random.default_rng(0)
    taken = np.cumprod(rng.random((200_000, 3)) < chances, axis=1).sum(axis=1)
    assert expected_tokens(chances, 3) == pytest.approx(1 + taken.mean(), abs=0.01)
    assert expected_tokens([], 3) == 1


def test_the_predicted_speedup_is_the_formula_of_the_paper():
    # a = .7, c = .1, t(4) = 1.4 t(1): 2.53 / 1.7
    found = predict_speedup([0.7], 3, lambda width: 1.4 if width == 4 else 1.0, lambda ahead: 0.1 * ahead)
    assert found == pytest.approx(2.533 / 1.7, abs=1e-3)


def test_plain_decoding_is_predicted_to_be_as_fast_as_itself():
    machine = Machine(HERE, 1, ((1 << 20, 1e6),), flops=1e6)
    rounds = [a_round(emitted=(1, 1), proposers=("", "")) for _ in range(4)]
    found = account([a_run(*rounds, prompts=(5, 5))], Known(machine, a_profile(((1, 3.0),))))
    assert found.hardware.predicted_speedup == pytest.approx(1)
    assert found.proposers == ()


def test_stats_are_json():
    machine = Machine(HERE, 1, ((1 << 20, 1e6),), flops=1e6)
    one = a_round(emitted=(3,), proposed=(4,), native=0.01)
    found = account([a_run(one)], Known(machine, a_profile(((1, 3.0), (5, 4.0)), Costs(1, 1, 1))), baseline=50.0)
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told["schema"] == "qexport.stats/1"
    assert told["proposers"][0]["conditional"] == [1, 1, 0, 0]
    assert told["hardware"]["draft"] is None
    assert told["speedup"] == pytest.approx(6)


# ---------------------------------------------------------------- as lines


def printed(capsys, found):
    accounts.print_stats(make_console(), found)
    return capsys.readouterr().out


def test_accounts_are_printed_with_all_that_is_known(capsys):
    machine = Machine(HERE, 1, ((1 << 20, 1e6),), flops=1e6)
    rounds = [a_round(emitted=(3,), proposed=(4,), native=0.01), a_round(emitted=(2,), proposed=(1,), propose=0.005)]
    known = Known(machine, a_profile(((1, 3.0), (5, 4.0)), Costs(1000, 1, 2)))
    told = printed(capsys, account([a_run(*rounds)], known, baseline=100.0))
    lines = {line[:22].strip(): line[23:].strip() for line in told.splitlines()}
    assert lines["tokens"] == "6 of 1 prompts with 5"
    assert lines["calls of the target"] == "2, 2.50 tokens each"
    assert lines["speed"] == "250 tokens/s, 2.50x plain"
    assert lines["proposed by draft"] == "5 tokens, 3 taken (60.0%)"
    assert lines["time of rounds"].startswith("draft 25.0%, verify 0.0%, accept 0.0%, other 75.0%")
    assert "bound by memory" in lines["machine, target"]
    assert [line.split() for line in told.splitlines() if line[:3].strip() in {"1", "2", "3"}] == [
        ["1", "100.0%", "100.0%"], ["2", "100.0%", "100.0%"], ["3", "0.0%", "0.0%"],
    ]  # fmt: skip


def test_accounts_of_a_single_token_have_no_rounds(capsys):
    told = printed(capsys, account([a_run()]))
    assert "first token" in told
    assert "rounds" not in told
