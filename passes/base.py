"""What a pass is: options in a frozen dataclass, a model in, the model and the decisions out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice of one pass, for the report.

    Attributes:
        node: Name of the node that was looked at.
        op: Its operator type.
        action: What was done, in one word: ``quantized``, ``skipped``, ``fused``, ``folded``, ``raised``,
            ``rounded``, ``softened``, ``noted``, ``kept``, ``pruned``, ``unrolled``.
        reason: Why, in a few words that are the same for the same cause, so that they can be counted.
        detail: The numbers of this one case.
        units: How many units stay of how many there were, where some were cut out.
    """

    node: str
    op: str
    action: str
    reason: str
    detail: str = ""
    units: tuple[int, int] | None = None


@dataclass
class Outcome(ir.passes.PassResult):
    """A pass result with the decisions that led to it."""

    decisions: tuple[Decision, ...] = ()


class Pass(ir.passes.InPlacePass):
    """Base of every pass; subclasses are frozen dataclasses whose fields are the options.

    A pass reads nothing but the model it is given. ``modified`` in the result is exact and a second run
    returns ``False``. Refusals come before any edit.
    """

    exact: ClassVar[bool] = True
    """Whether the model must compute the same numbers afterwards; the build proves it on real inputs."""
    one_at_a_time: ClassVar[bool] = False
    """Whether it works through layers in turn, so that matrix products may have all threads to themselves."""
    quantizes: ClassVar[bool] = False
    """Whether it stores numbers in fewer bits by scales of its own, which a quantized model must not go through."""

    @classmethod
    def help(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field[object]]:
        """Option name to dataclass field."""
        return {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # every subclass is one
