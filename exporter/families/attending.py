"""The two layouts of a decoder: whole rows at once, or step by step with a cache of keys and values.

``Scoring``: inputs ``input_ids``, ``attention_mask`` int64 [batch, sequence], padded at the end; positions count from
the start of the row; what stands at a masked position means nothing. Small operators that every target reads.

``Cached``, the portable layout: inputs ``input_ids``, ``position_ids`` int64 [batch, sequence], ``write_indices`` int64
[batch], and for each layer ``past_key_values.{i}.key`` and ``.value`` [batch, key heads, max_seq, head size]; outputs
``present.{i}.key`` and ``.value`` of the same shape. A call writes the keys and values of its tokens at
``write_indices`` and looks at all columns up to each token's own position, so a column that is not written yet, or
left over from a draft that was rolled back, is never seen before it is overwritten.

Both give ``logits`` float32 [batch, sequence, vocabulary]: position ``t`` scores the token at ``t + 1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.exporter.families.builder import GraphBuilder
from qexport.passes.portable import (
    CACHED_OPSET,
    COLUMNS,
    IDS,
    KINDS,
    LOGITS,
    MASK,
    MASKED,
    POSITIONS,
    WRITE,
    past_name,
    present_name,
)

SCORING_OPSET = 20  # what TensorRT 10.3 reads
Heads: TypeAlias = tuple[ir.Value, ir.Value, ir.Value]  # query, key, value [batch, heads, sequence, head size]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Query heads, key heads (a divisor of them), and the size of one head."""

    heads: int
    key_heads: int
    dim: int


class Attending(Protocol):
    """How the layers of a decoder see positions and each other's tokens."""

    ids: ir.Value

    def lookup(self, scope: str, table: ir.Value) -> ir.Value:
        """Rows of ``table`` [positions, width], one for each token; broadcasts to [batch, sequence, width]."""

    def rotate(self, scope: str, x: ir.Value, angles: NDArray[np.float32], factor: float = 1.0) -> ir.Value:
        """Turn pairs of ``x`` [batch, heads, sequence, head size] by ``angles`` [positions, pairs], times ``factor``.

        Number ``i`` of a head pairs with ``i + pairs``; what stands behind the pairs stays as it is. All layers share
        the angles and the factor.
        """

    def mask(self, window: int | None = None) -> ir.Value:
        """0 where a query may look, ``MASKED`` elsewhere; at most ``window`` positions back, itself counted."""

    def attend(self, scope: str, heads: Heads, scale: float, mask: ir.Value) -> ir.Value:
        """Softmax(scale q k^T + mask) v, [batch, sequence, heads * head size]."""

    def finish(self, logits: ir.Value, vocabulary: int) -> None:
        """Name the outputs."""


def attending(g: GraphBuilder, geometry: Geometry) -> Attending:
    """The layout that the builder's form asks for, for layers that are all alike."""
    return Cached(g, geometry) if g.form.cached else Scoring(g, geometry)


def opset_for(*, cached: bool) -> int:
    """Operator set of a layout."""
    return CACHED_OPSET if cached else SCORING_OPSET


