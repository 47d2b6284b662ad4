"""Copies from references and from what a row has said: against a search that tries everything, and on a decoder."""

from __future__ import annotations

import numpy as np
import pytest
from cached_models import VOCABULARY, Tiny, portable, serialized
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.session import SessionOptions
from qexport.runtime.speculation import sources
from qexport.runtime.speculation.lookup import Lookup
from qexport.runtime.speculation.proposal import NOTHING, Proposal, Reference, Row, Span
from qexport.runtime.speculation.rounds import Fixed, Rounds
from qexport.runtime.speculation.sources import BEFOREHAND, DEEP, HARDLY, READ_BACK, STEP, History, IndexCache
from qexport.runtime.speculation.terms import Terms

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=30)


def costing(price, **terms):
    """Terms on which every token costs the same."""
    return Terms(costs=[price * count for count in range(101)], worth=1.5, **terms)


def free(**terms):
    """Everything is copied."""
    return costing(0, **terms)


def looked_up(row, *, terms=None, most=8, **options):
    """The first proposal for one row."""
    lookup = Lookup(terms or free(), **options)
    lookup.begin([row])
    return lookup.propose([row], [most])[0]


def row_of(ids, *references, prompt=1):
    return Row(list(ids), prompt, 0, tuple(Reference(name, tuple(text)) for name, text in references))


def longest_in(text, ids):
    """The longest suffix of ``ids`` in ``text``, and all places behind it."""
    for size in range(len(ids), 0, -1):
        places = [at + size for at in range(len(text) - size + 1) if list(text[at : at + size]) == ids[-size:]]
        if places:
            return size, places
    return 0, []


# ---------------------------------------------------------------- what is copied


@settings(deadline=None)
@given(TEXTS, st.integers(1, 30), st.integers(0, 12))
def test_a_row_goes_on_as_it_did_behind_the_latest_longest_match_and_then_repeats_itself(ids, prompt, most):
    found = looked_up(row_of(ids, prompt=min(prompt, len(ids))), most=most)
    size, start = 0, 0
    for tried in range(1, len(ids)):
        places = [at for at in range(tried, len(ids)) if ids[at - tried : at] == ids[-tried:]]
        size, start = (tried, places[-1]) if places else (size, start)
    if not size or not most:
        assert found is NOTHING
        return
    expected = list(ids)
    for place in range(most):
        expected.append(expected[start + place])
    copied = expected[len(ids) : len(ids) + len(found.ids)]
    assert found == Proposal(tuple(copied), proposer="lookup", span=Span("", start))
    assert copied


@settings(deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 12))
def test_a_reference_goes_on_behind_the_longest_match_and_the_span_says_where(text, ids, most):
    unseen = [token + 100 if token == ids[-1] else token for token in ids[:-1]]  # nothing matches in the row itself
    row = row_of([*unseen, ids[-1]], ("notes", text))
    found = looked_up(row, most=most)
    size, places = longest_in(text, row.ids)
    if all(place == len(text) for place in places):
        assert found is NOTHING
        return
    assert size
    start = found.span.start
    assert found.span.source == "notes"
    assert found.proposer == "reference"
    assert start in places
    assert found.ids == tuple(text[start : start + len(found.ids)])
    assert found.ids


def test_the_reference_that_goes_on_as_most_of_its_matches_do_is_followed():
    row = row_of([9, 1, 2], ("notes", [1, 2, 5, 1, 2, 6, 7, 1, 2, 6, 7]))
    assert looked_up(row).ids[:2] == (6, 7)


def test_of_several_texts_the_one_with_the_longest_match_is_copied():
    row = row_of([9, 1, 2, 3, 4], ("short", [3, 4, 5]), ("long", [2, 3, 4, 6]), ("shorter", [4, 7]))
    assert looked_up(row).span == Span("long", 3)


def test_matches_shorter_than_asked_for_are_not_copied():
    row = row_of([9, 1, 2], ("notes", [1, 2, 3]))
    assert looked_up(row, least=2).ids == (3,)
    assert looked_up(row, least=3) is NOTHING


