"""Which samples a build uses for what: calibration, proof of equality, judgement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.reading.batching import batches
from qexport.calibration.reading.data import (
    Dataset,
    DataSpec,
    FileDataset,
    InputSpec,
    Sample,
    input_specs,
    open_dataset,
)
from qexport.calibration.reading.evaluation import open_evaluation
from qexport.calibration.reading.given import Data, suffix_of
from qexport.calibration.reading.spec import scores_tokens, static_batch, unfed_input
from qexport.calibration.reading.tasks import Perplexity
from qexport.calibration.reading.text import READERS
from qexport.calibration.reading.windows import SUFFIX as WINDOWED
from qexport.calibration.reading.windows import WindowSource
from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.vocabulary import check_vocabulary, count_words
from qexport.exporter.load import Source
from qexport.exporter.proof.layout import Feeds, fill
from qexport.exporter.proof.quality import Judge, take
from qexport.exporter.recipe import Recipe, derived_options, needs
from qexport.exporter.steps import find_pass
from qexport.passes.portable import MASK, MAX_POSITIONS, parse_positions

PROOF_SAMPLES = 4
PROOF_WINDOW = 64  # samples among which different lengths are looked for
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
        return f"{self.whole.name}, samples after the first {self.skip}" if self.skip else self.whole.name

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
        made_up: Whether those are not real.
        warnings: What is doubtful about all of it, after what was done about the model when it was read.
    """

    calibration: Dataset | None
    judge: Judge | None
    proof: tuple[Feeds, ...]
    made_up: bool
    warnings: tuple[str, ...]


def open_samples(source: Source, recipe: Recipe, calib: Data | None, evaluation: Data | None) -> Samples:
    """Open the data and share it out.

    Raises:
        UsageError: The recipe calibrates and there is no data; random data is never made up for it.
        ModelInvalid: There is data, and an input that it cannot fill.
        DataInvalid: The data does not fit the model, or is text and the tokenizer has more tokens than the model.
    """
    if calib is None and needs(recipe, "data"):
        raise UsageError(
            f"recipe {recipe.name!r} needs calibration data",
            hint="give real samples with --calib FILE; none are made up",
        )
    unfed = unfed_input(source.model)
    if unfed is not None and calib is None and evaluation is None:
        notes = (*source.notes, f"equality was not proven: the input {unfed!r} cannot be fed")
        return Samples(None, None, (), made_up=False, warnings=(*notes, *_warnings(None, None)))
    inputs = input_specs(source.model)
    tokenizer = source.tokenizer
    texts = [data for data in (calib, evaluation) if suffix_of(data) in READERS]
    words = count_words(source.model)
    if texts and words is not None and tokenizer is not None and recipe.data.tokenizer is None:
        check_vocabulary(Folder(tokenizer.parent), words)
    data = None
    if calib is not None:
        data = open_dataset(calib, inputs, data_spec(source.model, recipe, calib), tokenizer=tokenizer)
    judge: Judge | None
    if evaluation is not None:
        judged = open_evaluation(evaluation, inputs, data_spec(source.model, recipe, evaluation), tokenizer=tokenizer)
        judge = Judge(judged.dataset, judged.task, held_out=data is None or _apart(data, judged.dataset))
    else:
        judge = None if data is None else _held_out(data, recipe)
    known = judge.data if judge is not None else data
    proof = _generated(inputs) if known is None else _proof(known, inputs)
    return Samples(data, judge, tuple(proof), known is None, (*source.notes, *_warnings(data, judge)))


def data_spec(model: ir.Model, recipe: Recipe, path: Data) -> DataSpec:
    """How one file is read: the recipe's data section, with what follows from the model.

    Plain text for a model that scores the next token becomes windows, unless the recipe says otherwise.
    """
    windows = recipe.data.windows
    if windows is None:
        windows = scores_tokens(model) and suffix_of(path) == WINDOWED
    return recipe.data.model_copy(update={"max_length": longest(model, recipe), "windows": windows})


def longest(model: ir.Model, recipe: Recipe) -> int:
    """Tokens at most: what the recipe says, and no more than the model has positions for; ``ModelInvalid`` as there."""
    return min(recipe.data.max_length, positions(model) or recipe.data.max_length)


