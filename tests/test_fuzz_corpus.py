"""The corpus of the fuzzer, replayed: nothing in it breaks a target, and a target that breaks is noticed."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from fuzz import admit_target, recipe_target
from fuzz.script import Tape, edit
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import QexportError
from qexport.exporter import admit

CORPUS = Path(__file__).parent / "fuzz/corpus"
TARGETS = {"admit": admit_target.one_input, "recipe": recipe_target.one_input}


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_of_the_corpus_breaks_its_target(target):
    inputs = sorted((CORPUS / target).iterdir())
    assert len(inputs) > 40
    for path in inputs:
        try:
            TARGETS[target](path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path.name} breaks it") from error


def test_the_corpus_stays_small():
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) <= 400
    assert sum(path.stat().st_size for path in files) <= 300_000


def test_inputs_of_every_kind_are_in_the_corpus_and_some_are_admitted(monkeypatch):
    ends = {"admitted": 0, "refused": 0}

    def admitted(*arguments, **more):
        try:
            admit.admit_proto(*arguments, **more)
        except QexportError:
            ends["refused"] += 1
            raise
        ends["admitted"] += 1

    monkeypatch.setattr(admit_target, "admit_proto", admitted)
    for path in sorted((CORPUS / "admit").iterdir()):
        admit_target.one_input(path.read_bytes())
    assert min(ends.values()) >= 10, ends


def broken_rule(_subject):
    raise IndexError("a bug")


def test_a_bug_in_a_rule_breaks_the_target(monkeypatch):
    monkeypatch.setattr(admit, "RULES", (*admit.RULES, broken_rule))
    with pytest.raises(IndexError):
        admit_target.one_input(b"\0" + admit_target.seeds()[0].SerializeToString())


def test_a_recipe_that_reads_differently_after_it_was_written_breaks_the_target(monkeypatch):
    monkeypatch.setattr("qexport.exporter.recipe.Recipe.to_toml", lambda _: "")
    with pytest.raises(AssertionError, match="reads differently"):
        recipe_target.one_input(b'\0description = "x"\n')


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.binary(max_size=200))
def test_a_script_always_leaves_a_message_that_can_be_written(data):
    model = onnx.ModelProto()
    model.CopyFrom(admit_target.seeds()[data[0] % 5 if data else 0])
    edit(model, Tape(data))
    again = onnx.ModelProto()
    again.ParseFromString(model.SerializeToString())


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.sampled_from(sorted(TARGETS)), st.binary(max_size=200))
def test_random_bytes_break_no_target(target, data):
    TARGETS[target](data)
