"""Prove on the real loop that looking ahead changes nothing, or show where it does: what ``qexport certify`` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from qexport.errors import ModelInvalid, UsageError
from qexport.runtime.certifying import evidence, greedy, gtest, independence, whole
from qexport.runtime.certifying.certificate import NUMBERS, Certificate, Check, Test, judge
from qexport.runtime.certifying.evidence import Evidence
from qexport.runtime.certifying.exact import Grain, Tree, enumerate_tokens
from qexport.runtime.certifying.gtest import Fit
from qexport.runtime.certifying.log import Run, record, to_jsonl
from qexport.runtime.certifying.prompts import TEXTS
from qexport.runtime.certifying.subject import CASCADE, DRAFT, LOOKUP, PLAIN, UNROLLED, Subject, Way, make_rows
from qexport.runtime.certifying.trials import Arm, Counted, by_seed, count, references
from qexport.runtime.demands import demand_integer
from qexport.runtime.generation.models import Model, demand_pair
from qexport.runtime.sampling.noise import Purpose
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.session import MOST_THREADS, SessionOptions
from qexport.runtime.speculation.chains import Chains
from qexport.runtime.speculation.soundness import measure_soundness
from qexport.safe_io import digest_file

Stage = Callable[[str], AbstractContextManager[object]]

PROMPT = 12  # tokens of a prompt, at most
MANY = 1 << 30  # rounds
SOUND = "sound"
FIRM = 1e-4  # of an edge of truncation, see ``reference.Wanted``
FILES = ("model.onnx*", "engine.plan")
FEW = 2  # prompts of an arm
GRAIN = Grain()

PURE = Sampling(temperature=1.0)
TOP_K = Sampling(temperature=0.8, top_k=4)
TOP_P = Sampling(temperature=1.2, top_p=0.9)
PENALIZED = Sampling(temperature=1.0, min_p=0.05, repetition_penalty=1.3)
MIXED = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1)

ARMS = (
    Arm("temperature, 3 ahead", PURE, 3, DRAFT),
    Arm("temperature, 3 ahead in one call", PURE, 3, UNROLLED, share=0.5),
    Arm("temperature, 3 ahead by equality", PURE, 3, DRAFT, coupled=True, share=0.5),
    Arm("top-k, 2 ahead", TOP_K, 2, DRAFT),
    Arm("top-p, 4 ahead", TOP_P, 4, DRAFT, share=0.5),
    Arm("min-p and penalty, 1 ahead", PENALIZED, 1, DRAFT),
    Arm("copies, 3 ahead", TOP_K, 3, LOOKUP),
    Arm("copies or draft, now more, now fewer", PURE, 4, CASCADE, steady=False),
    Arm("one row alone, 4 ahead", PURE, 4, DRAFT, share=0.1, batch=1),
    Arm("control: plain decoding", PURE, 1, PLAIN),
)
LONG = (
    Way(PURE, 4, DRAFT),
    Way(MIXED, 2, DRAFT),
    Way(PURE, 3, UNROLLED),
    Way(PURE, 4, CASCADE, steady=False),
    Way(TOP_K, 4, LOOKUP),
    Way(MIXED, 3, DRAFT, coupled=True),
)
GREEDY = (
    Way(PURE, 1, DRAFT),
    Way(PURE, 3, DRAFT),
    Way(PURE, 8, DRAFT),
    Way(PURE, 4, UNROLLED),
    Way(PURE, 4, LOOKUP),
    Way(PURE, 4, CASCADE, steady=False),
)


_RANGES = (
    ("samples", 1, 10**7),
    ("seeds", 2, 10**6),
    ("rows", 1, 1024),
    ("length", 2, None),
    ("seed", 0, 2**62),
    ("threads", 0, MOST_THREADS),
)


@dataclass(frozen=True, slots=True)
class CertifyOptions:
    """The small choices.

    Attributes:
        samples: Of each joint distribution.
        seeds: Experiments that these are split into.
        rows: Of each batch of long texts.
        length: Tokens of each long text.
        level: The chance of a false alarm, of all tests together.
        seed: The first of all seeds.
        threads: Threads inside one operator; 0 lets onnxruntime choose.
        backend: What runs the target; ``None`` for what fits.
        draft_backend: The same of the draft.
        grain: How finely joint distributions are told apart.
        arms: Whose joint distributions are tested.
        long: How long texts are decoded.
        greedy: What is compared with plain decoding.
    """

    samples: int = 2000
    seeds: int = 50
    rows: int = 32
    length: int = 48
    level: float = 1e-3
    seed: int = 0
    threads: int = 0
    backend: str | None = None
    draft_backend: str | None = None
    grain: Grain = GRAIN
    arms: tuple[Arm, ...] = ARMS
    long: tuple[Way, ...] = LONG
    greedy: tuple[Way, ...] = GREEDY

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for what leaves nothing to test."""
        for name, least, most in _RANGES:
            demand_integer(name, getattr(self, name), least, most)
        if self.samples < FEW * self.seeds:
            what = f"{self.samples} samples are too few for {self.seeds} seeds, expected {FEW * self.seeds} or more"
            raise UsageError(what, hint="a seed needs a sample of every prompt")
        if not 0 < self.level < 1:
            raise UsageError(f"the level is {self.level}, expected a chance between 0 and 1")