def positions(model: ir.Model) -> int | None:
    """The longest sequence that the model has positions for; ``None`` where its metadata does not say.

    Raises:
        ModelInvalid: The metadata holds something else than a number of positions.
    """
    told = model.metadata_props.get(MAX_POSITIONS)
    if told is None:
        return None
    found = parse_positions(told)
    if found is None:
        raise ModelInvalid(
            f"{MAX_POSITIONS} is {told!r}, expected a number above 0",
            where="metadata of the model",
            hint="remove the entry, or export the model again",
        )
    return found


def calibration_passes(recipe: Recipe) -> list[int]:
    """Return how many samples each enabled calibrating step asks for; ``UsageError`` where its pass refuses that."""
    found, derived = [], derived_options(recipe)
    for step in recipe.step:
        cls = find_pass(step.pass_, recipe.name)
        fields = cls.options()
        if step.enabled and {"data", "samples"} <= set(fields):
            told = step.options.get("samples", derived.get("samples", fields["samples"].default))
            asked: Mapping[str, object] = {"samples": told}
            cls(**asked)
            found.append(int(str(told)))
    return found


def _apart(data: Dataset, judged: Dataset) -> bool:
    return set(data.digests).isdisjoint(judged.digests)


def _held_out(data: FileDataset, recipe: Recipe) -> Judge:
    """Judge by samples that calibration leaves over, if there are enough; by its own samples otherwise."""
    used = max(calibration_passes(recipe), default=0)
    task = Perplexity() if isinstance(data.source, WindowSource) else None  # running text has its labels in itself
    if len(data) - used >= MIN_HELD_OUT:
        return Judge(Rest(data, used), task, held_out=True)
    return Judge(data, task, held_out=used == 0)


def _proof(known: Dataset, inputs: tuple[InputSpec, ...]) -> Iterator[Feeds]:
    """A few samples by themselves and, for models with an attention mask, one padded batch of different lengths."""
    rows = static_batch(inputs)
    yield from take(known, PROOF_SAMPLES, rows)
    if rows == 1 or not any(entry.name == MASK and len(entry.shape) > 1 for entry in inputs):
        return
    lengths = {sample[MASK].shape[-1]: sample for sample in islice(known, PROOF_WINDOW)}
    spread = np.linspace(0, len(lengths) - 1, min(rows or PROOF_SAMPLES, PROOF_SAMPLES)).astype(int)
    chosen = [lengths[sorted(lengths)[place]] for place in np.unique(spread)]
    yield from (fill(feeds, rows) for indices, feeds in batches(chosen, PROOF_SAMPLES) if len(indices) > 1)


def _generated(inputs: tuple[InputSpec, ...]) -> Iterator[Feeds]:
    """Ones for integers, a fixed normal sample for floats, once more with the end masked where there is a mask.

    Only for proofs of equality, never for ranges.
    """
    rng = np.random.default_rng(0)

    def make(spec: InputSpec) -> NDArray[Any]:
        shape = [1 if i == 0 and size is None else size or FREE_AXIS for i, size in enumerate(spec.shape)]
        if spec.dtype.kind == "f":
            return rng.standard_normal(shape).astype(spec.dtype)
        return np.ones(shape, spec.dtype)

    feeds = {spec.name: make(spec) for spec in inputs}
    yield feeds
    if MASK in feeds and feeds[MASK].ndim > 1:
        mask = feeds[MASK].copy()
        mask[..., max(1, mask.shape[-1] * 3 // 4) :] = 0
        yield {**feeds, MASK: mask}


def _warnings(data: Dataset | None, judge: Judge | None) -> Iterator[str]:
    if data is not None:
        yield from (f"calibration data: {doubt}" for doubt in data.warnings)
    if judge is None:
        yield "no data: quality was not measured; give --eval"
    elif not judge.held_out:
        seen = set() if data is None else set(data.digests)
        count, total = sum(digest in seen for digest in judge.data.digests), len(judge.data)
        which = "" if count == total else f", {count} of {total}"
        yield f"quality is measured on samples that calibration has seen too{which}; give held-out ones with --eval"
