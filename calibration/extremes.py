"""Note how far every float value of the model gets on data, for whoever must fit it into fewer bits of exponent.

Only three numbers per value leave the runtime: its maximum, its minimum and the sum of its magnitudes, which is NaN
exactly when one of its elements is (a maximum may lose a NaN). Memory is flat in the number of samples and of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qexport.calibration.least import check_least
from qexport.calibration.reading.data import Dataset, Sample
from qexport.calibration.statistics.collect import Values, numbered, stream
from qexport.calibration.statistics.store import Arrays, Entry, Store, journal, pack_names, unpack_names
from qexport.errors import DataInvalid
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import Names, constant
from qexport.passes.numbers.extreme import EXTREME_KEY, extreme_of
from qexport.passes.target import find_target

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
REDUCTIONS = ("ReduceMax", "ReduceMin", "ReduceL1")
HINT = "look for overflow in the model or in the sample, or go without: --set extremes.enabled=false"

MAGNITUDES = "magnitudes/1"  # part of every key: a change of what is measured must change it

Taps = dict[str, tuple[str, ...]]  # value name to the names of its maximum, its minimum and the sum of its magnitudes


@dataclass(frozen=True)
class Extremes(Pass):
    """Note the largest magnitude of every float value on data; without data nothing is noted."""

    exact: ClassVar[bool] = True

    # a factory makes the option one that a recipe can do without, unlike a plain default of None
    data: Dataset | None = field(default_factory=lambda: None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    store: Store = field(default=Store(), metadata={"bound": True})
    target: str = "tensorrt-rtx"
    samples: int = 512

    def __post_init__(self) -> None:
        check_least("extremes", self, samples=1)

    def call(self, model: ir.Model) -> Outcome:
        """Leave a magnitude on each float value of the main graph that a sample reaches.

        Raises:
            DataInvalid: NaN, or an infinity that no constant of the model put there; names the sample and the value.
        """
        refusal = self._refusal()
        if self.data is None or refusal is not None:
            return Outcome(model, False, (Decision("", "graph", "skipped", refusal or ""),))
        modified, entry = False, self.store.entry(model, {}, self.data.digests[: self.samples], MAGNITUDES)
        for value, found in observe(model, islice(self.data, self.samples), self.advance, entry).items():
            modified |= extreme_of(value) != found
            value.meta[EXTREME_KEY] = found
        return Outcome(model, modified)

    def _refusal(self) -> str | None:
        if find_target(self.target).rest == "float32":
            return f"target {self.target} computes in float32"
        return "no data: no extremes were observed" if self.data is None else None


def observe(
    model: ir.Model,
    samples: Iterable[Sample],
    advance: Callable[[], None] = lambda: None,
    entry: Entry | None = None,
) -> dict[ir.Value, float]:
    """Return the largest magnitude of each float value over ``samples``; ``model`` is not changed.

    Samples that ``entry`` has seen are not run again.

    What is empty in every sample is left out. Where the model itself holds infinite constants, as masks do, the values
    that they reach may be infinite, and the largest finite end counts.
    """
    work = model.clone()
    if any(value.type is None for node in work.graph for value in node.outputs if value.name):
        ShapeInferencePass(check_type=False, strict_mode=False)(work)
    taps = _add_reductions(work.graph)
    tolerated = {value.name for value in _behind_infinities(work.graph)}
    names = [name for triple in taps.values() for name in triple]
    kept = entry.recall(_unpack) if entry else None
    found, seen = (kept[0], set(kept[1])) if kept else ({}, set())
    with journal(entry, seen, lambda: _pack(found)) as took:
        for index, digest, values in stream(work, names, numbered(samples, advance, seen)):
            for name, magnitude in _magnitudes(values, taps, tolerated, index):
                found[name] = max(found.get(name, 0.0), magnitude)
            took(digest)
    mine = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    return {value: found[value.name] for value in mine if value.name in found}


def _pack(found: dict[str, float]) -> Arrays:
    return {"names": pack_names(found), "magnitudes": np.array(list(found.values()), np.float64)}


def _unpack(arrays: Arrays) -> dict[str, float]:
    names = unpack_names(arrays["names"])
    return dict(zip(names, map(float, arrays["magnitudes"]), strict=True))


def _magnitudes(values: Values, taps: Taps, tolerated: set[str | None], index: int) -> Iterator[tuple[str, float]]:
    """The magnitude of each value in one sample, in the order of the graph."""
    for name, triple in taps.items():
        high, low, size = (float(np.asarray(values[tap]).item()) for tap in triple)
        if high < low:  # the maximum of nothing is -inf
            continue
        ends = [abs(end) for end in (high, low)]
        finite = [end for end in ends if math.isfinite(end)]
        if math.isnan(size) or (len(finite) < len(ends) and name not in tolerated):
            raise DataInvalid(f"value {name!r} holds NaN or infinity", where=f"sample {index}", hint=HINT)
        if finite:
            yield name, max(finite)


def _add_reductions(graph: ir.Graph) -> Taps:
    """Append the reductions of every float value to ``graph``; returns where they are found."""
    names, taps = Names(graph), {}
    made = (value for node in graph if node.op_type != "Constant" for value in node.outputs)
    for value in [*(value for value in graph.inputs if not value.is_initializer()), *made]:
        if value.name and isinstance(value.type, ir.TensorType) and value.dtype in FLOATS:
            taps[value.name] = tuple(_reduce(graph, value, op, names) for op in REDUCTIONS)
    return taps


def _reduce(graph: ir.Graph, value: ir.Value, op: str, names: Names) -> str:
    name = names.fresh(f"{value.name}/{op}")
    node = ir.node(op, [value], {"keepdims": 0}, name=names.fresh(f"{name}/node"))
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(value.dtype or ir.DataType.FLOAT)
    graph.append(node)
    return name


def _behind_infinities(graph: ir.Graph) -> set[ir.Value]:
    """What is computed from an infinite constant, up to the next Softmax."""
    reached: set[ir.Value] = set()
    for node in graph:
        tensors = (*map(constant, node.inputs), node.attributes.get_tensor("value", None))
        if any(value in reached for value in node.inputs) or any(map(_is_infinite, tensors)):
            reached.update(() if node.op_type in ("Softmax", "Attention") else node.outputs)
    return reached


def _is_infinite(tensor: ir.TensorProtocol | Any) -> bool:
    return tensor is not None and tensor.dtype in FLOATS and bool(np.isinf(tensor.numpy()).any())