def test_matches_reach_back_into_the_prompt():
    text = list(range(100, 200))
    row = row_of(text[:90], ("notes", text), prompt=90)
    lookup = Lookup()
    lookup.begin([row])
    lookup.propose([row], [4])
    assert lookup._rows[0].sources[0].matched == READ_BACK


# ---------------------------------------------------------------- how much is copied


COSTS = st.lists(st.floats(0, 0.5), min_size=1, max_size=12).map(lambda steps: [0.0, *np.cumsum(steps)])


@given(COSTS, st.integers(1, 12))
def test_a_copy_is_as_long_as_makes_the_most_of_it(costs, matched):
    text = list(range(50))
    chances = np.cumprod([BEFOREHAND[min(place, DEEP)] for place in range(matched, matched + len(costs) - 1)])
    chances = chances[chances >= HARDLY]
    worth = [0, *(np.cumsum(chances) - 1.5 * np.array(costs[1 : len(chances) + 1]))]
    found = looked_up(row_of([99, *text[:matched]], ("notes", text)), terms=Terms(costs=costs, worth=1.5), most=20)
    assert worth[len(found.ids)] == pytest.approx(max(worth))
    assert found is not NOTHING or max(worth) == pytest.approx(0)


def test_a_token_that_costs_more_than_it_promises_is_not_copied():
    row = row_of([99, 0], ("notes", list(range(50))))  # .15 is what the first promises
    assert looked_up(row, terms=costing(0.09)).ids == (1,)
    assert looked_up(row, terms=costing(0.11)) is NOTHING


def test_what_is_never_right_is_no_longer_copied_and_what_always_is_is_copied_further():
    rng = np.random.default_rng(0)
    wrong, right = row_of([1, 2, 3]), row_of([1, 2, 3] * 4)
    lookup = Lookup(costing(0.03))
    lookup.begin([wrong])
    offered = []
    for _ in range(150):  # short matches, then always a token that was not there yet
        wrong.ids += rng.choice(wrong.ids[-10:], 1).tolist()
        offered.append(len(lookup.propose([wrong], [16])[0].ids))
        wrong.ids.append(len(wrong.ids) + 100)
        lookup.propose([wrong], [16])
    assert max(offered[:5]) > 0
    assert max(offered[-20:]) == 0
    lookup.begin([right])
    first = len(lookup.propose([right], [64])[0].ids)
    for place in range(100):
        right.ids.append(right.ids[place % 3])
    assert first < len(lookup.propose([right], [64])[0].ids) == 64


def test_chances_move_by_a_step_towards_what_is_seen():
    history = History([5, 6, 5])
    history.follow(6)
    history.follow(7)
    assert history.chances[1] == pytest.approx(BEFOREHAND[1] + (1 - BEFOREHAND[1]) * STEP)
    assert history.chances[2] == pytest.approx(BEFOREHAND[2] * (1 - STEP))
    assert history.matched == 0


def test_in_a_batch_a_token_must_be_worth_the_time_of_all_rows():
    text = list(range(50))
    copying = [row_of([99, *text[:12]], ("notes", text)) for _ in range(3)]
    strange = [row_of(range(200, 210)) for _ in range(7)]

    def counts(rows, price):
        lookup = Lookup(costing(price))
        lookup.begin(rows)
        return [len(found.ids) for found in lookup.propose(rows, [8] * len(rows))]

    assert counts(copying, 0.25) == [8] * 3
    assert counts([*copying, *strange], 0.25) == [0] * 10  # .87 of 3 rows is less than .375 of 10
    assert counts([*copying, *strange[:2]], 0.25)[:3] == [5] * 3  # .64 of 3 is more than .375 of 5, .61 is less
    assert counts([*copying, *strange[:1]], 0.25)[:3] == [8] * 3
    assert counts([*copying, *strange], 0.1)[:3] == [8] * 3


def test_a_rival_that_does_better_than_a_copy_is_left_to_do_it():
    row = row_of([99, 1, 2], ("notes", [1, 2, 3]))  # one token, of chance .35
    lookup = Lookup(costing(0.1, rival=1.2))
    lookup.begin([row])
    assert lookup.propose([row], [8])[0].ids == (3,)
    lookup = Lookup(costing(0.1, rival=1.3))
    lookup.begin([row])
    assert lookup.propose([row], [8])[0] is NOTHING


