"""Everything that a report shows, as plain values: what is gathered, written as data, and drawn.

Numbers are finite; ``None`` says that something was not measured or does not exist, and ``Report.missing`` why a panel
has nothing. Names are those of the model and may hold anything: who shows them escapes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SCHEMA: Literal["qexport.report/1"] = "qexport.report/1"
PANELS = ("sqnr", "tornado", "pareto", "roofline", "activations", "weights", "samples")
"""The keys of ``Report.missing``."""

State = Literal["quantized", "float", "kept", "backed off", "gone"]
Word = Literal["better", "as good", "mixed", "worse", "unmeasured"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What one step did about one node, or refused to do, and why."""

    step: str
    action: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """One row of the table; "before" is the float model, "after" the result.

    Attributes:
        name: As in the result, or in the float model where it is gone.
        op: Its operator.
        block: The name up to its last ``/`` or ``.``.
        state: ``gone`` says that it was fused or folded into others.
        activation: The type of what it multiplies, as ``inspect`` calls it; empty where there is none.
        weight: The same of its weight.
        scale: Of the activation, per tensor.
        zero_point: The same.
        weight_scale: The smallest and the largest of all channels or blocks.
        sqnr_own: Signal over the noise of this layer alone, dB.
        sqnr: Signal over the noise of this layer and of all before it, dB.
        error: Relative squared error of the model's output with this layer alone quantized.
        ms_before: Milliseconds in the float model, by the runtime's profile.
        ms_after: The same in the result.
        bytes_before: Of the initializers that it reads, before anything was cut or quantized.
        bytes_after: The same in the result.
        why: What the steps decided, in their order.
    """

    name: str
    op: str
    block: str
    state: State
    activation: str = ""
    weight: str = ""
    scale: float | None = None
    zero_point: int | None = None
    weight_scale: tuple[float, float] | None = None
    sqnr_own: float | None = None
    sqnr: float | None = None
    error: float | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    why: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A range that a method would have chosen.

    ``clipped`` is the share of the values outside of it, from 0 to 1; ``noise`` the squared error of the values over
    their squares.
    """

    method: str
    low: float
    high: float
    clipped: float
    noise: float


@dataclass(frozen=True, slots=True)
class Activation:
    """What was seen at one tensor during calibration.

    Attributes:
        value: Its name.
        readers: Names of the nodes that read it.
        kind: The 8-bit numbers it is stored in.
        low: The smallest value seen.
        high: The largest.
        scale: What one step of the numbers is worth.
        zeros: How many values were exactly 0; they are in no bin.
        total: How many there were.
        edges: Of equal bins between the extremes, one more than ``counts``.
        counts: Values in each bin.
        candidates: "chosen" first, then minmax, percentile, entropy, mse.
    """

    value: str
    readers: tuple[str, ...]
    kind: str
    low: float
    high: float
    scale: float | None
    zeros: int
    total: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Channel:
    """The values of one output channel of a weight: extremes and quartiles."""

    index: int
    low: float
    q25: float
    q50: float
    q75: float
    high: float


@dataclass(frozen=True, slots=True)
class Weights:
    """One float weight before it was rounded, with what was folded into it, by output channel.

    Attributes:
        node: Who reads it.
        axis: Which axis the channels are on.
        channels: How many.
        spread: 0, 25, 50, 75 and 100 percent of the channels' largest absolute values.
        outlier: The largest of these over their median.
        worst: Those with the largest, in that order.
    """

    node: str
    axis: int
    channels: int
    spread: tuple[float, ...]
    outlier: float
    worst: tuple[Channel, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One choice of layers in 8 bits: what it costs and what it wins.

    Attributes:
        label: What it is called.
        kept: How many nodes stay in float.
        loss: How much worse than float, in ``unit``; ``None`` where it was too slow to be judged.
        unit: Of the loss; points of different units cannot be compared.
        bytes: Of the model.
        ms: Of one call.
        speedup: Against float.
        measured: Whether it was built and judged; else it is estimated.
        fits: Whether it holds the gates.
        chosen: Whether it is what was published.
        pareto: Whether no other measured point of its unit is as good in loss, size and time, and better in one.
    """

    label: str
    kept: int
    loss: float | None
    unit: str
    bytes: int
    ms: float | None
    speedup: float | None
    measured: bool
    fits: bool
    chosen: bool
    pareto: bool


@dataclass(frozen=True, slots=True)
class Dot:
    """One operator on the roofline; ``intensity`` is in operations per byte, ``rate`` in operations per second."""

    node: str
    model: Literal["float", "result"]
    intensity: float
    rate: float
    ms: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the machine can do, in operations and bytes per second, and where the operators stand."""

    machine: str
    threads: int
    flops: float
    flops_int8: float | None
    memory: float
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample of the evaluation data; ``picture`` is a PNG in base64, or empty."""

    index: int
    cosine: float
    text: str = ""
    shapes: str = ""
    picture: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of the build in a word, in a sentence, and the facts behind it."""

    word: Word
    sentence: str
    facts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """All that a report shows beside ``Result``; ``missing`` maps a panel to the reason why it is empty."""

    verdict: Verdict
    nodes: tuple[Node, ...] = ()
    activations: tuple[Activation, ...] = ()
    weights: tuple[Weights, ...] = ()
    points: tuple[Point, ...] = ()
    roofline: Roofline | None = None
    samples: tuple[Sample, ...] = ()
    deciles: tuple[float, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    schema: Literal["qexport.report/1"] = SCHEMA