class Scoring:
    """Whole rows at once, in small operators."""

    def __init__(self, g: GraphBuilder, geometry: Geometry) -> None:
        self.g, self.geometry = g, geometry
        self.ids, self._real = (g.input(name, ir.DataType.INT64, ("batch", "sequence")) for name in (IDS, MASK))
        self._length = g.op("model", "Shape", self.ids, start=1, end=2)
        self._masks: dict[int | None, ir.Value] = {}
        self._turns: tuple[ir.Value, ir.Value] | None = None

    def lookup(self, scope: str, table: ir.Value) -> ir.Value:
        """The first rows."""
        return self.g.op(
            scope, "Slice", table, self.g.constant("zero", [0]), self._length, self.g.constant("axis_0", [0])
        )

    def rotate(self, scope: str, x: ir.Value, angles: NDArray[np.float32], factor: float = 1.0) -> ir.Value:
        """``x cos + (-second half, first half) sin``."""
        g, half = self.g, angles.shape[1]
        if self._turns is None:
            cos, sin = (table * np.float32(factor) for table in (np.cos(angles), np.sin(angles)))
            self._turns = self._rows("cos", cos), self._rows("sin", sin)
        turns = self._turns
        start, middle, end, last = (
            g.constant(*pair) for pair in (("zero", [0]), ("half_head", [half]), ("head", [2 * half]), ("last", [-1]))
        )
        rest = []
        if 2 * half < self.geometry.dim:
            rest = [g.op(scope, "Slice", x, end, g.constant("whole_head", [self.geometry.dim]), last)]
            x = g.op(scope, "Slice", x, start, end, last)
        first, second = g.op(scope, "Slice", x, start, middle, last), g.op(scope, "Slice", x, middle, end, last)
        turned = g.op(scope, "Concat", g.op(scope, "Neg", second), first, axis=-1)
        turned = g.op(scope, "Add", g.op(scope, "Mul", x, turns[0]), g.op(scope, "Mul", turned, turns[1]))
        return g.op(scope, "Concat", turned, *rest, axis=-1) if rest else turned

    def _rows(self, name: str, table: NDArray[np.float32]) -> ir.Value:
        scope = "model.rotary_emb"
        half = self.lookup(scope, self.g.weight(f"{scope}.{name}", table))
        return self.g.op(scope, "Concat", half, half, axis=-1)

    def mask(self, window: int | None = None) -> ir.Value:
        """Float [batch, 1, sequence, sequence]."""
        if window in self._masks:
            return self._masks[window]
        g, scope = self.g, "mask" if window is None else f"mask_{window}"
        keys = g.count(scope, g.op(scope, "Squeeze", self._length))
        queries = g.op(scope, "Unsqueeze", keys, g.constant("axis_1", [1]))
        real = g.op(scope, "Unsqueeze", self._real, g.constant("axes_1_2", [1, 2]))
        real = g.op(scope, "Cast", real, to=ir.DataType.BOOL)
        self._masks[window] = _allowed(g, scope, (keys, queries), window, real)
        return self._masks[window]

    def attend(self, scope: str, heads: Heads, scale: float, mask: ir.Value) -> ir.Value:
        """Products and Softmax, with every key and value head repeated for each of its queries."""
        g, (query, key, value) = self.g, heads
        keys = g.op(scope, "Transpose", self._shared(scope, key), perm=[0, 1, 3, 2])
        scores = g.op(f"{scope}.scores", "MatMul", query, keys)
        scores = g.op(scope, "Mul", scores, g.constant(f"attention_scale_{scale:g}", scale))
        chances = g.op(scope, "Softmax", g.op(scope, "Add", scores, mask), axis=-1)
        context = g.op(f"{scope}.context", "MatMul", chances, self._shared(scope, value))
        return merge_heads(g, scope, context, self.geometry)

    def _shared(self, scope: str, x: ir.Value) -> ir.Value:
        """Every key or value head once for each of its queries, so that there are as many as query heads."""
        g, shape = self.g, self.geometry
        times = shape.heads // shape.key_heads
        if times == 1:
            return x
        apart = g.op(scope, "Unsqueeze", x, g.constant("axis_2", [2]))
        many = g.op(scope, "Expand", apart, g.constant("queries_per_key", [1, 1, times, 1, 1]))
        return g.op(scope, "Reshape", many, g.constant("all_heads", [0, shape.heads, -1, shape.dim]))

    def finish(self, logits: ir.Value, vocabulary: int) -> None:
        """Logits only."""
        self.g.output(logits, LOGITS, ir.DataType.FLOAT, ("batch", "sequence", vocabulary))


