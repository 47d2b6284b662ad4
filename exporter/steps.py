"""The one table of pass names, and the check of a step's options against the fields of its pass."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from qexport.errors import UsageError
from qexport.exporter.lookup import look_up

if TYPE_CHECKING:
    from qexport.passes.base import Pass

Table = Mapping[str, "type[Pass]"]
"""Pass name as written in recipes to pass class."""

_HOMES = {
    "cleanup": "qexport.passes.cleanup:Cleanup",
    "raise-opset": "qexport.passes.raise_opset:RaiseOpset",
    "fuse-layer-norm": "qexport.passes.fuse_layer_norm:FuseLayerNorm",
    "fuse-rms-norm": "qexport.passes.fuse_rms_norm:FuseRMSNorm",
    "fuse-gelu": "qexport.passes.fuse_gelu:FuseGelu",
    "fuse-attention": "qexport.passes.fuse_attention:FuseAttention",
    "fold-batch-norm": "qexport.passes.fold_batch_norm:FoldBatchNorm",
    "equalize": "qexport.passes.equalize:Equalize",
    "widen-bias": "qexport.passes.widen_bias:WidenBias",
    "heads": "qexport.calibration.heads:Heads",
    "neurons": "qexport.calibration.neurons:Neurons",
    "channels": "qexport.calibration.channels:Channels",
    "sparsify": "qexport.calibration.sparsify:Sparsify",
    "layers": "qexport.calibration.drop_layers:Layers",
    "observe": "qexport.calibration.observe:Observe",
    "extremes": "qexport.calibration.extremes:Extremes",
    "shift": "qexport.passes.shift:Shift",
    "smooth": "qexport.passes.smooth:Smooth",
    "calibrate": "qexport.calibration.calibrate:Calibrate",
    "triage": "qexport.exporter.precision.triage:Triage",
    "quantize": "qexport.passes.quantize:Quantize",
    "qlinear": "qexport.passes.qlinear:QLinear",
    "integer-products": "qexport.passes.integer_products:IntegerProducts",
    "plain-residuals": "qexport.passes.plain_residuals:PlainResiduals",
    "awq": "qexport.calibration.awq:Awq",
    "gptq": "qexport.calibration.gptq:Gptq",
    "weight-only": "qexport.passes.weight_only:WeightOnly",
    "nf4": "qexport.passes.nf4:NF4",
    "dynamic": "qexport.passes.dynamic:Dynamic",
    "llm-int8": "qexport.passes.llm_int8:LlmInt8",
    "stabilize": "qexport.passes.stabilize:Stabilize",
    "adaround": "qexport.calibration.adaround:AdaRound",
    "correct-bias": "qexport.calibration.correct:CorrectBias",
    "half": "qexport.passes.half:Half",
}


class LazyTable(Mapping[str, "type[Pass]"]):
    """Pass classes by name, each imported when it is first asked for.

    Args:
        homes: Pass name to ``module:Class``.
    """

    def __init__(self, homes: Mapping[str, str]) -> None:
        self._homes = dict(homes)

    def __getitem__(self, name: str) -> type[Pass]:
        found: type[Pass] = look_up(self._homes[name])
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


PASSES: Table = LazyTable(_HOMES)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the hint for a misspelt name: the nearest one, or all that exist."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names)}" if names else "there is nothing to set here"


def find_pass(name: str, where: str, table: Table = PASSES) -> type[Pass]:
    """Return the class of the pass called ``name``; raise ``UsageError`` with the nearest name otherwise."""
    if name not in table:
        raise UsageError(f"unknown pass {name!r}", where=where, hint=suggest(name, table))
    return table[name]


def settable(cls: type[Pass]) -> dict[str, dataclasses.Field[object]]:
    """Options that a recipe may set: all fields but those that the build itself binds."""
    return {name: field for name, field in cls.options().items() if field.init and not is_bound(field)}


def is_bound(field: dataclasses.Field[object]) -> bool:
    """Whether the build fills this field from its context (``metadata={"bound": True}``)."""
    return bool(field.metadata.get("bound"))


def is_required(field: dataclasses.Field[object]) -> bool:
    """Whether the field has no default; a bound field whose default is ``None`` has none either."""
    if is_bound(field) and field.default is None:
        return True
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def check_option(cls: type[Pass], name: str, value: object, where: str) -> object:
    """Return the value of one option as the pass wants it.

    Values are taken strictly: an integer may stand for a float and an array for a tuple, nothing else.

    Raises:
        UsageError: No such option (with the nearest), or a value of another type.
    """
    fields = settable(cls)
    if name not in fields:
        raise UsageError(f"unknown option {name!r}", where=where, hint=suggest(name, fields))
    hint = typing.get_type_hints(cls)[name]
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} = {value!r}: expected a finite number", where=where)
    try:
        # JSON, because strict JSON lets an array become a tuple and a name become an enumeration's member.
        return TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise UsageError(f"{name} = {value!r}: {message[:1].lower()}{message[1:]}", where=where) from error
