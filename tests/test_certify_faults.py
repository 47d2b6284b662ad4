"""Faults of speculative decoding, planted in the real loop one by one: certification finds each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from certified_pairs import Rejection, drafting, prompts_of, subject, tiny_pair

from qexport.errors import GateFailed
from qexport.runtime.certifying.certify import PENALIZED, PURE, TOP_K, CertifyOptions, examine
from qexport.runtime.certifying.exact import Grain
from qexport.runtime.certifying.subject import DRAFT, Way
from qexport.runtime.certifying.trials import Arm
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.distribution import draw
from qexport.runtime.sampling.noise import Purpose, uniform
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation.draft import Draft
from qexport.runtime.speculation.proposal import Proposal
from qexport.runtime.speculation.rounds import Rounds
from qexport.runtime.speculation.rules import Verdict, equality, verify

SMALL, LARGE = 6, 50  # vocabularies: the small one is enumerated whole
pair = cache(tiny_pair)


@dataclass(frozen=True)
class Fault:
    """What is planted, where it shows, and by how many samples."""

    parts: dict
    found_by: tuple[str, ...]
    samples: int = 200
    ahead: int = 1
    sampling: Sampling = PURE
    vocabulary: int = SMALL
    long: int = 3
    only: bool = field(default=False, kw_only=True)


def swapped(number, draft, target, token):
    return number * target[token] < draft[token]


def typical(number, draft, target, token):
    """Medusa's: tokens that are likely enough are taken."""
    entropy = -(target * np.log(target + 1e-30)).sum()
    return target[token] > min(0.09, 0.3 * np.exp(-entropy))


def sharing(one, other):
    """The number of one purpose is that of another."""
    return lambda sampler, row, place, purpose: sampler.number(row, place, other if purpose is one else purpose)


def once_a_round(sampler, row, place, purpose):
    return sampler.number(row, 0 if purpose is Purpose.ACCEPT else place, purpose)


def whole(sampler, scores, row, ahead):
    """Nothing is left out."""
    return Sampler(replace(sampler.settings, top_k=0)).chances(scores, row, ahead)


def untold(chances, sampler, scores, row, ids):
    return whole(sampler, scores, row, ids)


def colder(chances, sampler, scores, row, ids):
    return Sampler(replace(sampler.settings, temperature=0.7)).chances(scores, row, ids)


def without_bonus(verdict, proposal):
    """All tokens were taken, the one behind them is lost."""
    taken = proposal.ids and verdict.accepted == len(proposal.ids)
    return Verdict(verdict.accepted, verdict.tokens[:-1]) if taken else verdict


def one_back(verdict, proposal):
    """The same, and the round does not count its last token as taken: only what is drawn next has another number."""
    taken = proposal.ids and verdict.accepted == len(proposal.ids)
    return Verdict(verdict.accepted - 1, verdict.tokens[:-1]) if taken else verdict


def openvino(proposal, logits, row, sampler):
    """The target's own token y decides by p(x) / q(y), and after a rejection that of the next place is used."""
    if proposal.chances is None or sampler.settings.greedy:
        return verify(proposal, logits, row, sampler)
    ids = proposal.ids

    def chances(place):
        return sampler.chances(logits[place], row, ids[:place])

    def own(place):
        return draw(chances(place), sampler.number(row, place, Purpose.TOKEN))

    for place, wanted in enumerate(ids):
        number = int(101 * sampler.number(row, place, Purpose.ACCEPT)) / 100
        if number >= proposal.chances[place][wanted] / chances(place)[own(place)]:
            return Verdict(place, (*ids[:place], own(place + 1)))
    return Verdict(len(ids), (*ids, own(len(ids))))


def lenient(proposal, logits, row, sampler):
    """Greedy proposals may be the second best."""
    if not sampler.settings.greedy:
        return verify(proposal, logits, row, sampler)
    best = np.argsort(-logits, axis=1)
    taken = next((place for place, token in enumerate(proposal.ids) if token not in best[place, :2]), len(proposal.ids))
    return Verdict(taken, (*proposal.ids[:taken], int(best[taken, 0])))


class Stays(Decoder):
    """Rejected tokens stay in the cache."""

    def rollback(self, lengths):
        pass


class TooFar(Decoder):
    """One token too many is taken back."""

    def rollback(self, lengths):
        super().rollback([max(0, length - 1) for length in lengths])


class TooShort(Decoder):
    """One token too few is."""

    def rollback(self, lengths):
        super().rollback([min(asked + 1, now) for asked, now in zip(lengths, self.lengths.tolist(), strict=True)])


class Forgetful(Rounds):
    """The token behind a proposal that was taken whole is given out, but the row does not have it."""

    def _commit(self, outcomes):
        for row, found in zip(self.rows, outcomes, strict=True):
            whole = found.proposal.ids and found.accepted == len(found.proposal.ids)
            row.ids.extend(found.tokens[:-1] if whole else found.tokens)


class OneStream(Sampler):
    """All rows share their numbers."""

    def number(self, row, ahead, purpose):
        return uniform(self.settings.seed, 0, len(row.ids) + ahead, purpose)


class OneSeed(Sampler):
    """The seed is not looked at."""

    def number(self, row, ahead, purpose):
        return uniform(0, row.stream, len(row.ids) + ahead, purpose)


class Timid(Draft):
    """Stops before a token that it is not sure of, after having drawn it."""

    def propose(self, rows, most):
        return [self._cut(proposal) for proposal in super().propose(rows, most)]

    def _cut(self, proposal):
        if proposal.chances is None:
            return proposal
        sure = [proposal.chances[place, token] >= 0.2 for place, token in enumerate(proposal.ids)]
        if all(sure):
            return proposal
        count = sure.index(False)
        return Proposal(proposal.ids[:count], proposal.chances[: count + 1], None, proposal.proposer)


