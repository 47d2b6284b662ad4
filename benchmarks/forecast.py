"""What ``qexport plan`` foretells beside what ``qexport build`` then takes: seconds, disk, memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import measure

from qexport.exporter.forecast.forecast import Question, forecast
from qexport.exporter.options import BuildOptions

NOTE = (
    "Foretold, taken, and the first over the second. Seconds of the build as a command, without the start of the "
    "interpreter; disk of the artefact and the cache; memory is the peak resident set. Each build has all its data, "
    "runs by itself, and starts with an empty cache."
)
DATA, RESNET = measure.SAMPLES / "data", measure.SAMPLES / "resnet20"
SENTENCES = (DATA / "stsb-calibration.csv", DATA / "stsb-test.csv")
IMAGES = (RESNET / "calibration.npz", RESNET / "test.npz")


def cases() -> Iterator[tuple[str, Path, str | Path, tuple[Path, Path], str]]:
    """Name, model, recipe, data to calibrate and to judge with, target."""
    minilm, resnet = measure.minilm_folder(), RESNET / "resnet20.onnx"
    for target in ("ort-cpu", "tensorrt-rtx"):
        yield "all-MiniLM-L6-v2, int8", minilm, "int8", SENTENCES, target
        yield "ResNet-20, its own int8", resnet, RESNET / "int8.toml", IMAGES, target
    yield "all-MiniLM-L6-v2, float16", minilm, "float16", SENTENCES, "tensorrt-rtx"
    yield "all-MiniLM-L6-v2, smoothquant-o2", minilm, "smoothquant-o2", SENTENCES, "ort-cpu"


def row(name: str, model: Path, recipe: str | Path, data: tuple[Path, Path], target: str) -> measure.Row:
    """Ask, build, compare."""
    place = measure.WORK / "forecast"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    cache, calib, judge = place / "cache", *data
    told = forecast(Question(model, recipe, calib, judge, BuildOptions(target=target, cache=cache)))
    words = ["build", model, "--recipe", recipe, "--calib", calib, "--eval", judge, "--target", target]
    command = [sys.executable, "-m", "qexport", *words, "--cache", cache, "-o", place / "out"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    built = json.loads((place / "out/result.json").read_text("utf-8"))
    disk = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    seconds = sum(told.seconds.values())
    return {
        "": name,
        "target": target,
        "seconds": compared(seconds, built["seconds"], 1),
        "disk, MB": compared(told.disk, disk, 1e6),
        "memory, MB": compared(told.memory, built["peak_rss_bytes"], 1e6),
    }


def compared(told: float, taken: float, unit: float) -> str:
    """Both and their ratio."""
    return f"{told / unit:.0f}, {taken / unit:.0f}: {told / taken:.2f}"


def main() -> None:
    """Measure and write the table."""
    measure.report("forecast", [row(*case) for case in cases()], NOTE)


if __name__ == "__main__":
    main()
