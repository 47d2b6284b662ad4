"""Which samples a build uses for what: calibration, proof of equality, judgement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.data import Dataset, InputSpec, Sample, input_specs, open_dataset
from qexport.calibration.evaluation import open_evaluation
from qexport.errors import UsageError
from qexport.exporter.load import Source
from qexport.exporter.quality import Judge, take
from qexport.exporter.recipe import Recipe, needs

PROOF_SAMPLES = 4
MIN_HELD_OUT = 16
MAX_HELD_OUT = 512
FREE_AXIS = 16  # size of a free axis of generated inputs


@dataclass(frozen=True, slots=True)
class Rest:
    """The samples of a dataset after the first ``skip``, at most 512."""

    whole: Dataset
    skip: int

    @property
    def name(self) -> str:
        """What a report calls them."""
        return f"{self.whole.name}, samples after the first {self.skip}"

    @property
    def digest(self) -> str:
        """Digest of the whole, since the part follows from it."""
        return self.whole.digest

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Digests of the samples in order."""
        return self.whole.digests[self.skip : self.skip + MAX_HELD_OUT]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is doubtful about the whole."""
        return self.whole.warnings

    def __len__(self) -> int:
        return len(self.digests)

    def __iter__(self) -> Iterator[Sample]:
        return islice(iter(self.whole), self.skip, self.skip + MAX_HELD_OUT)


@dataclass(frozen=True, slots=True)
class Samples:
    """The data of one build.

    Attributes:
        calibration: What ranges are measured on; ``None`` for recipes without calibration.
        judge: What the result is judged on; ``None`` without any data.
        proof: Inputs of the equality proofs, batch axis first.
        warnings: What is doubtful about all of it.
    """

    calibration: Dataset | None
    judge: Judge | None
    proof: tuple[dict[str, NDArray[Any]], ...]
    warnings: tuple[str, ...]


def open_samples(source: Source, recipe: Recipe, calib: str | Path | None, evaluation: str | Path | None) -> Samples:
    """Open the data and share it out.

    Raises:
        UsageError: The recipe calibrates and there is no data; random data is never made up for it.
    """
    inputs = input_specs(source.model)
    if calib is None and needs(recipe, "data"):
        raise UsageError(
            f"recipe {recipe.name!r} needs calibration data",
            hint="give real samples with --calib FILE; none are made up",
        )
    tokenizer = source.tokenizer
    data = None if calib is None else open_dataset(calib, inputs, recipe.data, tokenizer=tokenizer)
    judge: Judge | None
    if evaluation is not None:
        judged = open_evaluation(evaluation, inputs, recipe.data, tokenizer=tokenizer)
        judge = Judge(judged.dataset, judged.task, held_out=data is None or _apart(data, judged.dataset))
    else:
        judge = None if data is None else _held_out(data, recipe)
    known = judge.data if judge is not None else data
    proof = tuple(take(known, PROOF_SAMPLES)) if known is not None else (_generated(inputs),)
    return Samples(data, judge, proof, tuple(_warnings(data, judge)))


def _apart(data: Dataset, judged: Dataset) -> bool:
    return set(data.digests).isdisjoint(judged.digests)


def _held_out(data: Dataset, recipe: Recipe) -> Judge:
    """Judge by samples that calibration leaves over, if there are enough; by its own samples otherwise."""
    used = max((int(step.options.get("samples", 512)) for step in recipe.step if step.pass_ == "calibrate"), default=0)
    if len(data) - used >= MIN_HELD_OUT:
        return Judge(Rest(data, used), None, held_out=True)
    return Judge(data, None, held_out=used == 0)


def _generated(inputs: tuple[InputSpec, ...]) -> dict[str, NDArray[Any]]:
    """Ones for integers, a fixed normal sample for floats; only for proofs of equality, never for ranges."""
    rng = np.random.default_rng(0)

    def make(spec: InputSpec) -> NDArray[Any]:
        shape = [1 if i == 0 and size is None else size or FREE_AXIS for i, size in enumerate(spec.shape)]
        if spec.dtype.kind == "f":
            return rng.standard_normal(shape).astype(spec.dtype)
        return np.ones(shape, spec.dtype)

    return {spec.name: make(spec) for spec in inputs}


def _warnings(data: Dataset | None, judge: Judge | None) -> Iterator[str]:
    if data is not None:
        yield from (f"calibration data: {doubt}" for doubt in data.warnings)
    if judge is None:
        yield "no data: quality was not measured; give --eval"
    elif not judge.held_out:
        yield "quality was measured on samples that calibration has seen too; give held-out ones with --eval"
