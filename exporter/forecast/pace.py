"""Seconds: how long a sample takes here, and what that makes of the stages of a build.

A sample is run a few times; the rest is counted in runs of the float model, with constants that were fitted to builds
of a sentence encoder, a convolutional network and a small decoder on two cores. They are good for a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.calibration.running.execute import open_model
from qexport.exporter.proof.layout import Feeds
from qexport.exporter.proof.quality import TIMED_BATCH
from qexport.passes.target import Target
from qexport.runtime.session import SessionOptions

ROUNDS = 3
UNIT = 1 << 22  # numbers that are rounded in a unit of arithmetic


@dataclass(frozen=True, slots=True)
class Work:
    """What a step costs beside its own rewriting of the graph.

    Attributes:
        runs: Of the float model, for every sample it looks at.
        units: Units of arithmetic for every layer it decides about.
        samples: How many samples it looks at, where that is not what the recipe says.
        layers: Runs of the float model for every sample and layer.
    """

    runs: float = 0.0
    units: float = 0.0
    samples: int = 0
    layers: float = 0.0


WORK = {
    "observe": Work(runs=1.6),
    "extremes": Work(runs=2.0),
    "smooth": Work(units=1.5),
    "calibrate": Work(runs=1.6, units=12.0),
    "triage": Work(samples=16, layers=1.0, units=2.0),
    "awq": Work(runs=2.0, units=10.0),
    "gptq": Work(runs=2.0, units=10.0),
    "adaround": Work(runs=2.0, units=200.0),
    "correct-bias": Work(runs=2.0, units=1.0),
    "sparsify": Work(runs=8.0, units=40.0),
    "heads": Work(samples=64, layers=1.0),
    "neurons": Work(runs=2.0, units=10.0),
    "channels": Work(runs=2.0, units=10.0),
    "layers": Work(samples=64, layers=1.0),
}
"""By the name of the step."""

JUDGED = {True: 1.8, False: 1.5}
"""Runs of the float model for every sample that both models are judged on, by whether Q/DQ are taken literally."""

PAIRS, PAIR_SECONDS = 17, 8.0
WRITTEN = 200e6  # bytes in a second, digests included
ENGINE_SECONDS, ENGINE_NODE_SECONDS = 1.5, 0.006
REPORT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast this machine is with a model.

    Attributes:
        run: Seconds of one sample.
        unit: Seconds of a fixed piece of arithmetic in numpy.
        opening: Seconds until a session stands.
        loading: Seconds that loading took.
    """

    run: float
    unit: float
    opening: float
    loading: float


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much there is to do.

    Attributes:
        steps: Names of the steps that look at data, and of those that search by what was seen.
        own: Seconds that the passes took by themselves.
        proofs: How many steps are proven equal.
        calibration: Samples that steps look at.
        judged: Samples that both models are judged on.
        layers: Layers that may be quantized.
        nodes: Of the result.
        bytes: Of the result as a file.
    """

    steps: Collection[str]
    own: float
    proofs: int
    calibration: int
    judged: int
    layers: int
    nodes: int
    bytes: int


def measure_pace(model: ir.Model, feeds: Iterable[Feeds], loading: float) -> Pace:
    """Open the float model and run the feeds a few times, one thread; inputs have their batch axis first."""
    start = time.perf_counter()
    session = open_model(model, SessionOptions(threads=1))
    opening = time.perf_counter() - start
    taken = list(feeds)
    rows = sum(_rows(feed) for feed in taken)
    if not rows:
        return Pace(0.0, _unit(), opening, loading)
    for feed in taken:
        session.run(feed)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for feed in taken:
            session.run(feed)
    return Pace((time.perf_counter() - start) / (ROUNDS * rows), _unit(), opening, loading)


def _unit() -> float:
    numbers = np.linspace(-1, 1, UNIT, dtype=np.float32)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        np.square(np.rint(numbers * np.float32(127)) - numbers).sum()
    return (time.perf_counter() - start) / ROUNDS


def _rows(feed: Feeds) -> int:
    return max((array.shape[0] for array in feed.values() if array.ndim), default=1)


def stages(pace: Pace, found: Amounts, target: Target, *, engine: bool) -> dict[str, float]:
    """Seconds of every stage of a build, by its name."""
    seconds = {"load": pace.loading, "recipe": _recipe(pace, found)}
    if found.judged:
        seconds["verify"] = 2 * pace.opening + JUDGED[target.engine is not None] * found.judged * pace.run
        seconds["latency"] = 2 * pace.opening + min(PAIR_SECONDS, 2 * PAIRS * TIMED_BATCH * pace.run)
    if found.judged and found.layers and target.engine is None:
        seconds["profile"] = 2 * pace.opening + 2 * PAIRS * TIMED_BATCH * pace.run
    seconds["write"] = found.bytes / WRITTEN
    if engine:
        seconds["engine"] = ENGINE_SECONDS + ENGINE_NODE_SECONDS * found.nodes
    seconds["report"] = REPORT_SECONDS
    return {name: round(value, 2) for name, value in seconds.items()}


def _recipe(pace: Pace, found: Amounts) -> float:
    total = found.own + found.proofs * (pace.opening + TIMED_BATCH * pace.run)
    for name in found.steps:
        work = WORK.get(name, Work())
        samples = min(work.samples or found.calibration, found.calibration)
        total += pace.opening * bool(work.runs or work.layers) + work.units * found.layers * pace.unit
        total += samples * pace.run * (work.runs + work.layers * found.layers)
    return total
