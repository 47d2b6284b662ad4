"""Paired latency of all-MiniLM-L6-v2 in onnxruntime, one CPU thread: every round runs every model once, in turn.

Two shapes of random tokens, and the STS-B test set: its 2758 sentences in batches of 32 by length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
import methods
import numpy as np
import sentences
from numpy.typing import NDArray

SHAPES = {(8, 128): 25, (1, 16): 300}  # (batch, sequence) to number of rounds
TEST_SET_ROUNDS = 3
WARM_UP = 3
SLOW = ["SkipLayerNormFusion"]  # what qexport.runtime switches off
MODELS = {
    "fp32": ("float", []),
    "qexport `float32`, session of qexport.runtime": ("qexport-float32-ort-cpu", SLOW),
    "**qexport `--int8`, ort-cpu**": ("qexport-ort-cpu", []),
    "**the same, session of qexport.runtime**": ("qexport-ort-cpu", SLOW),
    "qexport `int8-dynamic`": ("qexport-int8-dynamic", []),
    "onnxruntime dynamic": ("ort-dynamic", []),
    "the same without SkipLayerNormFusion": ("ort-dynamic", SLOW),
    "onnxruntime static u8s8, linear layers only": ("ort-u8s8-minmax-linears", []),
}
NOTE = (
    "all-MiniLM-L6-v2 in onnxruntime, CPU, one thread. Speed: median over the rounds of fp32's time divided by the "
    "row's in the same round (10 % and 90 % quantiles); milliseconds are medians. STS-B test: all 2758 sentences in "
    "batches of 32 by length, time of a whole pass (smallest and largest ratio of the passes)."
)
Call = Callable[[], object]
Times = NDArray[np.float64]  # [rounds, models], seconds


def opened(model: Path, disabled: list[str]) -> Any:
    """A session with one thread."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)


def bound(session: Any, feeds: sentences.Feeds) -> Call:
    """A call that runs the model once on ``feeds``."""
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return lambda: session.run(["last_hidden_state"], given)


def round_of(calls: Sequence[Call], turn: int) -> Times:
    """Seconds of each call, ``[models]``; each turn starts with another one."""
    times = np.zeros(len(calls))
    for place in np.roll(np.arange(len(calls)), turn):
        start = time.perf_counter()
        calls[place]()
        times[place] = time.perf_counter() - start
    return times


def shape_times(sessions: Sequence[Any], batch: int, length: int, count: int) -> Times:
    """Random tokens of one shape."""
    ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
    calls = [bound(session, sentences.pad(ids.tolist())) for session in sessions]
    return np.stack([round_of(calls, turn) for turn in range(count + WARM_UP)])[WARM_UP:]


def test_set_times(sessions: Sequence[Any]) -> Times:
    """Whole passes over the STS-B test set; the models take turns batch by batch."""
    path = measure.SAMPLES / "data/stsb-test.csv"
    texts = sentences.read_column(path, "sentence1") + sentences.read_column(path, "sentence2")
    feeds = [feeds for _, feeds in sentences.batches(sentences.tokenize(texts))]
    calls = [[bound(session, batch) for session in sessions] for batch in feeds]
    round_of(calls[-1], 0)
    return np.stack(
        [sum(round_of(batch, turn + i) for i, batch in enumerate(calls)) for turn in range(TEST_SET_ROUNDS)]
    )


def put(rows: Mapping[str, dict[str, object]], title: str, times: Times, unit: str) -> None:
    """Two more columns: the medians, and how many times as fast as the first row."""
    spread = 0.0 if unit == "s" else 0.1
    low, middle, high = np.quantile(times[:, :1] / times, [spread, 0.5, 1 - spread], axis=0)
    medians = np.median(times, axis=0)
    for i, row in enumerate(rows.values()):
        row[f"{title}, {unit}"] = f"{medians[i]:.2f}" if unit == "s" else f"{1e3 * medians[i]:.1f}"
        row[f"{title}, speed"] = f"{middle[i]:.2f}x ({low[i]:.2f} .. {high[i]:.2f})"


def main() -> None:
    """Measure both shapes and the test set."""
    files = {method: methods.run(method)[0] for method in dict.fromkeys(method for method, _ in MODELS.values())}
    rows: dict[str, dict[str, object]] = {title: {"": title} for title in MODELS}
    sessions = [opened(files[method], disabled) for method, disabled in MODELS.values()]
    put(rows, "STS-B test", test_set_times(sessions), "s")
    for (batch, length), count in SHAPES.items():
        put(rows, f"{batch} x {length}", shape_times(sessions, batch, length, count), "ms")
    measure.report("latency", list(rows.values()), NOTE)


if __name__ == "__main__":
    main()
