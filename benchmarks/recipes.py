"""Shipped recipes on all-MiniLM-L6-v2 and on the decoder sample: one ``qexport build`` each, judged by itself.

``python benchmarks/recipes.py [MODEL:RECIPE:TARGET ...]`` builds the rows that are named, or all of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure

ROWS = (
    "minilm:float16:tensorrt-rtx",
    "minilm:bfloat16:tensorrt-rtx",
    "minilm:fp8:tensorrt-rtx",
    "minilm:int8:tensorrt-rtx",
    "minilm:smoothquant-o3:tensorrt-rtx",
    "minilm:llm-int8:tensorrt-rtx",
    "minilm:int8-weights:tensorrt-rtx",
    "minilm:int4-weights:tensorrt-rtx",
    "minilm:sparse-int8:tensorrt-rtx",
    "minilm:prune-heads:tensorrt-rtx",
    "minilm:compact:tensorrt-rtx",
    "minilm:int8:ort-cpu",
    "minilm:int8-dynamic:ort-cpu",
    "minilm:smoothquant-o1:ort-cpu",
    "minilm:smoothquant-o2:ort-cpu",
    "minilm:llm-int8:ort-cpu",
    "minilm:nf4-weights:ort-cpu",
    "minilm:prune-heads:ort-cpu",
    "minilm:compact:ort-cpu",
    "decoder:int8:tensorrt-rtx",
    "decoder:int4-gptq:tensorrt-rtx",
    "decoder:int8:ort-cpu",
    "decoder:int8-dynamic:ort-cpu",
    "decoder:compact:ort-cpu",
    "decoder:int4-weights:ort-cpu",
    "decoder:int4-gptq:ort-cpu",
    "decoder:int4-awq:ort-cpu",
)
DECODER = measure.SAMPLES / "decoder"
MODELS = {
    "minilm": (
        measure.minilm_folder,
        measure.SAMPLES / "data/stsb-calibration.csv",
        measure.SAMPLES / "data/stsb-test.csv",
    ),
    "decoder": (lambda: DECODER / "target", DECODER / "calibration.txt", DECODER / "heldout.txt"),
}
NOTE = (
    "One build for each row, all recipes at their defaults. all-MiniLM-L6-v2: Spearman x100 on the STS-B test set and "
    "cosine to fp32's embedding; the decoder of samples/decoder: perplexity on held-out text and cosine of its logits. "
    "Smoothed, Mul left: layers whose scales were folded, and Mul nodes that this added to the graph. "
    "Speed is the build's own paired latency in onnxruntime on the CPU, for the CPU target alone. Engines are built, "
    "not run."
)


def build(model: str, recipe: str, target: str) -> dict[str, Any]:
    """One row, in this process."""
    import qexport
    from qexport.exporter.options import BuildOptions
    from qexport.runtime.memory import return_freed_blocks

    return_freed_blocks()  # as the command line does
    source, calibration, evaluation = MODELS[model]
    start = time.perf_counter()
    options = BuildOptions(target=target, output=measure.WORK / f"recipes/{model}-{recipe}-{target}")
    result = qexport.build(source(), recipe=recipe, calib=calibration, eval=evaluation, options=options)
    quality, latency, engine = result.quality, result.latency, result.engine
    return {
        "task": None if quality is None or quality.task is None else [quality.task.reference, quality.task.result],
        "mean": None if quality is None else quality.cosine_mean,
        "worst": None if quality is None else quality.cosine_worst,
        "bytes": result.bytes_after,
        "engine": None if engine is None else engine.bytes,
        "speed": None if latency is None or latency.foreign else latency.speedup,
        "seconds": time.perf_counter() - start,
        "rss": measure.peak_rss(),
        "quantized": result.quantized,
        "muls": left_over(source(), recipe, target, calibration),
    }


def left_over(path: Path, name: str, target: str, calibration: Path) -> tuple[int, int] | None:
    """How many values ``smooth`` divides, and how many more Mul nodes the graph has after it."""
    from qexport.exporter.load import load_source
    from qexport.exporter.recipe import instantiate
    from qexport.exporter.recipe_files import load_recipe, override
    from qexport.exporter.samples import open_samples
    from qexport.passes.pipeline import run

    source, recipe = load_source(path), override(load_recipe(name), [f"export.target={target}"])
    steps = instantiate(recipe, {"data": open_samples(source, recipe, calibration, None).calibration})
    at = next((index for index, (known, _) in enumerate(steps) if known == "smooth"), None)
    if at is None:
        return None
    before, _ = run(source.model, steps[:at])
    after, (record,) = run(before, steps[at : at + 1])
    counts = [sum(node.op_type == "Mul" for node in model.graph.all_nodes()) for model in (before, after)]
    return sum(decision.action == "folded" for decision in record.decisions), counts[1] - counts[0]


def row(name: str, found: dict[str, Any]) -> measure.Row:
    """One line of the table."""
    model, recipe, target = name.split(":")
    before, after = found["task"] or (None, None)
    return {
        "model": model,
        "recipe": f"`{recipe}`",
        "target": target,
        "quantized": found["quantized"],
        "task": None if after is None else f"{before:.2f} -> {after:.2f}",
        "mean cosine": f"{found['mean']:.4f}",
        "worst cosine": f"{found['worst']:.3f}",
        "file, MB": f"{found['bytes'] / 1e6:.1f}",
        "engine, MB": None if found["engine"] is None else f"{found['engine'] / 1e6:.1f}",
        "speed": None if found["speed"] is None else f"{found['speed']:.2f}x",
        "smoothed, Mul left": None if found["muls"] is None else "{}, {}".format(*found["muls"]),
        "build, s": f"{found['seconds']:.0f}",
        "peak RSS, GB": f"{found['rss'] / 1e9:.2f}",
    }


def main(chosen: Sequence[str]) -> None:
    """Build the rows, each in a process of its own."""
    names = [name for name in ROWS if not chosen or name in chosen]
    measure.report("recipes", [row(name, measure.run_child("recipes.py", "--one", name)) for name in names], NOTE)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(build(*sys.argv[2].split(":"))))
    else:
        main(sys.argv[1:])
