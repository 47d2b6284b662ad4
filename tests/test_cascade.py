"""Who is asked, for which rows, and whose answer counts."""

from __future__ import annotations

from qexport.runtime.speculation.cascade import NOT_ASKED, Cascade
from qexport.runtime.speculation.proposal import NOTHING, Effort, Proposal, Row
from qexport.runtime.speculation.terms import Terms


class Scripted:
    """Says what it is told to, and notes what it was asked."""

    def __init__(self, name, *answers, effort=None):
        self.name, self.effort, self.heard = name, effort or Effort(), []
        self._answers = [Proposal(tuple(ids), proposer=name) if ids else NOTHING for ids in answers]

    def begin(self, rows):
        self.heard.append(("begin", len(rows)))

    def keep(self, rows):
        self.heard.append(("keep", tuple(rows)))

    def propose(self, rows, most):
        self.heard.append(tuple(most))
        return self._answers


ROWS = [Row([1, 2], 1), Row([3, 4], 1), Row([5, 6], 1)]


def told(cascade, most=(5, 5, 5)):
    return [(found.proposer, found.ids) for found in cascade.propose(ROWS, most)]


def test_the_first_that_knows_something_counts_and_others_are_asked_for_the_rest():
    first, second, third = Scripted("a", [1], [], []), Scripted("b", [7], [2, 3], []), Scripted("c", [8], [8], [9])
    assert told(Cascade([first, second, third])) == [("a", (1,)), ("b", (2, 3)), ("c", (9,))]
    assert first.heard == [(5, 5, 5)]
    assert second.heard == [(NOT_ASKED, 5, 5)]
    assert third.heard == [(NOT_ASKED, NOT_ASKED, 5)]


def test_nobody_is_asked_when_all_rows_have_something():
    second = Scripted("b", [7], [7], [7])
    assert told(Cascade([Scripted("a", [1], [2], [3]), second])) == [("a", (1,)), ("a", (2,)), ("a", (3,))]
    assert second.heard == []


def test_a_token_to_spare_is_something():
    spare = Scripted("a")
    spare._answers = [Proposal(spare=4, proposer="a")] * 3
    second = Scripted("b", [7], [7], [7])
    assert [found.spare for found in Cascade([spare, second]).propose(ROWS, [0, 0, 0])] == [4, 4, 4]
    assert second.heard == []


def test_limits_hold_and_who_has_none_left_is_not_asked():
    terms = Terms(limits={"a": 0, "b": 2})
    first, second, third = Scripted("a", [1], [1], [1]), Scripted("b", [], [], []), Scripted("c", [8], [8], [8])
    assert told(Cascade([first, second, third], terms), (5, 1, 0)) == [("c", (8,))] * 3
    assert first.heard == []
    assert second.heard == [(2, 1, 0)]
    assert third.heard == [(5, 1, 0)]
    terms.limits = {}
    assert told(Cascade([first, second, third], terms))[0] == ("a", (1,))


def test_without_proposers_there_is_nothing():
    assert told(Cascade([])) == [("", ())] * 3


def test_all_hear_of_rows_and_their_effort_is_added_up():
    first, second = Scripted("a", effort=Effort(1.0, 2, 3, 4)), Scripted("b", effort=Effort(0.5, 1, 1, 1))
    cascade = Cascade([first, second])
    cascade.begin(ROWS)
    cascade.keep([2, 0])
    assert first.heard == second.heard == [("begin", 3), ("keep", (2, 0))]
    assert cascade.effort == Effort(1.5, 3, 4, 5)
    assert cascade.name == "a+b"
