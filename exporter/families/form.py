"""How a family writes its graph: number type, layout, head, and when weights are read."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

FLOATS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
"""Types that a graph can be written in, by the names that people use."""


@dataclass(frozen=True, slots=True)
class Form:
    """The ways in which the same model can be written.

    Attributes:
        dtype: Type of weights, activations and caches. Logits and embeddings leave as float32.
        cached: Whether a decoder keeps keys and values in the portable layout (``attending.Cached``), or reads whole
            rows at once (``attending.Scoring``).
        lazy: Whether weights are read from disk each time that somebody looks, so that no more than one is in memory.
        task: Name of the head; the one that the folder was saved with when ``None``.
    """

    dtype: ir.DataType = ir.DataType.FLOAT
    cached: bool = False
    lazy: bool = False
    task: str | None = None


SCORING = Form()
"""The plain graph that recipes work on."""
