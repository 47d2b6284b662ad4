"""What the defaults of ``calibrate`` and ``quantize`` cost and buy, on the STS-B dev split; what each layer loses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import takewhile

import measure

from qexport.exporter.load import Source, load_source
from qexport.exporter.options import BuildOptions
from qexport.exporter.precision.lab import Question
from qexport.exporter.precision.sensitivity import analyse
from qexport.exporter.proof.quality import compare
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.samples import Samples, open_samples
from qexport.passes.pipeline import run
from qexport.passes.target import find_target

METHODS = ("minmax", "percentile", "entropy", "mse", "output-mse")
DEFAULT = "output-mse"
THRESHOLDS = (0, 20, 22, 24, 26)  # dB
TARGETS = {"tensorrt-rtx": THRESHOLDS[1:], "ort-cpu": ()}  # thresholds tried with the default method
NOTE = (
    "all-MiniLM-L6-v2, STS-B dev, 1500 pairs; 512 calibration sentences from STS-B train. Cosine to fp32's embedding. "
    "The rows are before the cast to half precision and without triage; a node whose output has a "
    "lower SQNR than min_sqnr stays in float."
)
EXCERPT = "64 sentences of STS-B dev"


def main() -> None:
    """Compare methods without a threshold, then thresholds with the default method."""
    source = load_source(measure.minilm_folder())
    rows = []
    for target, thresholds in TARGETS.items():
        for method in METHODS:
            rows += list(measured(source, target, method, (0,)))
        if thresholds:
            rows += list(measured(source, target, DEFAULT, thresholds))
    measure.report("sensitivity", rows, NOTE)
    report_layers()


def report_layers() -> None:
    """The tables of ``qexport sensitivity`` for both kinds of integers."""
    data = measure.SAMPLES / "data"
    groups, layers = [], []
    for target in TARGETS:
        began = time.perf_counter()
        asked = BuildOptions(target=target)
        question = Question(
            measure.minilm_folder(), "int8", data / "stsb-calibration.csv", data / "stsb-dev.csv", asked
        )
        found = analyse(question)
        seconds = time.perf_counter() - began
        groups += [
            {"target": target, "left in float": row.left_out, "tensors": row.tensors, "SQNR, dB": f"{row.sqnr:.1f}"}
            | {"mean cosine": f"{row.cosine_mean:.3f}", "worst cosine": f"{row.cosine_worst:.3f}"}
            for row in found.activations
        ]
        worst = found.layers[0]
        layers.append(
            {"target": target, "layers": len(found.layers), "most sensitive": worst.node}
            | {"its SQNR, dB": f"{worst.sqnr:.1f}", "rank correlation": f"{found.correlation:.2f}"}
            | {"seconds, all of it": f"{seconds:.0f}"}
        )
    measure.report("activations", groups, f"all-MiniLM-L6-v2, all activations in 8 bits but one group, {EXCERPT}.")
    note = f"all-MiniLM-L6-v2, each layer alone in 8 bits against its Fisher estimate, {EXCERPT}."
    measure.report("layers", layers, note)


def measured(source: Source, target: str, method: str, thresholds: tuple[int, ...]) -> Iterator[measure.Row]:
    """One row for each threshold; calibration runs once."""
    recipe = override(
        load_recipe("int8"), [f"export.target={target}", f"calibrate.method={method}", "triage.enabled=false"]
    )
    data = measure.SAMPLES / "data"
    samples = open_samples(source, recipe, data / "stsb-calibration.csv", data / "stsb-dev.csv")
    steps = instantiate(recipe, {"data": samples.calibration})
    before = takewhile(lambda step: not step[1].quantizes, steps)
    calibrated, _ = run(source.model, before)
    for threshold in thresholds:
        chosen = override(recipe, [f"quantize.min_sqnr={threshold}"])
        last = [step for step in instantiate(chosen, {"data": samples.calibration}) if step[1].quantizes]
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
