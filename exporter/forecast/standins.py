"""Passes that stand in for those which look at data, so that a recipe can be run without any.

What is quantized and in which form hardly depends on numbers: ranges that fit every format let all layers through
that the target takes. What data alone decides is left out, and told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.observe import IMAGE_AXIS, Observe
from qexport.calibration.sparsify import Sparsify
from qexport.exporter.recipe import Recipe, instantiate
from qexport.passes.base import Outcome, Pass
from qexport.passes.folding.activation import ACTIVATION_KEY, MIXED, Activation
from qexport.passes.numbers.range import RANGE_KEY, Range
from qexport.passes.placement import Outputs, Site, plan
from qexport.passes.target import find_target

CUTS = ("heads", "neurons", "channels", "layers")
"""Steps that make tensors smaller, by how much only data tells."""

_UNIT = Range(-1.0, 1.0)
_DATA = "data"


@dataclass(frozen=True)
class PretendRanges(Pass):
    """Leave the range from -1 to 1 on everything that calibrate would measure."""

    exact: ClassVar[bool] = True

    target: str = "tensorrt-rtx"
    attention: bool = False
    format: Literal["fp8"] | None = None
    outputs: Outputs = "none"

    def call(self, model: ir.Model) -> Outcome:
        """Leave the ranges."""
        target = find_target(self.target).using(self.format, "calibrate.format")
        found = plan(model, target, attention=self.attention, outputs=self.outputs)
        for value in (value for site in found.sites for value in site.measured):
            value.meta[RANGE_KEY] = _UNIT
        return Outcome(model, bool(found.sites))


@dataclass(frozen=True)
class PretendChannels(Pass):
    """Leave channels from -1 to 1 on everything that observe would look at, and no samples to search by."""

    exact: ClassVar[bool] = True

    target: str = "tensorrt-rtx"

    def call(self, model: ir.Model) -> Outcome:
        """Leave the channels."""
        axes: dict[ir.Value, dict[int, int]] = {}
        for site in plan(model, find_target(self.target)).roots:
            for value in site.values if site.weight is not None else ():
                axis, count = _channels(site)
                axes.setdefault(value, {})[axis] = count
        for value, found in axes.items():
            value.meta[ACTIVATION_KEY] = MIXED if len(found) > 1 else _unit(*next(iter(found.items())))
        return Outcome(model, bool(axes))


def _channels(site: Site) -> tuple[int, int]:
    """The axis of the channels that a layer reads, and how many there are."""
    shape = site.kernel.numpy().shape
    if site.node.op_type == "Conv":
        return IMAGE_AXIS, int(shape[1]) * site.node.attributes.get_int("group", 1)
    if site.node.op_type == "ConvTranspose":
        return IMAGE_AXIS, int(shape[0])
    return -1, int(shape[1 - site.axis])


def _unit(axis: int, count: int) -> Activation:
    ones = np.ones(count, np.float32)
    return Activation(axis, -ones, ones, np.zeros((0, count), np.float32))


def _ranges(step: Pass) -> Pass:
    return PretendRanges(**_common(step, PretendRanges))


def _seen_channels(step: Pass) -> Pass:
    return PretendChannels(**_common(step, PretendChannels))


def _smallest(step: Pass) -> Pass:
    """The same zeros in number and pattern, chosen by the size of weights alone."""
    assert isinstance(step, Sparsify)
    return replace(step, data=None, criterion="magnitude", repair=False, sequential=False, permute=False, per=None)


def _common(step: Pass, cls: type[Pass]) -> dict[str, Any]:
    return {field.name: getattr(step, field.name) for field in fields(cls)}  # type: ignore[arg-type]  # every pass is a dataclass


STANDINS: Mapping[type[Pass], Callable[[Pass], Pass]] = {
    Calibrate: _ranges,
    Observe: _seen_channels,
    Sparsify: _smallest,
}


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The steps of a recipe that can be run without data.

    Attributes:
        steps: Passes by name, in order.
        measuring: Names of those that look at data, stood in for or left out, in order.
        cuts: Names of those that would make tensors smaller.
    """

    steps: tuple[tuple[str, Pass], ...]
    measuring: tuple[str, ...]
    cuts: tuple[str, ...]


def rehearse(recipe: Recipe) -> Rehearsal:
    """The steps of ``recipe`` with what looks at data stood in for, or left out; raises as ``instantiate``."""
    whole = instantiate(recipe, {_DATA: _NoData()})
    measuring = tuple(name for name, step in whole if _DATA in step.options())
    cuts = tuple(name for name in measuring if name in CUTS)
    return Rehearsal(tuple(_rehearsed(whole)), measuring, cuts)


class _NoData:
    """Stands where data is demanded and looked at by nobody."""


def _rehearsed(whole: list[tuple[str, Pass]]) -> Iterator[tuple[str, Pass]]:
    for name, step in whole:
        if _DATA not in step.options():
            yield name, step
        elif type(step) in STANDINS:
            yield name, STANDINS[type(step)](step)
