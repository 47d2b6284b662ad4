"""Peak memory of building all-MiniLM-L6-v2 with 64 to 512 sentences: it must not grow; and the seconds of it all."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import measure
import sentences

COUNTS = (64, 128, 256, 512)
NOTE = (
    "all-MiniLM-L6-v2, `--int8` for tensorrt-rtx, a process for each number. Passes: until the last one; peak resident "
    "set. Whole build: the command `qexport build` from start to end, with proof, judging on the 2758 sentences of "
    "STS-B test, latency, a cache that is filled, and engine (built in a process of its own, whose memory is not "
    "counted)."
)


def main() -> None:
    """Build with ever more sentences of the calibration slice."""
    measure.WORK.mkdir(parents=True, exist_ok=True)
    texts = sentences.read_column(measure.SAMPLES / "data/stsb-calibration.csv", "sentence")
    rows = []
    for count in COUNTS:
        # evenly spaced, so that the longest sentences are spread over all slices
        chosen = texts[:: len(texts) // count][:count]
        path = measure.WORK / f"sentences-{count}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["sentence"], *([text] for text in chosen)])
        folder = measure.WORK / f"memory-{count}"
        cost = measure.run_child("methods.py", "qexport-tensorrt-rtx", str(folder), str(path))
        seconds, peak = whole_build(path, measure.WORK / f"whole-{count}")
        rows.append(
            {
                "sentences": count,
                "passes: peak RSS, GB": f"{cost['rss'] / 1e9:.3f}",
                "passes, s": f"{cost['seconds']:.1f}",
                "whole build: peak RSS, GB": f"{peak / 1e9:.3f}",
                "whole build, s": f"{seconds:.1f}",
            }
        )
    measure.report("memory", rows, NOTE)


def whole_build(calibration: Path, folder: Path) -> tuple[float, int]:
    """Seconds and peak resident set, in bytes, of the command."""
    cache = measure.WORK / "memory-cache"
    shutil.rmtree(cache, ignore_errors=True)
    options = ["--int8", "--target", "tensorrt-rtx", "--calib", str(calibration), "-o", str(folder), "--json"]
    options += ["--cache", str(cache)]
    judged = ["--eval", str(measure.SAMPLES / "data/stsb-test.csv")]
    command = [sys.executable, "-m", "qexport", "build", str(measure.minilm_folder()), *options, *judged]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, int(json.loads(done.stdout)["peak_rss_bytes"])


if __name__ == "__main__":
    main()
