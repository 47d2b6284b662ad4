"""Paired latency of all-MiniLM-L6-v2 in onnxruntime, one CPU thread: every round runs every model once, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import measure
import methods
import numpy as np
import sentences

SHAPES = {(8, 128): 25, (1, 16): 300}  # (batch, sequence) to number of rounds
WARM_UP = 3
SLOW = ["SkipLayerNormFusion"]  # what qexport.runtime switches off
MODELS = {
    "fp32": ("float", []),
    "fp32, session of qexport.runtime": ("float", SLOW),
    "**qexport `--int8`, ort-cpu**": ("qexport-ort-cpu", []),
    "**the same, session of qexport.runtime**": ("qexport-ort-cpu", SLOW),
    "onnxruntime dynamic": ("ort-dynamic", []),
    "onnxruntime static u8s8, linear layers only": ("ort-u8s8-minmax-linears", []),
}
NOTE = (
    "all-MiniLM-L6-v2 in onnxruntime, CPU, one thread. Speed: median over the rounds of fp32's time divided by the "
    "row's in the same round (10 % and 90 % quantiles); milliseconds are medians."
)
Call = Callable[[], object]


def opened(model: Path, disabled: list[str], feeds: sentences.Feeds) -> Call:
    """A call that runs the model once on ``feeds``."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return lambda: session.run(["last_hidden_state"], given)


def rounds(calls: Mapping[str, Call], count: int) -> np.ndarray:
    """Seconds [rounds, models]; each round starts with another model."""
    times = np.zeros((count + WARM_UP, len(calls)))
    for turn in range(len(times)):
        for place in np.roll(np.arange(len(calls)), turn):
            start = time.perf_counter()
            list(calls.values())[place]()
            times[turn, place] = time.perf_counter() - start
    return times[WARM_UP:]


def main() -> None:
    """Measure both shapes."""
    files = {method: methods.run(method)[0] for method in dict.fromkeys(method for method, _ in MODELS.values())}
    rows: dict[str, dict[str, object]] = {title: {"": title} for title in MODELS}
    for (batch, length), count in SHAPES.items():
        ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
        feeds = sentences.pad(ids.tolist())
        calls = {title: opened(files[method], disabled, feeds) for title, (method, disabled) in MODELS.items()}
        times = rounds(calls, count)
        ratios = times[:, :1] / times
        low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9], axis=0)
        for i, title in enumerate(MODELS):
            rows[title][f"{batch} x {length}, ms"] = f"{1e3 * np.median(times[:, i]):.1f}"
            rows[title][f"{batch} x {length}, speed"] = f"{middle[i]:.2f}x ({low[i]:.2f} .. {high[i]:.2f})"
    measure.report("latency", list(rows.values()), NOTE)


if __name__ == "__main__":
    main()
