"""How far an export may be from its source, by the type that it computes in."""

from __future__ import annotations

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
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
_SHALLOW = 40  # products of the decoders that tolerances were measured on


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Both are shares of the spread of an output: the standard deviation of the true numbers of a row.

    Of rows of a few numbers only, it is their root mean square.

    Attributes:
        error: Most that a number may be off; for numbers far from zero, of spread plus magnitude.
        rms: Most for the root of the mean square over all numbers, which tells rounding from a fault more sharply.
    """

    error: float
    rms: float


TOLERANCES = {
    ir.DataType.FLOAT: Tolerance(1e-4, 2e-5),
    ir.DataType.FLOAT16: Tolerance(3e-2, 4e-3),
    ir.DataType.BFLOAT16: Tolerance(1.5e-1, 2.5e-2),
}
"""Three times or more what right exports of the sample decoders show; less than a wrong base of rotary positions."""


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
        share = gap / np.maximum(np.sqrt(spread.mean()) + np.abs(a), _TINY)
        if share.max() >= self._worst[0]:
            row, column = np.unravel_index(share.argmax(), share.shape)
            told = f"{where}: row {row}, number {column}: {b[row, column]:.6g}, expected {a[row, column]:.6g}"
            self._worst = (float(share.max()), told)
        self._numbers += a.size
        self._rows += len(a)
        self._agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
        self._square += float(np.square(gap).sum())
        self._spread += float(spread.sum())

    def result(self, allowed: Tolerance) -> CheckInfo:
        """The row of the report; raise ``GateFailed`` where more is off than is allowed."""
        rms = (self._square / max(self._spread, _TINY)) ** 0.5
        limit = Tolerance(0.0, 0.0) if self.exact else allowed
        info = CheckInfo(
            what=self.what,
            output=self.output,
            numbers=self._numbers,
            error=self._worst[0],
            allowed_error=limit.error,
            rms=rms,
            allowed_rms=limit.rms,
            argmax=self._agreed / max(self._rows, 1) if self.output.endswith("logits") else None,
        )
        if not (info.error <= limit.error and rms <= limit.rms):
            numbers = f"{info.error:.1e} at worst (allowed {limit.error:.0e}), {rms:.1e} rms (allowed {limit.rms:.0e})"
            raise GateFailed(
                f"the export is not what the source computes: {numbers}; worst at {self._worst[1]}",
                where=f"{self.what}, output {self.output!r}",
                hint="nothing was published; please report the model",
            )
        return info


def tolerance_of(model: ir.Model, dtype: ir.DataType) -> Tolerance:
    """What a model may be off that computes in ``dtype``: roundings to 16 bits add up over its products."""
    allowed = TOLERANCES[dtype]
    if dtype == ir.DataType.FLOAT:
        return allowed
    products = sum(node.op_type in _PRODUCTS for node in model.graph.all_nodes())
    depth = max(1.0, (products / _SHALLOW) ** 0.5)
    return Tolerance(allowed.error * depth, allowed.rms * depth)


def compare(what: str, runs: Iterable[Run], allowed: Tolerance) -> tuple[CheckInfo, ...]:
    """Compare outputs by name over several runs; raises as ``Tally``."""
    tallies: dict[str, Tally] = {}
    for where, truth, found in runs:
        for name, array in truth.items():
            if name not in found:
                raise GateFailed(f"the export has no output {name!r}", where=what)
            tallies.setdefault(name, Tally(what, name)).add(array, found[name], where)
    return tuple(tally.result(allowed) for tally in tallies.values())