@dataclass(frozen=True, slots=True)
class Certified:
    """A certificate with what it rests on.

    Attributes:
        certificate: The verdict.
        runs: Every decision of the long texts.
        files: Digests of both models, by the name of the file.
    """

    certificate: Certificate
    runs: tuple[Run, ...]
    files: dict[str, dict[str, str]]

    def log(self) -> str:
        """The replay log."""
        return to_jsonl(self.runs, self.files)


def certify(
    target: Path, draft: Path | None, options: CertifyOptions, texts: Sequence[str] = TEXTS, stage: Stage = nullcontext
) -> Certified:
    """Certify a pair of exports.

    Args:
        target: A folder that ``export`` or ``build`` wrote.
        draft: Another; without one, copies alone are certified.
        options: How much.
        texts: What is continued.
        stage: Entered with the name of what is done next.

    Raises:
        UsageError: A folder is missing, or an option is out of range.
        IntegrityError: A file is not the one that was published.
        DataInvalid: The tokenizers differ, or there are no prompts.
        ModelInvalid: No decoder, or one with too few positions.
        GateFailed: The loop does not end.
    """
    began = time.perf_counter()
    asked = ((target, options.backend), (draft, options.draft_backend))
    models = [
        Model(path, SessionOptions(threads=options.threads, backend=backend))
        for path, backend in asked
        if path is not None
    ]
    if draft is not None:
        demand_pair(*models)
    decoders = [model.decoder() for model in models for _ in range(2)]
    subject = Subject(*decoders[:2]) if draft is None else Subject(*decoders[:4], chains=_chains(models[1]))
    prompts = [ids[:PROMPT] for text in texts if (ids := models[0].folder.tokenizer.encode(text))]
    checks, runs = examine(subject, prompts, options, stage)
    if all(check.passed for check in checks if check.group == SOUND):
        with stage("generator"):
            checks.append(whole.compare(subject, models[0], models[1] if draft else None, runs[:-1]))
    paths = {"target": target} if draft is None else {"target": target, "draft": draft}
    files = {name: _digests(path) for name, path in paths.items()}
    told = {name: {"path": str(path), **files[name]} for name, path in paths.items()}
    seconds = time.perf_counter() - began
    found = Certificate(told["target"], told.get("draft"), options.level, tuple(checks), asdict(options), seconds)
    return Certified(found, tuple(runs), files)


def examine(
    subject: Subject, prompts: Sequence[Sequence[int]], options: CertifyOptions, stage: Stage = nullcontext
) -> tuple[list[Check], list[Run]]:
    """Make every check on a subject.

    Args:
        subject: A pair that is loaded.
        prompts: Tokens.
        options: How much.
        stage: Entered with the name of what is done next.
    """
    gtest.load_scipy()
    length = _length(subject, prompts, options.length)
    rng = np.random.default_rng(options.seed)
    with stage("greedy output"):
        checks = [_sound(subject)]
        compared = greedy.compare(subject, prompts, length, _possible(options.greedy, subject))
    counted: list[Counted] = []
    for place, arm in enumerate(_possible(options.arms, subject)):
        seeds = range(options.seed + place * options.seeds, options.seed + (place + 1) * options.seeds)
        with stage(f"joint distribution: {arm.name}"):
            counted.append(_counted(subject, arm, prompts, seeds, options))
    with stage("long texts"):
        runs = _long_runs(subject, prompts, length, options)
        found = evidence.gather(runs, subject, _noise(subject, runs, compared))
        runs.append(_greedy_run(subject, prompts, length))
    tests = [*map(_joint, counted), _by_seed(counted, rng)]
    tests.append(Test("outputs", "tokens of long texts", independence.outputs(found, rng)))
    tests += [Test(NUMBERS, name, fit) for name, fit in independence.used_numbers(found, rng) if fit.freedom]
    tests += [Test(NUMBERS, name, fit) for name, fit in independence.looked_up_numbers(options.seed)]
    return [*checks, _identity(compared), _decisions(found), *judge(tests, options.level)], runs


W = TypeVar("W", Arm, Way)


def _possible(ways: Sequence[W], subject: Subject) -> list[W]:
    """Those for which everything is there."""
    return [way for way in ways if subject.can(way.proposer)]


