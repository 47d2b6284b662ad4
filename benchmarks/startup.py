"""Wall time of ``qexport --help`` and of building MiniLM's graph: the median of 15 runs after one to warm up."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import measure

from qexport.exporter.load import load_model

RUNS = 15


def main() -> None:
    """Time the installed script, and the front door for Hugging Face folders."""
    command = [str(Path(sys.executable).with_name("qexport")), "--help"]
    rows = [
        row("`qexport --help`", lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)),
        row("MiniLM's graph from config and safetensors", lambda: load_model(measure.minilm_folder())),
    ]
    measure.report("startup", rows, f"{RUNS} runs.")


def row(title: str, call: Callable[[], object]) -> measure.Row:
    """Time one thing."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {"": title, "median, s": f"{statistics.median(times[1:]):.3f}", "worst, s": f"{max(times[1:]):.3f}"}


if __name__ == "__main__":
    main()