class Cached:
    """Step by step, with the operators of opset 24."""

    def __init__(self, g: GraphBuilder, geometry: Geometry) -> None:
        self.g, self.geometry = g, geometry
        self.ids, self.positions = (
            g.input(name, ir.DataType.INT64, ("batch", "sequence")) for name in (IDS, POSITIONS)
        )
        self._places = g.input(WRITE, ir.DataType.INT64, ("batch",))
        self._present: list[tuple[ir.Value, str]] = []
        self._masks: dict[int | None, ir.Value] = {}
        self._past: ir.Value | None = None

    def lookup(self, scope: str, table: ir.Value) -> ir.Value:
        """The rows at ``position_ids``."""
        return self.g.op(scope, "Gather", table, self.positions)

    def rotate(self, scope: str, x: ir.Value, angles: NDArray[np.float32], factor: float = 1.0) -> ir.Value:
        """RotaryEmbedding at ``position_ids``."""
        tables = (
            self._table("cos", np.cos(angles) * np.float32(factor)),
            self._table("sin", np.sin(angles) * np.float32(factor)),
        )
        part = 2 * angles.shape[1]
        sizes = {"rotary_embedding_dim": part} if part < self.geometry.dim else {}
        return self.g.op(scope, "RotaryEmbedding", x, *tables, self.positions, **sizes)

    def _table(self, name: str, rows: NDArray[np.float32]) -> ir.Value:
        name = f"model.rotary_emb.{name}"
        return self.g.graph.initializers[name] if name in self.g.graph.initializers else self.g.weight(name, rows)

    def mask(self, window: int | None = None) -> ir.Value:
        """Float [batch, 1, sequence, max_seq]."""
        if window in self._masks:
            return self._masks[window]
        g, scope = self.g, "mask" if window is None else f"mask_{window}"
        keys = self.columns(scope)
        queries = g.op(scope, "Unsqueeze", self.positions, g.constant("axes_1_3", [1, 3]))
        self._masks[window] = _allowed(g, scope, (keys, queries), window)
        return self._masks[window]

    def columns(self, scope: str) -> ir.Value:
        """Positions of the columns of the caches, int64 [max_seq]."""
        g = self.g
        if self._past is None:
            self._past = self._cache("key", 0)
        count = g.op(scope, "Squeeze", g.op(scope, "Shape", self._past, start=2, end=3))
        return g.count(scope, count)

    def _cache(self, part: str, layer: int) -> ir.Value:
        if layer == 0 and part == "key" and self._past is not None:
            return self._past
        sizes = ("batch", self.geometry.key_heads, COLUMNS, self.geometry.dim)
        return self.g.input(past_name(layer, part), self.g.dtype, sizes)

    def attend(self, scope: str, heads: Heads, scale: float, mask: ir.Value) -> ir.Value:
        """Write the new keys and values into the caches, and look at all of them."""
        query, *new = heads
        layer = len(self._present) // 2
        keys, values = (self._written(scope, part, layer, x) for part, x in zip(KINDS, new, strict=True))
        context = self.g.op(scope, "Attention", query, keys, values, mask, scale=scale)
        return merge_heads(self.g, scope, context, self.geometry)

    def _written(self, scope: str, part: str, layer: int, x: ir.Value) -> ir.Value:
        cache = self._cache(part, layer)
        present = self.g.op(f"{scope}.{part}", "TensorScatter", cache, x, self._places, axis=-2, mode="linear")
        self._present.append((present, present_name(past_name(layer, part))))
        return present

    def finish(self, logits: ir.Value, vocabulary: int) -> None:
        """Logits, then the caches."""
        self.g.output(logits, LOGITS, ir.DataType.FLOAT, ("batch", "sequence", vocabulary))
        for value, name in self._present:
            self.g.output(value, name, self.g.dtype, ("batch", self.geometry.key_heads, COLUMNS, self.geometry.dim))


def _allowed(
    g: GraphBuilder,
    scope: str,
    places: tuple[ir.Value, ir.Value],
    window: int | None,
    real: ir.Value | None = None,
) -> ir.Value:
    """0 or ``MASKED`` from positions of keys and queries that broadcast against each other."""
    keys, queries = places
    seen = g.op(scope, "LessOrEqual", keys, queries)
    if window is not None:
        oldest = g.op(scope, "Sub", queries, g.constant(f"{scope}/window", [window]))
        seen = g.op(scope, "And", seen, g.op(scope, "Greater", keys, oldest))
    if real is not None:
        seen = g.op(scope, "And", seen, real)
    return g.op(scope, "Where", seen, g.constant("unmasked", 0.0), g.constant("masked", MASKED))


def split_heads(g: GraphBuilder, scope: str, x: ir.Value, heads: int, dim: int) -> ir.Value:
    """[batch, sequence, heads * dim] to [batch, heads, sequence, dim]."""
    split = g.op(scope, "Reshape", x, g.constant(f"split_{heads}_heads", [0, 0, heads, dim]))
    return g.op(scope, "Transpose", split, perm=[0, 2, 1, 3])


def merge_heads(g: GraphBuilder, scope: str, context: ir.Value, shape: Geometry) -> ir.Value:
    """The way back from ``split_heads``."""
    context = g.op(scope, "Transpose", context, perm=[0, 2, 1, 3])
    return g.op(scope, "Reshape", context, g.constant("merge_heads", [0, 0, shape.heads * shape.dim]))
