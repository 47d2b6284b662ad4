"""A tiny target with a draft that resembles it, and ways to bend the loop that certification must find out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cached_models
import numpy as np
import pytest

from qexport.runtime.certifying.subject import Subject
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.distribution import draw
from qexport.runtime.sampling.noise import Purpose
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.session import SessionOptions
from qexport.runtime.speculation.draft import Draft
from qexport.runtime.speculation.rounds import Fixed, Rounds
from qexport.runtime.speculation.rules import Verdict, residual, verify

ONE = SessionOptions(threads=1)
CHECKER = Path(__file__).resolve().parents[1] / "samples/check_replay.py"


def load_checker():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("check_replay", CHECKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_pair(vocabulary, unlike=0.35):
    """Target and draft as files' bytes, and the target's weights; ``unlike`` is how far the draft is from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached_models, "VOCABULARY", vocabulary)
        target, draft = cached_models.Tiny(0), cached_models.Tiny(0)
        rng = np.random.default_rng(9)
        for name, weight in draft.weights.items():
            noise = unlike * rng.standard_normal(weight.shape) * np.abs(weight).mean()
            draft.weights[name] = (weight + noise).astype(np.float32)
        for model in (target, draft):
            model.weights["head"] = model.weights["head"] * 0.8
        files = [cached_models.serialized(cached_models.portable(model)) for model in (target, draft)]
    return files[0], files[1], target


def prompts_of(vocabulary, count=4):
    return [np.random.default_rng(index).integers(0, vocabulary, 3 + index).tolist() for index in range(count)]


@dataclass(frozen=True)
class Bent(Subject):
    """A loop made of other parts; each is the sound one unless it is given."""

    drafting: type[Draft] = field(default=Draft, kw_only=True)
    looping: type[Rounds] = field(default=Rounds, kw_only=True)
    choosing: type[Sampler] = field(default=Sampler, kw_only=True)

    def loop(self, way):
        if (self.looping, self.choosing) == (Rounds, Sampler):
            return super().loop(way)
        sampler = self.choosing(way.sampling)
        rounds = self.looping(self.target, sampler, self.proposer(way.proposer, sampler), Fixed(way.ahead))
        rounds.rule = self.rule
        return rounds

    def _draft(self, sampler):
        return self.drafting(self.draft, sampler, self.target.signature.vocabulary)


def subject(files, *, target=Decoder, draft=Decoder, **parts):
    """A pair whose loop runs on these kinds of decoders, and the truth on sound ones."""
    return Bent(target(files[0], ONE), Decoder(files[0], ONE), draft(files[1], ONE), Decoder(files[1], ONE), **parts)


def take(number, draft, target, token):
    return number * draft[token] < target[token]


def look(sampler, row, place, purpose):
    return sampler.number(row, place, purpose)


def see(sampler, logits, row, ahead):
    return sampler.chances(logits, row, ahead)


def as_it_is(value, *_):
    return value


@dataclass(frozen=True)
class Rejection:
    """The rule of rejection written once more, each part of which can be replaced by a wrong one."""

    take: Callable[..., bool] = take
    left: Callable[..., np.ndarray] = residual
    look: Callable[..., float] = look
    see: Callable[..., np.ndarray] = see
    rows: Callable[..., np.ndarray] = as_it_is
    end: Callable[..., Verdict] = as_it_is

    def __call__(self, proposal, logits, row, sampler):
        if proposal.chances is None or sampler.settings.greedy:
            return verify(proposal, logits, row, sampler)
        ids, logits = proposal.ids, self.rows(logits)
        for place, wanted in enumerate((*ids, proposal.spare)):
            target = self.see(sampler, logits[place], row, ids[:place])
            if wanted is None:
                return Verdict(place, (*ids, draw(target, self.look(sampler, row, place, Purpose.TOKEN))))
            draft = proposal.chances[place]
            if not self.take(self.look(sampler, row, place, Purpose.ACCEPT), draft, target, wanted):
                token = draw(self.left(target, draft), self.look(sampler, row, place, Purpose.RESIDUAL))
                return self.end(Verdict(place, (*ids[:place], token)), proposal)
        return self.end(Verdict(len(ids), (*ids, proposal.spare)), proposal)


class Drafting(Draft):
    """A draft that may draw from one distribution and tell another."""

    @staticmethod
    def draws(chances, sampler, scores, row, ids):
        return chances

    @staticmethod
    def tells(chances, sampler, scores, row, ids):
        return chances

    def propose(self, rows, most):
        self._chosen = {}
        return super().propose(rows, most)

    def _choose(self, logits, row, ids, chances):
        scores = self._fit(logits[0])
        if self._sampler.settings.greedy:
            ids.append(self._sampler.best(scores, row, ids))
            return
        given, more = self._sampler.chances(scores, row, ids), (self._sampler, scores, row, ids)
        chances.append(self.tells(given, *more))
        ids.append(draw(self.draws(given, *more), self._sampler.number(row, len(ids), Purpose.DRAFT)))


def drafting(**parts):
    return type("Bent", (Drafting,), {name: staticmethod(part) for name, part in parts.items()})
