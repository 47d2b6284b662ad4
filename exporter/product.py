"""What a recipe makes of a model, and the same again with some nodes kept in float."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from qexport.calibration.statistics.store import Store
from qexport.exporter.load import Source
from qexport.exporter.options import Advance, BuildOptions
from qexport.exporter.proof.equality import EqualityProof
from qexport.exporter.recipe import Recipe, instantiate
from qexport.exporter.samples import Samples, calibration_passes
from qexport.exporter.threads import OneThread
from qexport.passes.base import Pass
from qexport.passes.pipeline import Step, run
from qexport.safe_io import Cache

KEEP = "keep"  # the option of quantizing passes that names nodes to leave in float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The model before the first pass that quantizes, and what is still to be run over it.

    Attributes:
        model: As it was then, with all that calibration has left on it.
        steps: The passes from there on.
        before: How many passes came before.
    """

    model: ir.Model
    steps: tuple[tuple[str, Pass], ...]
    before: int


@dataclass(frozen=True, slots=True)
class Product:
    """What the recipe made of a model.

    Attributes:
        model: The result.
        steps: One record per pass.
        proofs: Per pass, the worst relative error against the step before, where it had to be equal.
        plain: The model before the first pass that changes numbers.
        warnings: What could not be proven, and what went wrong in the cache.
        snapshot: Where to start again with another choice of nodes; ``None`` where nothing quantizes.
    """

    model: ir.Model
    steps: tuple[Step, ...]
    proofs: tuple[float | None, ...]
    plain: ir.Model
    warnings: tuple[str, ...] = ()
    snapshot: Snapshot | None = None

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the nodes that the passes behind the snapshot have quantized."""
        if self.snapshot is None:
            return ()
        behind = self.steps[self.snapshot.before :]
        return tuple(dict.fromkeys(d.node for s in behind for d in s.decisions if d.action == "quantized" and d.node))


@dataclass(slots=True)
class _Watch:
    """A pipeline observer that clones the model before the first pass that quantizes."""

    seen: int = 0
    model: ir.Model | None = None

    def before(self, name: str, step: Pass, model: ir.Model) -> None:
        """Clone once."""
        if self.model is None and step.quantizes:
            self.model = model.clone()
        self.seen += self.model is None

    def after(self, step: Step, model: ir.Model) -> None:
        """Nothing to do."""


def run_recipe(
    source: Source, recipe: Recipe, samples: Samples, asked: BuildOptions, cache: Cache | None = None
) -> Product:
    """Run the passes over a clone, each exact one followed by its proof of equality.

    ``cache`` is the one of the build, if it has one already.
    """
    proof, watch = EqualityProof(samples.proof, samples.made_up), _Watch()
    size = 0 if samples.calibration is None else len(samples.calibration)
    total = sum(min(size, asked_for) for asked_for in calibration_passes(recipe)) or None
    threads, store = OneThread(), Store(cache or asked.open_cache())
    with asked.progress.stage("recipe", total) as advance, threads:
        steps = steps_of(recipe, samples, store, advance)
        model, records = run(source.model, steps, [proof, watch, threads])
    plain = proof.before_inexact or model
    snapshot = None if watch.model is None else Snapshot(watch.model, tuple(steps[watch.seen :]), watch.seen)
    warnings = (*store.cache.doubts, *proof.warnings)
    return Product(model, tuple(records), tuple(proof.errors), plain, warnings, snapshot)


def steps_of(
    recipe: Recipe, samples: Samples, store: Store, advance: Advance = lambda n=1: None
) -> list[tuple[str, Pass]]:
    """The enabled passes of a recipe with what they need to run."""
    return instantiate(recipe, {"data": samples.calibration, "advance": advance, "store": store})


def requantize(product: Product, samples: Samples, keep: Collection[str]) -> Product:
    """Run the passes behind the snapshot again with the nodes called ``keep`` left in float."""
    snapshot = product.snapshot
    if snapshot is None:
        return product
    old = product.steps[snapshot.before :]
    steps = [(name, _keeping(step, record, keep)) for (name, step), record in zip(snapshot.steps, old, strict=True)]
    proof = EqualityProof(samples.proof)
    with OneThread() as threads:
        model, records = run(snapshot.model, steps, [proof, threads])
    before = snapshot.before
    return replace(
        product,
        model=model,
        steps=(*product.steps[:before], *records),
        proofs=(*product.proofs[:before], *proof.errors),
    )


def _keeping(step: Pass, record: Step, keep: Collection[str]) -> Pass:
    """The pass with those nodes kept in float that it would quantize by itself."""
    mine = tuple(d.node for d in record.decisions if d.action == "quantized" and d.node in keep)
    return with_kept(step, mine)


def with_kept(step: Pass, names: Collection[str]) -> Pass:
    """The pass with ``names`` added to its option ``keep``, if it quantizes and has one."""
    if not names or not can_keep(step):
        return step
    options: Mapping[str, object] = {KEEP: (*getattr(step, KEEP), *names)}
    return replace(step, **options)  # type: ignore[type-var]  # every pass is a frozen dataclass


def can_keep(step: Pass) -> bool:
    """Whether a pass quantizes and can be told to leave nodes in float."""
    return step.quantizes and KEEP in step.options()