TRUNCATED = {"sampling": TOP_K, "ahead": 2, "vocabulary": LARGE}
BOTH = ("decisions", "joint")
FAULTS = {
    "ratio upside down": Fault({"rule": Rejection(take=swapped)}, (*BOTH, "outputs", "numbers"), long=24),
    "acceptance has the draft's number": Fault(
        {"rule": Rejection(look=sharing(Purpose.ACCEPT, Purpose.DRAFT))}, (*BOTH, "numbers"), 900, long=24
    ),
    "residual has acceptance's number": Fault(
        {"rule": Rejection(look=sharing(Purpose.RESIDUAL, Purpose.ACCEPT))}, ("decisions",)
    ),
    "residual has the draft's number": Fault(
        {"rule": Rejection(look=sharing(Purpose.RESIDUAL, Purpose.DRAFT))}, ("decisions",)
    ),
    "one number for all acceptances of a round": Fault({"rule": Rejection(look=once_a_round)}, ("decisions",)),
    "target is not truncated": Fault({"rule": Rejection(see=whole)}, BOTH, **TRUNCATED),
    "draft tells what is not truncated": Fault({"drafting": drafting(tells=untold)}, BOTH, 1800, **TRUNCATED),
    "draft draws from what is not truncated": Fault({"drafting": drafting(draws=untold)}, BOTH, 1800, **TRUNCATED),
    "draft draws at another temperature": Fault({"drafting": drafting(draws=colder)}, ("decisions",)),
    "residual is the target's distribution": Fault({"rule": Rejection(left=lambda target, draft: target)}, BOTH, 1400),
    "residual is the draft's distribution": Fault({"rule": Rejection(left=lambda target, draft: draft)}, BOTH),
    "bonus is lost": Fault({"rule": Rejection(end=without_bonus)}, BOTH, 3000),
    "bonus is lost and counted": Fault({"rule": Rejection(end=one_back)}, ("decisions",)),
    "bonus is given out and forgotten": Fault({"looping": Forgetful}, ("decisions",)),
    "openvino's rule": Fault({"rule": openvino}, BOTH),
    "typical acceptance": Fault({"rule": Rejection(take=typical)}, BOTH, 400),
    "logits of the row before": Fault({"rule": Rejection(rows=lambda logits: np.roll(logits, 1, axis=0))}, BOTH),
    "penalty does not see what was proposed": Fault(
        {"rule": Rejection(see=lambda sampler, logits, row, ahead: sampler.chances(logits, row, ()))},
        ("decisions",),
        sampling=PENALIZED,
        ahead=3,
        vocabulary=LARGE,
        long=16,
    ),
    "target takes nothing back": Fault({"target": Stays}, ("decisions", "greedy")),
    "target takes too much back": Fault({"target": TooFar}, ("decisions", "greedy")),
    "target takes too little back": Fault({"target": TooShort}, ("decisions", "greedy")),
    "draft takes nothing back": Fault({"draft": Stays}, ("decisions",)),
    "unsure drafts are dropped": Fault({"drafting": Timid}, ("joint",), 1700, only=True),
    "rows share their numbers": Fault({"choosing": OneStream}, (*BOTH, "seeds")),
    "seeds are not looked at": Fault({"choosing": OneSeed}, ("joint", "seeds"), 300),
    "greedy takes the second best": Fault({"rule": lenient}, ("greedy",), only=True),
}


def failures(parts, *, samples, ahead=1, sampling=PURE, vocabulary=SMALL, long=3):
    """Groups of checks that fail."""
    files = pair(vocabulary)
    options = CertifyOptions(
        samples=samples,
        seeds=10,
        rows=long,
        length=24,
        grain=Grain(3, min(vocabulary, 6) if sampling is not TOP_K else 4),
        arms=(Arm("draft", sampling, ahead, DRAFT),),
        long=(Way(sampling, max(ahead, 2), DRAFT),),
        greedy=(Way(sampling, 3, DRAFT),),
    )
    checks, _ = examine(subject(files, **parts), prompts_of(vocabulary), options)
    return {check.group for check in checks if not check.passed}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    fault = FAULTS[name]
    found = failures(
        fault.parts,
        samples=fault.samples,
        ahead=fault.ahead,
        sampling=fault.sampling,
        vocabulary=fault.vocabulary,
        long=fault.long,
    )
    assert set(fault.found_by) <= found
    if fault.only:
        assert found == set(fault.found_by)


@pytest.mark.parametrize(("sampling", "vocabulary"), [(PURE, SMALL), (TOP_K, LARGE), (PENALIZED, LARGE)])
def test_the_same_loop_without_a_fault_is_not(sampling, vocabulary):
    sound = {"rule": Rejection(), "drafting": drafting(), "looping": type("Same", (Rounds,), {})}
    assert failures(sound, samples=1000, ahead=2, sampling=sampling, vocabulary=vocabulary, long=8) == set()


def test_another_lossless_rule_differs_in_its_decisions_alone():
    found = failures({"rule": equality}, samples=1000, long=8)
    assert "decisions" in found
    assert found <= {"decisions", "numbers"}


def test_a_loop_that_does_not_go_on_is_no_certificate():
    def nothing(proposal, logits, row, sampler):
        return Verdict(0, ())

    with pytest.raises(GateFailed, match="gave row 0 no token"):
        failures({"rule": nothing}, samples=20)
