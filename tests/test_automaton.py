"""The suffix automaton against a search that tries everything."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.runtime.speculation.automaton import ROOT, Automaton

TEXTS = st.integers(1, 4).flatmap(lambda most: st.lists(st.integers(0, most), max_size=40))


def ends(text, part):
    """Positions of the last tokens of all occurrences."""
    size = len(part)
    return [at + size - 1 for at in range(len(text) - size + 1) if text[at : at + size] == part]


def longest_before(text):
    """The longest suffix that also ends further left, and where it does so last."""
    for size in range(len(text) - 1, 0, -1):
        if found := ends(text, text[-size:])[:-1]:
            return size, found[-1]
    return 0, -1


@settings(deadline=None)
@given(TEXTS)
def test_the_longest_suffix_seen_before_and_its_latest_end_are_those_of_a_search(text):
    automaton = Automaton()
    for count, token in enumerate(text, 1):
        automaton.extend(token)
        assert (automaton.matched, automaton.before) == longest_before(text[:count])
    assert automaton.ids == text


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_reading_another_text_follows_its_longest_suffix_that_occurs(text, other):
    automaton = Automaton(text)
    state, length = ROOT, 0
    for count, token in enumerate(other, 1):
        state, length = automaton.step(state, length, token)
        read = other[:count]
        assert length == next(size for size in range(count, -1, -1) if not size or ends(text, read[-size:]))


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_the_promising_end_follows_the_most_frequent_continuation(text, other):
    automaton = Automaton(text)
    promising, (state, length) = automaton.promising(), (ROOT, 0)
    for count, token in enumerate(other, 1):
        state, length = automaton.step(state, length, token)
        if not length:
            continue
        part = other[count - length : count]
        end = promising[state]
        assert end in ends(text, part)
        for follower in text[end + 1 :]:
            often = Counter(text[at + 1] for at in ends(text, part) if at + 1 < len(text))
            assert often[follower] == max(often.values())
            part = [*part, follower]
        assert all(at + 1 == len(text) for at in ends(text, part))


@settings(deadline=None)
@given(TEXTS, st.integers(1, 39))
def test_a_text_that_grows_has_the_automaton_of_the_whole_text(text, cut):
    grown = Automaton(text[:cut])
    for token in text[cut:]:
        grown.extend(token)
    whole = Automaton(text)
    assert (grown.matched, grown.before, grown.promising()) == (whole.matched, whole.before, whole.promising())


@pytest.mark.parametrize("text", [[7] * 5000, [7, 8] * 2500, list(range(5000)), [n % 71 for n in range(5000)]])
def test_texts_of_all_kinds_have_few_states_and_matches_that_are_there(text):
    automaton = Automaton(text)
    assert len(automaton.promising()) < 2 * len(text)
    size, end = automaton.matched, automaton.before
    assert text[end + 1 - size : end + 1] == text[len(text) - size :]
    assert end < len(text) - 1 or not size
