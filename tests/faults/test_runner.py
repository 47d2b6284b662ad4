"""The runner itself: a command that breaks an invariant is found out, one that does not passes."""

from __future__ import annotations

import os

import pytest

import qexport.cli
from faults import hooks, runner
from faults.case import Case
from faults.runner import Broken, run, run_once


def check_good(room):
    return ["check", str(room.good / "model.onnx")]


def check_missing(room):
    return ["check", str(room.inputs / "absent.onnx")]


FAULTS = [
    ("I1", hooks.leave_half_an_artefact, {}),
    ("I2", hooks.touch_an_input, {}),
    ("I3", hooks.write_home_and_clean_up, {}),
    ("I4", hooks.ask_the_network, {}),
    ("I5", hooks.die, {}),
    ("I6", hooks.take_memory, {"rss": 300}),
    ("I6", hooks.take_time, {"wall": 1}),
    ("I7", hooks.print_colours, {}),
    ("I8", hooks.leave_a_process, {}),
    ("I8", hooks.leave_a_stage, {}),
]


@pytest.mark.parametrize(("invariant", "hook", "limits"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_command_that_breaks_an_invariant_is_found_out(faults, invariant, hook, limits):
    case = Case("M00_planted", check_good, hook=hook.__name__, limits=limits)
    with pytest.raises(Broken, match=f"^{invariant}: "):
        run_once(faults, case, as_json=False)


def test_the_eight_invariants_are_all_among_them():
    assert {row[0] for row in FAULTS} == {f"I{number}" for number in range(1, 9)}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_command_that_does_nothing_wrong_passes(faults, as_json):
    run_once(faults, Case("M00_good", check_good), as_json=as_json)
    run_once(faults, Case("M00_missing", check_missing, 2, "absent.onnx"), as_json=as_json)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("code", "says"), [(3, ""), (0, ""), (2, "something else")])
def test_a_wrong_code_or_another_message_is_found_out(faults, as_json, code, says):
    with pytest.raises(Broken):
        run_once(faults, Case("M00_other", check_missing, code, says), as_json=as_json)


@pytest.mark.parametrize("way", ["warm", "cold"])
def test_both_ways_record_what_a_command_opens_and_end_the_same(faults, way):
    seen = []
    case = Case("M00_way", check_good, way=way, after=lambda room, ended: seen.append((room, ended)))
    run_once(faults, case, as_json=True)
    room, ended = seen[0]
    assert ended.told["ok"] is True
    assert (str(room.good / "model.onnx"), "read") in ended.events("open")


@pytest.mark.parametrize("way", ["warm", "cold"])
def test_a_hook_and_limits_reach_the_command_either_way(faults, way):
    seen = []
    case = Case("M00_way", check_good, way=way, hook="tell_limits", limits={"NOFILE": 99, "umask": 0o27},
                after=lambda room, ended: seen.extend(ended.events("qexport.io")))  # fmt: skip
    run_once(faults, case, as_json=False)
    assert seen == [("limits", "99", "0o27", str(os.geteuid()))]


@pytest.mark.parametrize("way", ["warm", "cold"])
def test_commands_run_the_package_that_the_tests_import(faults, way):
    seen = []
    case = Case("M00_way", check_good, way=way, hook="tell_package",
                after=lambda room, ended: seen.extend(ended.events("qexport.io")))  # fmt: skip
    run_once(faults, case, as_json=False)
    assert seen == [("package", qexport.__file__, qexport.cli.__file__)]


def test_a_quick_case_runs_both_plain_and_with_json(faults, monkeypatch):
    monkeypatch.setattr(runner, "QUICK", 20)
    seen = []
    run(faults, Case("M00_good", check_good, after=lambda room, ended: seen.append(ended.stdout[:1])))
    assert sorted(seen) == [b"o", b"{"]


FOLLOWED = {
    "nothing": (Case("M00_good", check_good), 1),
    "an artefact": (Case("M00_build", lambda room: room.build()), 1),
    "a stage": (Case("M00_stage", check_good, hook="leave_a_dead_stage"), 2),
    "a stage, and an error": (Case("M00_both", check_missing, 2, hook="leave_a_dead_stage"), 2),
}


@pytest.mark.parametrize(("case", "runs"), FOLLOWED.values(), ids=FOLLOWED)
def test_a_good_build_follows_what_has_left_something(faults, monkeypatch, case, runs):
    seen, start = [], faults.start
    monkeypatch.setattr(faults, "start", lambda room, argv, how=None: seen.append(argv) or start(room, argv, how))
    run_once(faults, case, as_json=False)
    assert len(seen) == runs
