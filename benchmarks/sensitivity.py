"""What the defaults of ``calibrate`` and ``quantize`` cost and buy, on the STS-B dev split."""

from __future__ import annotations

from collections.abc import Iterator

import measure

from qexport.exporter.load import Source, load_source
from qexport.exporter.quality import compare
from qexport.exporter.recipe import instantiate, load_recipe, override
from qexport.exporter.samples import Samples, open_samples
from qexport.passes.pipeline import run
from qexport.passes.target import find_target

METHODS = ("minmax", "percentile", "entropy", "mse", "output-mse")
THRESHOLDS = (0, 20, 22, 24, 26)  # dB
TARGETS = {"tensorrt-rtx": THRESHOLDS[1:], "ort-cpu": ()}  # thresholds tried with the default method
NOTE = (
    "all-MiniLM-L6-v2, STS-B dev, 1500 pairs; 512 calibration sentences from STS-B train. Cosine to fp32's embedding. "
    "The rows are before the cast to half precision; a node whose output has a lower SQNR than min_sqnr stays in float."
)


def main() -> None:
    """Compare methods without a threshold, then thresholds with the default method."""
    source = load_source(measure.minilm_folder())
    rows = []
    for target, thresholds in TARGETS.items():
        for method in METHODS:
            rows += list(measured(source, target, method, (0,)))
        if thresholds:
            rows += list(measured(source, target, "mse", thresholds))
    measure.report("sensitivity", rows, NOTE)


def measured(source: Source, target: str, method: str, thresholds: tuple[int, ...]) -> Iterator[measure.Row]:
    """One row for each threshold; calibration runs once."""
    recipe = override(load_recipe("int8"), [f"export.target={target}", f"calibrate.method={method}"])
    data = measure.SAMPLES / "data"
    samples = open_samples(source, recipe, data / "stsb-calibration.csv", data / "stsb-dev.csv")
    steps = instantiate(recipe, {"data": samples.calibration})
    calibrated, _ = run(source.model, [step for step in steps if step[0] not in ("quantize", "half")])
    for threshold in thresholds:
        chosen = override(recipe, [f"quantize.min_sqnr={threshold}"])
        last = [step for step in instantiate(chosen, {"data": samples.calibration}) if step[0] == "quantize"]
        result, records = run(calibrated, last)
        kept = sum("SQNR" in decision.reason for decision in records[0].decisions)
        yield (
            {"target": target, "method": method, "min_sqnr, dB": threshold}
            | judged(source, result, samples, target)
            | {"nodes left in float": kept}
        )


def judged(source: Source, result: object, samples: Samples, target: str) -> measure.Row:
    """Quality of one model on the dev split."""
    quality = compare(source.model, result, samples.judge, find_target(target))
    return {
        "Spearman x100": f"{quality.task.result:.2f}",
        "mean cosine": f"{quality.cosine_mean:.4f}",
        "worst cosine": f"{quality.cosine_worst:.3f}",
    }


if __name__ == "__main__":
    main()
