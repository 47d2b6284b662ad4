"""Wall time of ``qexport --help``: the median of 15 runs after one to warm up."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import measure

RUNS = 15


def main() -> None:
    """Time the installed script."""
    command = [str(Path(sys.executable).with_name("qexport")), "--help"]
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    measured = times[1:]
    row = {
        "": "`qexport --help`",
        "median, s": f"{statistics.median(measured):.3f}",
        "worst, s": f"{max(measured):.3f}",
    }
    measure.report("startup", [row], f"{RUNS} runs.")


if __name__ == "__main__":
    main()
