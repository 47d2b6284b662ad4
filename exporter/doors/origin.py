"""What every door hands to the road: graphs to write, something that computes the same, and what travels along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnx_ir as ir
from numpy.typing import NDArray

from qexport.exporter.doors.inputs import Feeds
from qexport.exporter.families.form import FLOATS
from qexport.exporter.load import find_tokenizer
from qexport.exporter.outcome.result import SourceInfo

Reference: TypeAlias = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
"""Inputs of the plain form of a model by name to its outputs by name."""


@dataclass(frozen=True)
class Origin:
    """A source behind its door.

    Attributes:
        door: Which one.
        info: What was given.
        parts: File name to graph, in the order in which they are written.
        reference: Computes the truth, whole rows at once.
        told: What that is, for a person.
        dtype: Type of weights and activations.
        family: ``model_type``, where there is one.
        task: The head that was asked for.
        vocabulary: How many tokens the model knows, if that is known.
        positions: The longest row that it has positions for, where the model does not tell itself.
        companions: Files that travel along.
        trials: Inputs that came with the source.
        unrounded: Whether ``reference`` has the weights of ``parts``, in their type, and rounds no results to it.
        reach: How far apart two tokens may be before they are treated in another way, as by a window; 0 without end.
        notes: What a person should know, in whole sentences without a full stop.
    """

    door: str
    info: SourceInfo
    parts: Mapping[str, ir.Model]
    reference: Reference
    told: str
    dtype: ir.DataType = ir.DataType.FLOAT
    family: str | None = None
    task: str | None = None
    vocabulary: int | None = None
    positions: int | None = None
    companions: tuple[Path, ...] = ()
    trials: tuple[Feeds, ...] = ()
    unrounded: bool = False
    reach: int = 0
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        """The ``tokenizer.json`` among the files that travel along."""
        return find_tokenizer(self.companions)


def type_of(model: ir.Model) -> ir.DataType:
    """The float type that most of a model's weights have."""
    sizes = dict.fromkeys(FLOATS.values(), 0)
    for value in model.graph.initializers.values():
        if value.dtype in sizes and value.const_value is not None:
            sizes[value.dtype] += value.const_value.size
    return max(sizes, key=lambda dtype: sizes[dtype])
