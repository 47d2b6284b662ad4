"""Gram matrices X^T X of what products and convolutions read: the Hessian of their squared output error.

For ``y = x W`` the sum of ``|x (W - Q)|^2`` over all rows x is ``tr((W - Q)^T H (W - Q))`` with ``H = X^T X``, so one
``[K, K]`` matrix stands for all data that a layer has seen (Frantar et al. 2022, "GPTQ", section 2).

Samples are streamed one by one and unpadded, through the part of the model that the values need; a Gram matrix is held
for a few values at a time, so memory is flat in the number of samples and in the depth of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qexport.calibration.reading.data import Sample
from qexport.calibration.statistics.collect import numbered, stream
from qexport.calibration.statistics.patches import Patch, patch_of
from qexport.errors import DataInvalid
from qexport.passes.placement import Site

BUDGET = 256 << 20  # bytes of Gram matrices that are held at once
ROWS = 1024  # rows that wait to be multiplied together

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tap:
    """What a site reads: a value, and for a convolution how it walks over it.

    Attributes:
        value: Name of the value.
        size: Columns of the rows: K of a product, channels times kernel of a convolution.
        patch: The walk of a convolution.
    """

    value: str
    size: int
    patch: Patch | None = None

    def rows(self, array: NDArray[Any]) -> Iterator[Floats]:
        """Yield rows ``[n, size]`` of the value as one sample makes it, batch axis first."""
        numbers = np.asarray(array, np.float32)
        if self.patch is not None:
            yield from self.patch.rows(numbers)
        else:
            yield numbers.reshape(-1, self.size)


@dataclass(slots=True)
class Gram:
    """Sums over all rows x of a tap.

    Attributes:
        size: Columns of a row.
        hessian: Sum of ``x^T x``, ``[size, size]``.
        magnitude: Sum of ``|x|``, ``[size]``.
        total: Sum of x, ``[size]``.
        rows: How many there were.
    """

    size: int
    hessian: NDArray[np.float64] = field(init=False)
    magnitude: NDArray[np.float64] = field(init=False)
    total: NDArray[np.float64] = field(init=False)
    rows: int = 0
    _waiting: list[Floats] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hessian = np.zeros((self.size, self.size))
        self.magnitude = np.zeros(self.size)
        self.total = np.zeros(self.size)

    def add(self, rows: Floats) -> None:
        """Take in ``[n, size]``; NaN and infinity are ``DataInvalid``."""
        if not np.isfinite(rows).all():
            raise DataInvalid("activation is NaN or infinite", hint="look for overflow in the model or in the sample")
        self._waiting.append(rows)
        self.rows += len(rows)
        if sum(map(len, self._waiting)) >= ROWS:
            self.settle()

    def settle(self) -> None:
        """Multiply what is waiting: many rows together, because a product of few costs as much."""
        if self._waiting:
            rows = np.concatenate(self._waiting).astype(np.float64)  # else their noise is solved for
            self._waiting.clear()
            self.hessian += rows.T @ rows
            self.magnitude += np.abs(rows).sum(axis=0, dtype=np.float64)
            self.total += rows.sum(axis=0, dtype=np.float64)

    def error(self, gap: NDArray[np.floating]) -> float:
        """Sum over all rows x of ``|x gap|^2``, ``gap`` being ``[size, N]``."""
        return float(np.sum(gap * (self.hessian @ gap)))


def tap_of(site: Site) -> Tap | str:
    """What a site with a weight reads, or why its Gram matrix cannot be had."""
    node, shape = site.node, tuple(site.kernel.numpy().shape)
    value = node.inputs[0]
    if value is None:
        return "it reads nothing"
    name = value.name or ""
    if node.op_type == "Conv":
        if node.attributes.get_int("group", 1) != 1:
            return "a convolution in groups has a Gram matrix for each of them"
        return Tap(name, int(np.prod(shape[1:])), patch_of(node, shape))
    if node.op_type not in ("MatMul", "Gemm") or len(shape) != 2:
        return f"{node.op_type} is no product of rows with a matrix"
    if node.attributes.get_int("transA", 0):
        return "transposed activation"
    return Tap(name, int(shape[1 - site.axis]))


def by_tap(sites: Iterable[Site]) -> tuple[dict[Tap, list[Site]], dict[Site, str]]:
    """Sites by what they read, in order, so that queries, keys and values are measured once; and why others are not."""
    found: dict[Tap, list[Site]] = {}
    refused: dict[Site, str] = {}
    for site in sites:
        tap = tap_of(site)
        if isinstance(tap, str):
            refused[site] = tap
        else:
            found.setdefault(tap, []).append(site)
    return found, refused


def grams(
    model: ir.Model,
    taps: Iterable[Tap],
    samples: Iterable[Sample],
    *,
    budget: int = BUDGET,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Tap, Gram]]:
    """Yield the Gram matrix of each tap, in order.

    Args:
        model: It is not changed.
        taps: What to measure.
        samples: Gone through once for each group of taps; equal samples count once.
        budget: Bytes of Gram matrices that are held at once; a group is one tap at least.
        advance: Called for each sample of each round.

    Raises:
        DataInvalid: NaN or infinity, naming the sample and the value.
    """
    for group in groups(taps, budget):
        yield from measure(model, group, samples, advance).items()


def groups(taps: Iterable[Tap], budget: int = BUDGET) -> list[list[Tap]]:
    """Cut ``taps`` into runs whose Gram matrices are within ``budget`` bytes together."""
    found: list[list[Tap]] = []
    held = 0
    for tap in taps:
        size = tap.size * tap.size * 8
        if not found or held + size > budget:
            found.append([])
            held = 0
        found[-1].append(tap)
        held += size
    return found


def measure(
    model: ir.Model, taps: Sequence[Tap], samples: Iterable[Sample], advance: Callable[[], None] = lambda: None
) -> dict[Tap, Gram]:
    """Return the Gram matrices of ``taps`` in one run of the samples through what they need of the model."""
    sums = {tap: Gram(tap.size) for tap in taps}
    names = list(dict.fromkeys(tap.value for tap in taps))
    for index, _, values in stream(cut(model, names), names, numbered(samples, advance)):
        for tap, gram in sums.items():
            try:
                for rows in tap.rows(values[tap.value]):
                    gram.add(rows)
            except DataInvalid as error:
                raise DataInvalid(f"{error.what} at {tap.value!r}", where=f"sample {index}", hint=error.hint) from error
    for gram in sums.values():
        gram.settle()
    return sums


def cut(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy that computes the named values and nothing else; weights are shared, all inputs stay."""
    work = model.clone()
    graph = work.graph
    wanted = dict.fromkeys(names)
    values = {value.name: value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    graph.outputs.clear()
    for name in wanted:
        if values[name].type is None:
            values[name].type = ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(values[name])
    RemoveUnusedNodesPass()(work)
    return work
