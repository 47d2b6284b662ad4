"""Peak memory of calibrating and quantizing all-MiniLM-L6-v2 with 64 to 512 sentences: it must not grow."""

from __future__ import annotations

import csv

import measure
import sentences

COUNTS = (64, 128, 256, 512)
NOTE = "all-MiniLM-L6-v2, `--int8` for tensorrt-rtx; peak resident set until the last pass, a process for each row."


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
        rows.append(
            {"sentences": count, "peak RSS, GB": f"{cost['rss'] / 1e9:.3f}", "seconds": f"{cost['seconds']:.1f}"}
        )
    measure.report("memory", rows, NOTE)


if __name__ == "__main__":
    main()
