"""Paired latency: both models in turn in one run, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.running.execute import open_model
from qexport.exporter.outcome.result import Latency
from qexport.passes.target import Target
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions, available_providers

PAIRS = 15
SECONDS = 8.0  # time after which no further pair is begun, once there are MIN_PAIRS
MIN_PAIRS = 5
WARM_UP = 2


def measure(reference: ir.Model, result: ir.Model, feeds: Mapping[str, NDArray[Any]], target: Target) -> Latency:
    """Time one batch through both models in onnxruntime, one thread each; ``speedup`` above 1 means faster."""
    providers = measured_on(target)
    foreign = target.engine is not None or providers[:1] != target.providers[:1]
    options = SessionOptions(threads=1, providers=providers)
    sessions = open_model(reference, options), open_model(result, options)
    times = _pairs(sessions, feeds)
    ratios = times[:, 0] / times[:, 1]
    low, middle, high = (float(q) for q in np.quantile(ratios, [0.1, 0.5, 0.9]))
    return Latency(
        runtime=f"onnxruntime {providers[0].removesuffix('ExecutionProvider')}",
        threads=1,
        shapes={name: list(array.shape) for name, array in feeds.items()},
        pairs=len(ratios),
        reference_ms=1e3 * float(np.median(times[:, 0])),
        result_ms=1e3 * float(np.median(times[:, 1])),
        speedup=middle,
        speedup_low=low,
        speedup_high=high,
        foreign=foreign,
        note=_note(high, target, foreign=foreign),
    )


def measured_on(target: Target) -> tuple[str, ...]:
    """The target's execution providers that are here."""
    return tuple(name for name in target.providers if name in available_providers())


def _pairs(sessions: tuple[OrtSession, OrtSession], feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Seconds of each pair, ``[pairs, 2]``; the order within a pair alternates."""
    for session in sessions * WARM_UP:
        session.run(feeds)
    rows: list[list[float]] = []
    begin = time.perf_counter()
    while len(rows) < PAIRS and (len(rows) < MIN_PAIRS or time.perf_counter() - begin < SECONDS):
        row = [0.0, 0.0]
        for index in (0, 1) if len(rows) % 2 == 0 else (1, 0):
            start = time.perf_counter()
            sessions[index].run(feeds)
            row[index] = time.perf_counter() - start
        rows.append(row)
    return np.array(rows)


def _note(best: float, target: Target, *, foreign: bool) -> str:
    if foreign:
        return f"the file is laid out for {target.name}, so this says nothing about its speed there"
    return "" if best > 1 else "slower than float on this machine"
