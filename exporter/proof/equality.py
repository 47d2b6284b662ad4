"""Proof that exact passes changed nothing: the model runs before and after each of them on real samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.running.execute import open_model
from qexport.errors import BuildFailed
from qexport.exporter.proof.marks import marks
from qexport.passes.base import Pass
from qexport.passes.pipeline import Step
from qexport.passes.portable import MASK

TOLERANCE = 1e-5  # relative L2 distance of an output; float32 rounding of a deep model stays a decade below
HALF_TOLERANCE = 5e-3  # for models that compute in float16 or bfloat16, whose every step rounds to 5e-4 or 4e-3
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
Feed = Mapping[str, NDArray[np.generic]]
Outputs = list[dict[str, NDArray[np.generic]]]  # per feed, output name to array


@dataclass(slots=True)
class EqualityProof:
    """A pipeline observer that compares outputs across every exact pass that changed the model.

    Attributes:
        feeds: Inputs, batch axis first.
        made_up: Whether they are not real, so that the model may refuse them; then there is no proof by them.
        warnings: What could not be proven.
        errors: Step index to the worst relative error over all outputs and feeds.
        before_inexact: The model as it was before the first pass that changes numbers on purpose.
    """

    feeds: Sequence[Feed]
    made_up: bool = False
    warnings: list[str] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)
    before_inexact: ir.Model | None = None
    _outputs: Outputs | None = None
    _exact: bool = True

    def before(self, name: str, step: Pass, model: ir.Model) -> None:
        """Note what the model computes now, unless it is known from the step before."""
        if self.made_up:
            self.feeds, self.made_up = self._accepted(model), False
        self._exact = step.exact
        if not step.exact and self.before_inexact is None:
            self.before_inexact = model.clone()
        if step.exact and self._outputs is None:
            self._outputs = self._run(model)

    def after(self, step: Step, model: ir.Model) -> None:
        """Compare; raise ``BuildFailed`` when an exact pass changed a number by more than rounding."""
        error: float | None = None
        if not self._exact:
            self._outputs = self._outputs if not step.modified else None
        elif step.modified and self._outputs is not None:
            outputs = self._run(model)
            error = max((distance(a, b) for a, b in zip(self._outputs, outputs, strict=True)), default=None)
            self._outputs = outputs
        self.errors.append(error)
        allowed = HALF_TOLERANCE if _computes_in_half(model) else TOLERANCE
        if error is not None and not error <= allowed:
            raise BuildFailed(
                f"the pass changed the outputs by {error:.1e} relative, allowed {allowed:.0e}",
                where=f"step {len(self.errors)} ({step.name})",
                hint=f"leave it out with --set {step.name}.enabled=false, and report the model",
            )

    def _accepted(self, model: ir.Model) -> list[Feed]:
        """The feeds that the model takes as it came; a warning if that is none of them."""
        session, accepted, refusal = open_model(model), [], ""
        for feed in self.feeds:
            try:
                session.run(feed)
            except BuildFailed as error:
                refusal = error.what
            else:
                accepted.append(feed)
        if not accepted:
            self.warnings.append(f"equality was not proven, give data with --eval: {refusal[:200]}")
        return accepted

    def _run(self, model: ir.Model) -> Outputs:
        session = open_model(model)
        return [_visible(session.run(feed), feed) for feed in self.feeds]


def _visible(outputs: dict[str, NDArray[np.generic]], feed: Feed) -> dict[str, NDArray[np.generic]]:
    """The outputs without the positions that the attention mask hides: nobody reads them, rounding may tear at them."""
    mask = feed.get(MASK)
    if mask is None or mask.ndim != 2:
        return outputs
    hidden = mask == 0
    return {
        name: np.where(hidden.reshape(*mask.shape, *[1] * (array.ndim - 2)), np.zeros_like(array), array)
        if array.shape[:2] == mask.shape
        else array
        for name, array in outputs.items()
    }


def _computes_in_half(model: ir.Model) -> bool:
    weights = (value.const_value for value in model.graph.initializers.values())
    return any(weight is not None and weight.size > 1 and weight.dtype in HALVES for weight in weights)


def distance(one: Mapping[str, NDArray[np.generic]], other: Mapping[str, NDArray[np.generic]]) -> float:
    """Largest relative L2 distance over outputs of the same name; NaN in the same places is equal, strings are or not.

    The distance is relative to the numbers that are no marks: what masks put into an output hides no error.
    """
    worst = 0.0
    ours, theirs = dict(_flat("", one)), dict(_flat("", other))
    if ours.keys() - theirs.keys():
        return float("inf")
    for name, a in ours.items():
        b = theirs[name]
        if a.shape != b.shape or (a.dtype.kind in "OSU" and not np.array_equal(a, b)):
            return float("inf")
        if a.dtype.kind in "OSU":
            continue
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        gap = float(np.linalg.norm(np.where(same, 0.0, x - y)))
        counted = np.isfinite(x) & ~marks(x.reshape(1, -1), y.reshape(1, -1)).reshape(x.shape)
        size = float(np.linalg.norm(np.where(counted, x, 0.0)))
        if not np.isfinite(gap):
            return float("inf")
        worst = max(worst, gap / max(size, 1e-30))
    return worst


def _flat(name: str, value: object) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """The arrays of an output; some are sequences of arrays, or dictionaries, or empty."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list):
        yield f"{name}#", np.asarray(len(value))
        for index, inner in enumerate(value):
            yield from _flat(f"{name}.{index}", inner)
    elif value is not None:
        yield name, np.asarray(value)
