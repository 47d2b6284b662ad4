"""How far an export may be from its source, by the type that it computes in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import DataInvalid, GateFailed
from qexport.exporter.outcome.export_result import CheckInfo

Run = tuple[str, Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]  # where, truth and found by output name

_FEW = 8  # numbers of a row; so few have no mean to speak of
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Both are shares of the spread of an output: the standard deviation of the true numbers of a row.

    Of rows of a few numbers only, it is the root mean square of all that a check looks at: a score may well be near 0.

    Attributes:
        error: Most that a number may be off; for numbers far from zero, of spread plus magnitude.
        rms: Most for the root of the mean square over all numbers, which tells rounding from a fault more sharply.
    """

    error: float
    rms: float


Allowed = Mapping[str, Tolerance]  # by the name of the output

SINGLE = Tolerance(1e-4, 2e-5)
"""Of float32: ten times what right exports of the sample models show."""

UNROUNDED = {ir.DataType.FLOAT16: Tolerance(2e-3, 2e-4), ir.DataType.BFLOAT16: Tolerance(1e-2, 1e-3)}
"""Of 16 bits where no result is rounded and the source has the weights that the export has: there is no more to it than
cosines that lie between two numbers of the type, and are rounded up by one and down by the other."""

LEAST = {ir.DataType.FLOAT16: 1e-3, ir.DataType.BFLOAT16: 8e-3}
"""Of types of 16 bits: what weights may make of an output by being rounded once."""

MOST = {ir.DataType.FLOAT16: 5e-2, ir.DataType.BFLOAT16: 3e-1}
"""Of types of 16 bits: what rounding results may do to an output; a model that it does more to is not that model."""

_ROUNDINGS = 4.0  # times what rounding all results does to an output may come on top
_PEAK = 10.0  # times the root mean square that a single number may be off


@dataclass(slots=True)
class Tally:
    """What one check of one output has found so far.

    Attributes:
        what: What was run, for a person.
        output: Name of the output.
        exact: Whether integers and booleans were compared, which must be equal.
    """

    what: str
    output: str
    exact: bool = False
    _numbers: int = 0
    _rows: int = 0
    _agreed: int = 0
    _square: float = 0.0
    _spread: float = 0.0
    _worst: tuple[float, str] = field(default=(0.0, ""))
    _short: list[tuple[str, NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=list)

    def add(self, truth: NDArray[Any], found: NDArray[Any], where: str) -> None:
        """Compare arrays [..., width], each row by itself.

        Raises:
            GateFailed: They have different shapes, or one is finite where the other is not.
            DataInvalid: The source itself gives NaN or infinity.
        """
        place = f"{self.what}, output {self.output!r}, {where}"
        if truth.shape != found.shape:
            raise GateFailed(f"the export gives {list(found.shape)}, the source {list(truth.shape)}", where=place)
        if not np.isfinite(truth).all():
            hint = "give inputs that the model was made for with --data"
            raise DataInvalid("the source gives NaN or infinity", where=place, hint=hint)
        if not np.isfinite(found).all():
            raise GateFailed("the export gives NaN or infinity, the source does not", where=place)
        self.exact |= truth.dtype.kind not in "fV"
        if not truth.size:
            return
        a, b = (np.asarray(each, np.float64).reshape(-1, each.shape[-1] if each.ndim else 1) for each in (truth, found))
        gap, spread = np.abs(a - b), np.square(a - (a.mean(-1, keepdims=True) if a.shape[-1] > _FEW else 0.0))
        if a.shape[-1] > _FEW:
            self._look(where, a, b, float(np.sqrt(spread.mean())))
        else:
            self._short.append((where, a, b))
        self._numbers += a.size
        self._rows += len(a)
        self._agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
        self._square += float(np.square(gap).sum())
        self._spread += float(spread.sum())

    def _look(self, where: str, a: NDArray[np.float64], b: NDArray[np.float64], spread: float) -> None:
        """Keep the worst of these numbers if none was worse."""
        share = np.abs(a - b) / np.maximum(spread + np.abs(a), _TINY)
        if share.max() >= self._worst[0]:
            row, column = np.unravel_index(share.argmax(), share.shape)
            told = f"{where}: row {row}, number {column}: {b[row, column]:.6g}, expected {a[row, column]:.6g}"
            self._worst = (float(share.max()), told)

    @property
    def rms(self) -> float:
        """Root of the mean square of all errors, as a share of the spread."""
        return float((self._square / max(self._spread, _TINY)) ** 0.5)

    def result(self, allowed: Tolerance) -> CheckInfo:
        """The row of the report; raise ``GateFailed`` where more is off than is allowed."""
        limit = Tolerance(0.0, 0.0) if self.exact else allowed
        for where, a, b in self._short:
            self._look(where, a, b, (self._spread / self._numbers) ** 0.5)
        info = CheckInfo(
            what=self.what,
            output=self.output,
            numbers=self._numbers,
            error=self._worst[0],
            allowed_error=limit.error,
            rms=self.rms,
            allowed_rms=limit.rms,
            argmax=self._agreed / max(self._rows, 1) if self.output.endswith("logits") else None,
        )
        if not (info.error <= limit.error and info.rms <= limit.rms):
            numbers = (
                f"{info.error:.1e} at worst (allowed {limit.error:.0e}), {info.rms:.1e} rms (allowed {limit.rms:.0e})"
            )
            raise GateFailed(
                f"the export is not what the source computes: {numbers}; worst at {self._worst[1]}",
                where=f"{self.what}, output {self.output!r}",
                hint="nothing was published; please report the model",
            )
        return info


def tolerances(dtype: ir.DataType, runs: Iterable[Run] = ()) -> Allowed:
    """What outputs may be off in a model that computes in ``dtype``.

    How much an output suffers from 16 bits is a matter of the model: some forgive rounding, others amplify it. So it is
    measured, on the export itself, which cannot hide a fault: that is there with rounding and without.

    Args:
        dtype: The type.
        runs: Of a model in 16 bits, outputs of results that were not rounded, and of results that were.

    Raises:
        GateFailed: Rounding gives NaN or infinity, numbers that the type has not, or does more than ``MOST``.
    """
    if dtype == ir.DataType.FLOAT:
        return defaultdict(lambda: SINGLE)
    what = f"results in {dtype.name.lower()}, against float32"
    least, tallies = LEAST[dtype], _tally(what, runs)
    for name, tally in tallies.items():
        if tally.rms > MOST[dtype]:
            raise GateFailed(
                f"rounding results makes another model of it: {tally.rms:.1e} rms (allowed {MOST[dtype]:.0e})",
                where=f"{what}, output {name!r}",
                hint="nothing was published; write it in float32, or in bfloat16 where numbers are large",
            )
    found = {name: least + _ROUNDINGS * tally.rms for name, tally in tallies.items()}
    return {name: Tolerance(_PEAK * rms, rms) for name, rms in found.items()}


def compare(what: str, runs: Iterable[Run], allowed: Allowed) -> tuple[CheckInfo, ...]:
    """Compare outputs by name over several runs; raises as ``Tally``."""
    return tuple(tally.result(allowed[name]) for name, tally in _tally(what, runs).items())


def _tally(what: str, runs: Iterable[Run]) -> dict[str, Tally]:
    tallies: dict[str, Tally] = {}
    for where, truth, found in runs:
        for name, array in truth.items():
            if name not in found:
                raise GateFailed(f"the export has no output {name!r}", where=what)
            tallies.setdefault(name, Tally(what, name)).add(array, found[name], where)
    return tallies
