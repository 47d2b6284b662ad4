"""How good a result must be: the ``[gates]`` of a recipe, judged by numbers of the worst output."""

from __future__ import annotations

from qexport.errors import GateFailed, UsageError
from qexport.exporter.outcome.result import Quality
from qexport.exporter.recipe import GatesSpec
from qexport.exporter.samples import Samples

HINT = "nothing was published; try quantize.min_sqnr, another method, or a wider gate"


def check_judge(samples: Samples, gates: GatesSpec) -> None:
    """Raise ``UsageError`` when there is a gate that the data cannot judge, before any work is done."""
    judge = samples.judge
    if gates.max_drop is not None and (judge is None or judge.task is None):
        raise UsageError("no labels to judge it by", where="gate max_drop", hint="give labelled data with --eval")
    for name in ("min_cosine", "min_worst_cosine"):
        if getattr(gates, name) is not None and judge is None:
            raise UsageError("no data to judge it by", where=f"gate {name}", hint="give data with --eval")


def check_gates(quality: Quality | None, gates: GatesSpec) -> None:
    """Raise ``GateFailed`` when the result is worse than the recipe allows; what was not measured fails nothing."""
    if quality is None:
        return
    drop = None if quality.task is None else quality.task.drop
    if gates.max_drop is not None and drop is not None and not drop <= gates.max_drop:
        raise _failed("max_drop", drop, gates.max_drop)
    if gates.min_cosine is not None and not quality.least_mean >= gates.min_cosine:
        raise _failed("min_cosine", quality.least_mean, gates.min_cosine)
    if gates.min_worst_cosine is not None and not quality.least >= gates.min_worst_cosine:
        raise _failed("min_worst_cosine", quality.least, gates.min_worst_cosine)


def _failed(name: str, found: float, limit: float) -> GateFailed:
    """Tell both numbers with as many digits as it takes to tell them apart."""
    shown = next((f"{found:.{digits}g}" for digits in range(4, 17) if _apart(found, limit, digits)), repr(found))
    return GateFailed(f"measured {shown}, allowed {limit:g}", where=f"gate {name}", hint=HINT)


def _apart(found: float, limit: float, digits: int) -> bool:
    return f"{found:.{digits}g}" != f"{limit:.{digits}g}"