def _counted(
    subject: Subject, arm: Arm, prompts: Sequence[Sequence[int]], seeds: range, options: CertifyOptions
) -> Counted:
    """Prompts whose outcomes no rounding moves across an edge of truncation come first.

    No arm has the seeds of another: with the same numbers they would err alike, and a seed's p-value counts them all.
    """
    trees: list[Tree] = []
    for prompt in prompts:
        trees.append(enumerate_tokens(subject.truth, prompt, arm.sampling, options.grain, subject.draft_truth))
        if sum(tree.edge > FIRM for tree in trees) == FEW:
            break
    trees.sort(key=lambda tree: tree.edge <= FIRM)
    return count(subject, arm, trees[:FEW], seeds, options.samples)


def _joint(counted: Counted) -> Test:
    cells = sum(tree.chances.size for tree in counted.trees)
    return Test("joint", counted.arm.name, counted.fit(), {"cells": cells, "depth": counted.trees[0].depth})


def _by_seed(counted: Sequence[Counted], rng: np.random.Generator) -> Test:
    values = by_seed([arm for arm in counted if arm.arm.proposer != PLAIN], rng)
    fit = Fit(0.0, 0, gtest.uniformity(values), values.size)
    return Test("seeds", "p-values of seeds uniform", fit, {"values": np.sort(values).round(5).tolist()})


def _long_runs(subject: Subject, prompts: Sequence[Sequence[int]], length: int, options: CertifyOptions) -> list[Run]:
    sources = references(subject, prompts, length)
    return [
        record(
            subject,
            replace(way, sampling=replace(way.sampling, seed=options.seed + place)),
            make_rows(prompts, options.rows, sources if "lookup" in way.proposer else ()),
            length,
        )
        for place, way in enumerate(_possible(options.long, subject))
    ]


def _greedy_run(subject: Subject, prompts: Sequence[Sequence[int]], length: int) -> Run:
    """For the log."""
    proposer = LOOKUP if subject.draft is None else DRAFT
    return record(subject, Way(Sampling(), 3, proposer), make_rows(prompts, len(prompts)), length)


def _noise(subject: Subject, runs: Sequence[Run], compared: greedy.Identity) -> float:
    """That of both models."""
    if subject.draft_truth is None or not runs:
        return compared.noise
    rows = list(zip(runs[0].prompts, runs[0].outputs(), strict=True))[:FEW]
    return max(compared.noise, greedy.noise_of(subject.draft_truth, rows))


def _sound(subject: Subject) -> Check:
    found = measure_soundness(subject.truth)
    told = f"logits change by {found.leak:.2g} standard deviations with them"
    return Check(SOUND, "tokens behind do not matter", found.sound, told, details=asdict(found))


def _identity(found: greedy.Identity) -> Check:
    ties = sum(one.tie for one in found.differences)
    told = f"{found.same} of {found.rows} rows equal ({found.tokens} tokens), {ties} differ in a tie"
    if not found.passed:
        told += f", {len(found.differences) - ties} in no tie"
    told += f"; smallest margin {found.margin:.2g}, noise {found.noise:.2g}"
    return Check("greedy", "greedy output", found.passed, told, samples=found.tokens, details=asdict(found))


def _decisions(found: Evidence) -> Check:
    missed, near = found.missed(), sum(not reading.inside and reading.near for reading in found.readings)
    told = f"{len(found.readings)} recomputed, {near} near an edge, {found.unsure} left out near a cut"
    if missed:
        told += f", {len(missed)} wrong, first row {missed[0].row} at {missed[0].position}: {missed[0].purpose.name}"
    if found.broken:
        told += f", {len(found.broken)} broken, {found.broken[0]}"
    wrong = {purpose.name.lower(): sum(one.purpose is purpose for one in missed) for purpose in Purpose}
    details = {"near": near, "unsure": found.unsure, "broken": len(found.broken), "wrong": wrong}
    return Check(
        "decisions",
        "every decision recomputed",
        not missed and not found.broken,
        told,
        samples=len(found.readings),
        details=details,
    )


def _length(subject: Subject, prompts: Sequence[Sequence[int]], asked: int) -> int:
    """Tokens that there is room for."""
    if not prompts:
        raise UsageError("there are no prompts", hint="give a file with a text in each line")
    decoders = (subject.target, subject.draft)
    limits = [one.signature.positions for one in decoders if one is not None and one.signature.positions is not None]
    longest = max(map(len, prompts))
    found = min([asked, *(limit - longest - 1 for limit in limits)])
    if found < 2:
        raise ModelInvalid(f"{min(limits)} positions leave no room behind prompts of {longest} tokens")
    return found


def _chains(draft: Model) -> Chains | None:
    """The draft unrolled, where generation would do that after a while."""
    draft.note(MANY, failed=False)
    return draft.chains()


def _digests(folder: Path) -> dict[str, str]:
    """Of what is run, by name."""
    return {path.name: digest_file(path) for name in FILES for path in sorted(folder.glob(name))}