def test_limits_hold_for_references_and_for_the_row_itself():
    row = row_of([1, 2, 3, 4, 1, 2, 3], ("notes", [2, 3, 7, 8, 9]))
    terms = free()
    lookup = Lookup(terms)
    lookup.begin([row])
    assert lookup.propose([row], [8])[0].span == Span("", 3)
    terms.limits["lookup"] = 0
    assert lookup.propose([row], [8])[0].span == Span("notes", 2)
    terms.limits["reference"] = 2
    assert lookup.propose([row], [8])[0].ids == (7, 8)
    assert lookup.propose([row], [0])[0] is NOTHING

    # ---------------------------------------------------------------- what is kept

    rows = [row_of([1, 2, 1], prompt=1), row_of([3, 4, 3, 4, 3], prompt=2), row_of([5, 6, 5], prompt=3)]
    lookup = Lookup(free())
    lookup.begin(rows)
    lookup.propose(rows, [2, 2, 2])
    lookup.keep([2, 1])
    rows = [rows[2], rows[1]]
    rows[0].ids.append(6)
    rows[1].ids += [4, 3]
    assert [found.ids for found in lookup.propose(rows, [2, 3])] == [(5, 6), (4, 3, 4)]


def test_a_row_that_went_back_is_read_anew():
    row = row_of([1, 2, 3, 1, 2])
    lookup = Lookup(free())
    lookup.begin([row])
    assert lookup.propose([row], [1])[0].ids == (3,)
    row.ids[3:] = [3]
    assert lookup.propose([row], [1])[0].span == Span("", 3)


def test_references_with_the_same_tokens_are_read_once(monkeypatch):
    indices = IndexCache()
    first = indices.find(Reference("a", (1, 2, 3)))
    assert indices.find(Reference("b", (1, 2, 3))) is first
    monkeypatch.setattr(sources, "KEPT", 7)
    second = indices.find(Reference("c", (4, 5, 6)))
    assert indices.find(Reference("a", (1, 2, 3))) is first
    indices.find(Reference("d", (7, 8)))
    assert indices.find(Reference("a", (1, 2, 3))) is first
    assert indices.find(Reference("c", (4, 5, 6))) is not second


# ---------------------------------------------------------------- on a decoder

TINY = Tiny(positions=200)
MODEL = serialized(portable(TINY))


def generate(rows, sampling, proposer, tokens=60):
    """Tokens of each row, and how many rounds it took."""
    rounds = Rounds(Decoder(MODEL, SessionOptions(threads=1)), Sampler(sampling), proposer, Fixed(6))
    rounds.begin(rows)
    count, going = 0, list(rows)
    while going:
        room = [tokens + row.prompt - len(row.ids) for row in going]
        stays = [place for place, left in enumerate(room) if left > 0]
        if len(stays) < len(going):
            going = [going[place] for place in stays]
            rounds.keep(stays) if going else None
            continue
        rounds.step(room)
        count += 1
    return [row.ids[row.prompt :] for row in rows], count


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.3, seed=4)], ids=["greedy", "drawn"])
def test_what_is_generated_does_not_depend_on_copies_and_true_references_make_it_quick(sampling):
    prompts = [[3, 1, 4, 1, 5], [2, 7, 1, 8], [1, 1, 1]]

    def rows(*references):
        return [Row(list(ids), len(ids), place, references) for place, ids in enumerate(prompts)]

    plain, calls = generate(rows(), sampling, None)
    texts = tuple(Reference(str(place), tuple(ids)) for place, ids in enumerate(plain))
    assert generate(rows(), sampling, Lookup())[0] == plain
    copied, fewer = generate(rows(*texts), sampling, Lookup(costing(0.01)))
    assert copied == plain
    assert calls == 59
    assert fewer < 25
    noise = Reference("noise", tuple(np.random.default_rng(0).integers(0, VOCABULARY, 300).tolist()))
    assert generate(rows(noise), sampling, Lookup(free()))[0] == plain
