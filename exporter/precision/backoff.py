"""Never worse: int8 that breaks a gate or is measured slower than float goes back to float, region by region.

1. Gates: regions are ordered by the error that each of them causes alone, and as few as the gates need go, worst first
   (a binary search over how many, each tried for real).
2. Speed, on the target's own runtime: the runtime's profile says which regions take longer than in float. These go
   first; then, while the whole is still slower than float, what wins least; at last everything. The fastest counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from qexport.errors import GateFailed
from qexport.exporter.outcome.result import BackedOff, Latency, Quality, Tried
from qexport.exporter.precision.costs import Cost
from qexport.exporter.precision.regions import Region, find_regions
from qexport.exporter.precision.tried import Remembering
from qexport.exporter.product import Product
from qexport.exporter.proof.gates import check_gates
from qexport.exporter.recipe import GatesSpec
from qexport.passes.base import Decision
from qexport.passes.quantize import KEPT

SLOWER = 0.97  # median speed below which a result counts as slower than float, whatever the spread
COST = 1.1  # how much slower than float a region must be, where the whole is faster
SHARE = 0.03  # and how much of the whole's time it must waste
GAIN = 1.02  # what backing off must win by then
MAX_ROUNDS = 4  # of speed; quality needs the logarithm of the number of regions
IN_VAIN = "no choice of int8 regions, nor none of them, was measured as fast as the model as it came"
TOO_BAD, TOO_SLOW = "backed off: outside the gates", "backed off: slower than float"


Priced = tuple[Region, Cost | None]


class Bench(Protocol):
    """Makes and measures results."""

    def again(self, keep: Collection[str]) -> Product:
        """Run the recipe again from where it began to quantize, with the nodes called ``keep`` in float."""

    def judge(self, product: Product) -> Quality | None:
        """Compare with the model as it came; ``GateFailed`` where the result is not finite."""

    def time(self, product: Product) -> Latency | None:
        """Measure in turn with the model as it came."""

    def errors(self, regions: Sequence[Region]) -> list[float]:
        """The output error that each region causes when it alone is quantized."""

    def costs(self, product: Product, regions: Sequence[Region]) -> list[Cost]:
        """What each region takes in float and in the product."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A product and what was found out about it.

    Attributes:
        product: What was made.
        quality: How good it is.
        latency: How fast it is.
        backed_off: The regions that went back to float, and why.
        remarks: What was tried in vain.
        tried: The other choices that were judged or timed.
    """

    product: Product
    quality: Quality | None = None
    latency: Latency | None = None
    backed_off: tuple[BackedOff, ...] = ()
    remarks: tuple[str, ...] = ()
    tried: tuple[Tried, ...] = ()

    @property
    def kept(self) -> frozenset[str]:
        """Names of all nodes that went back to float."""
        return frozenset(name for entry in self.backed_off for name in entry.nodes)


def settle(product: Product, bench: Bench, gates: GatesSpec, *, never_worse: bool = True) -> Trial:
    """Judge and time a product; with ``never_worse``, take back what makes it worse than float.

    Raises:
        GateFailed: The gates do not hold, with nothing quantized neither.
    """
    memory = Remembering(bench)
    trial = _settled(product, memory, gates, never_worse=never_worse)
    return replace(trial, tried=memory.tried(product, trial.product, gates))


def _settled(product: Product, bench: Bench, gates: GatesSpec, *, never_worse: bool) -> Trial:
    regions = find_regions(product.snapshot.model.graph, product.quantized) if product.snapshot is not None else ()
    trial, failure = _judged(product, bench, gates)
    if failure is not None:
        if not never_worse or not regions:
            raise failure
        trial = _within_gates(bench, gates, regions, failure)
    trial = replace(trial, latency=bench.time(trial.product))
    return _no_slower(trial, bench, gates, regions) if never_worse else trial


def is_slower(latency: Latency | None) -> bool:
    """Whether a result was measured slower than float on its own runtime, by more than the noise."""
    return latency is not None and not latency.foreign and (latency.speedup < SLOWER or latency.speedup_high < 1)


def _judged(product: Product, bench: Bench, gates: GatesSpec) -> tuple[Trial, GateFailed | None]:
    try:
        quality = bench.judge(product)
        check_gates(quality, gates)
    except GateFailed as error:
        return Trial(product), error
    return Trial(product, quality), None


def _within_gates(bench: Bench, gates: GatesSpec, regions: Sequence[Region], failure: GateFailed) -> Trial:
    """The trial with the fewest regions backed off that holds the gates."""
    errors = bench.errors(regions)
    order = sorted(range(len(regions)), key=lambda i: -errors[i])
    low, high = 0, len(regions)  # ``low`` fails; whether ``high`` holds is seen last
    best: Trial | None = None
    while high - low > 1 or best is None:
        count = high if high - low <= 1 else (low + high) // 2
        product = bench.again({name for i in order[:count] for name in regions[i].nodes})
        trial, failed = _judged(product, bench, gates)
        if failed is None:
            best, high = trial, count
        elif count == len(regions):
            raise _told(failure, failed, len(regions)) from failed
        else:
            low = count
    told = f"{failure.where}: {failure.what} with it in int8" if failure.where else failure.what
    off = [
        BackedOff(nodes=regions[i].nodes, reason=TOO_BAD, detail=f"output error {errors[i]:.2e} by itself; {told}")
        for i in order[:high]
    ]
    return replace(best, product=_noted(best.product, off), backed_off=tuple(off))


def _told(first: GateFailed, last: GateFailed, count: int) -> GateFailed:
    """The failure of the product as it was asked for, and what was tried."""
    tried = f"int8 was taken back region by region, {count} in all, and with all of it in float: {last.what}"
    return GateFailed(f"{first.what}; {tried}", where=first.where, hint=first.hint)


def _no_slower(trial: Trial, bench: Bench, gates: GatesSpec, regions: Sequence[Region]) -> Trial:
    """The fastest of the trials that hold the gates, all float in the end."""
    if trial.latency is None or trial.latency.foreign:
        return trial
    best = trial
    for _ in range(MAX_ROUNDS):
        better = _faster(best, bench, gates, _losing(best, bench, _left(best, regions)))
        if better is None:
            break
        best = better
    if is_slower(best.latency):
        best = _faster(best, bench, gates, [(region, None) for region in _left(best, regions)]) or best
    if is_slower(best.latency) and regions:
        best = replace(best, remarks=(*best.remarks, IN_VAIN))
    return best


def _left(trial: Trial, regions: Sequence[Region]) -> list[Region]:
    return [region for region in regions if not trial.kept.issuperset(region.nodes)]


def _losing(trial: Trial, bench: Bench, regions: Sequence[Region]) -> list[Priced]:
    """What to back off next; nothing where all is well.

    Tables are stored in 8 bits for their size, so that they count only where the whole is slower.
    """
    slow = is_slower(trial.latency)
    candidates = [region for region in regions if slow or set(region.ops) != {"Gather"}]
    if not candidates or trial.latency is None:
        return []
    priced = list(zip(candidates, bench.costs(trial.product, candidates), strict=True))
    if slow:
        losing = [(region, cost) for region, cost in priced if cost.after > cost.before]
        return [*losing] or [min(priced, key=lambda item: item[1].before - item[1].after)]
    waste = SHARE * trial.latency.result_ms
    return [(region, cost) for region, cost in priced if cost.ratio > COST and cost.after - cost.before > waste]


def _faster(trial: Trial, bench: Bench, gates: GatesSpec, priced: Sequence[Priced]) -> Trial | None:
    """The trial with some more regions in float, if it is faster and holds the gates."""
    if not priced or trial.latency is None:
        return None
    off = (*trial.backed_off, *(_slow(region, cost) for region, cost in priced))
    product = bench.again({name for entry in off for name in entry.nodes})
    latency = bench.time(product)
    gain = 1.0 if is_slower(trial.latency) else GAIN
    if latency is None or latency.speedup <= gain * trial.latency.speedup:
        return None
    judged, failure = _judged(product, bench, gates)
    if failure is not None:
        return None
    return replace(judged, product=_noted(product, off), latency=latency, backed_off=off, remarks=trial.remarks)


def _slow(region: Region, cost: Cost | None) -> BackedOff:
    if cost is None or cost.after <= cost.before:
        detail = "int8 as a whole measured slower than float, and this region does not make up for it"
        return BackedOff(nodes=region.nodes, reason=TOO_SLOW, detail=detail)
    detail = f"int8 measured {cost.ratio:.2f}x slower than float: {cost.after:.3g} ms against {cost.before:.3g} ms"
    return BackedOff(nodes=region.nodes, reason=TOO_SLOW, detail=detail, float_ms=cost.before, quantized_ms=cost.after)


def _noted(product: Product, off: Iterable[BackedOff]) -> Product:
    """The product with the reasons for what was kept by name in its records."""
    reasons = {name: entry.reason for entry in off for name in entry.nodes}

    def told(decision: Decision) -> Decision:
        known = decision.reason == KEPT and decision.node in reasons
        return replace(decision, reason=reasons[decision.node]) if known else decision

    return replace(product, steps=tuple(replace(s, decisions=tuple(map(told, s.decisions))) for s in product.steps))
