"""Every row of the catalogue: its faults are told as they should be, and eight invariants hold."""

from __future__ import annotations

import pytest

from faults import catalogue
from faults.runner import run

CASES, KNOWN = catalogue.cases(), catalogue.known()


def marked(case):
    """A case, with the reason why it is known not to pass; one that passes nevertheless fails, so that marks go."""
    marks = [pytest.mark.slow] if case.slow else []
    if case.id in KNOWN:
        marks.append(pytest.mark.xfail(strict=True, raises=AssertionError, reason=KNOWN[case.id]))
    return pytest.param(case, id=case.id, marks=marks)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_fault_is_told_as_it_should_be_and_the_invariants_hold(faults, case, pytestconfig):
    if case.slow and not pytestconfig.getoption("--table", default=False):
        pytest.skip("slow: run with --table")
    run(faults, case)


def test_every_case_belongs_to_a_row_and_has_a_name_of_its_own():
    ids = [case.id for case in CASES]
    assert sorted(ids) == sorted(set(ids))
    assert {case.row for case in CASES} <= set(catalogue.ROWS)
    assert set(KNOWN) <= set(ids)


@pytest.mark.parametrize("row", catalogue.ROWS)
def test_every_row_has_a_case(row):
    assert row in {case.row for case in CASES}
