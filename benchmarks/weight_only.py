"""Perplexity of the decoder sample with weights in few bits: nearest, AWQ, GPTQ and NF4 beside float."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import measure

from qexport.calibration.gptq import ROUNDING_KEY
from qexport.exporter.load import Source, load_source
from qexport.exporter.proof.quality import compare
from qexport.exporter.recipe import Recipe, instantiate
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.samples import Samples, open_samples
from qexport.passes.pipeline import run
from qexport.passes.target import find_target

TARGET = "ort-cpu"
FOLDER = measure.SAMPLES / "decoder"
GRIDS = ((4, 32), (4, 128), (4, 0), (3, 32), (3, 128), (3, 0))  # bits, group
VARIANTS_AT = 128  # group that the variants of GPTQ are measured with
METHODS = {
    "nearest": ("int4-weights", ("weight-only.clip=false",)),
    "nearest, ranges searched": ("int4-weights", ()),
    "AWQ": ("int4-awq", ()),
    "GPTQ": ("int4-gptq", ()),
    "GPTQ, whole ranges": ("int4-gptq", ("gptq.clip=false",)),
    "GPTQ, every product behind rounded ones": ("int4-gptq", ("gptq.sequential=true",)),
    "GPTQ, inputs in the order of storage": ("int4-gptq", ("gptq.act_order=false",)),
}
LAST = ("weight-only", "nf4", "half")
STEPS = {"int4-weights": "weight-only", "int4-awq": "awq", "int4-gptq": "gptq"}
NOTE = (
    "samples/decoder/target, 43 products; 128 windows of 128 tokens of samples/decoder/calibration.txt, perplexity on "
    "heldout.txt. Products with 704 inputs have groups of 64 where others have 128. Loss is perplexity over float's, "
    "and its share of what rounding to the nearest on the same grid loses. Activations stay in float. Output error is "
    "that of GPTQ over that of the nearest codes, the mean (geometric) and the worst of all products."
)


def main() -> None:
    """Measure all methods on all grids, then NF4."""
    source = load_source(FOLDER / "target")
    rows: list[dict[str, str | None]] = []
    for bits, group in GRIDS:
        grid = f"int{bits}, {f'groups of {group}' if group else 'per channel'}"
        rows += [{"weights": grid, **row} for row in on_grid(source, bits, group)]
    fields, _, reference = measured(source, load_recipe("nf4-weights"))
    rows.append({"weights": "NF4, blocks of 64", "method": "nearest", **fields})
    first = {"weights": "float32", "method": "", "perplexity": f"{reference:.3f}"}
    head = dict.fromkeys(key for row in rows for key in row)
    measure.report("weight_only", [{**head, **row} for row in (first, *rows)], NOTE)


def on_grid(source: Source, bits: int, group: int) -> Iterator[dict[str, str | None]]:
    """One row for each method."""
    nearest = 0.0
    for method, (name, settings) in METHODS.items():
        if method.startswith("GPTQ, ") and group != VARIANTS_AT:
            continue
        grids = [f"{step}.{key}" for step in {STEPS[name], "weight-only"} for key in (f"bits={bits}", f"group={group}")]
        recipe = override(load_recipe(name), [*grids, *settings, "weight-only.accuracy_level=0"])
        fields, loss, _ = measured(source, recipe)
        nearest = nearest or loss
        yield {"method": method, **fields, "of nearest's loss": f"{loss / nearest:.0%}"}


def measured(source: Source, recipe: Recipe) -> tuple[dict[str, str | None], float, float]:
    """Fields of a row, the loss of perplexity, and the perplexity in float."""
    recipe = override(recipe, [f"export.target={TARGET}"])
    samples: Samples = open_samples(source, recipe, FOLDER / "calibration.txt", FOLDER / "heldout.txt")
    start = time.perf_counter()
    steps = instantiate(recipe, {"data": samples.calibration})
    rounded, _ = run(source.model, [step for step in steps if step[0] not in LAST])
    result, _ = run(rounded, [step for step in steps if step[0] in LAST])
    seconds = time.perf_counter() - start
    quality = compare(source.model, result, samples.judge, find_target(TARGET))
    loss = quality.task.result - quality.task.reference
    notes = [node.meta[ROUNDING_KEY] for node in rounded.graph if ROUNDING_KEY in node.meta]
    ratios = [note.chosen / note.nearest for note in notes]
    fields = {
        "perplexity": f"{quality.task.result:.3f}",
        "loss": f"{loss:.3f}",
        "of nearest's loss": None,
        "output error": f"{statistics.geometric_mean(ratios):.2f}, {max(ratios):.2f}" if ratios else None,
        "seconds": f"{seconds:.1f}",
    }
    return fields, loss, quality.task.reference


if __name__ == "__main__":
    main()
