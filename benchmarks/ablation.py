"""Each technique on and off, on top of the recipe's default: MiniLM on STS-B for two targets, and ResNet-20.

What the recipe does by default is left out once, what it does not do is put in once. Choices are made on the dev split;
the test split is there to see that they hold. A technique belongs into the default only if it never loses.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import images
import measure
import methods
import numpy as np
import onnx_ir as ir
import sentences
from numpy.typing import NDArray

from qexport.calibration.running.execute import open_model
from qexport.calibration.statistics.store import Store
from qexport.exporter.load import Source, load_source
from qexport.exporter.recipe import Recipe, instantiate
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.samples import open_samples
from qexport.exporter.steps import find_pass
from qexport.passes.base import Pass
from qexport.passes.pipeline import Step, run
from qexport.passes.target import find_target
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions
from qexport.safe_io import Cache

TARGETS = ("tensorrt-rtx", "ort-cpu")
METHODS = ("minmax", "percentile", "entropy", "mse", "output-mse")
STEPS = {
    "equalize": "fold-batch-norm",
    "shift": "observe",
    "smooth": "observe",
    "adaround": "calibrate",
    "correct-bias": "quantize",
}
"""Techniques that are steps, with the step that they stand behind."""
OPTIONS: dict[str, dict[str, Any]] = {"adaround": {"iterations": 150}}
"""What is set to keep the table within ten minutes; adaround's error falls by a few percent more with twice as many."""
LAYERS = ("MatMul", "Gemm", "Conv")
SLACK = {"Spearman x100": 0.02, "mean cosine": 2e-4, "worst cosine": 2e-3, "top-1, %": 0.0, "unchanged, %": 0.0}
"""What counts as equal."""
NOTE = (
    "One technique changed against the recipe's default, without the cast to half precision. "
    "all-MiniLM-L6-v2 on STS-B dev and test, 512 calibration sentences; CIFAR-10 ResNet-20 on 1000 test images, "
    "512 calibration images; cosines to fp32's output. Layers under 22 dB, or with a third of all error, "
    "stay in float: compare rows with as many layers in int8. Better/equal/worse: numbers of the row against the "
    "default's."
)

Steps = list[tuple[str, Pass]]
Scores = dict[str, float]
Score = Callable[[ir.Model, str], Scores]


@dataclass(frozen=True, slots=True)
class Subject:
    """One model with its data and its judge.

    Attributes:
        name: What the table calls it.
        source: The float model.
        recipe: Its recipe.
        calibration: Path of the calibration data.
        score: What a model is worth, for a target.
    """

    name: str
    source: Source
    recipe: Recipe
    calibration: str
    score: Score


def main(chosen: Sequence[str]) -> None:
    """Measure the techniques that were named, or all of them."""
    rows: list[measure.Row] = []
    for subject in (minilm(), resnet()):
        for target in TARGETS:
            rows += list(measured(subject, target, chosen))
    head = list(dict.fromkeys(key for row in rows for key in row))
    measure.report("ablation", [{key: row.get(key) for key in head} for row in rows], NOTE)


def measured(subject: Subject, target: str, chosen: Sequence[str]) -> Iterator[measure.Row]:
    """The default and every change of it."""
    recipe = override(subject.recipe, [f"export.target={target}"])
    default: Scores | None = None
    for title, change in variants(recipe):
        if default is not None and chosen and not any(name in title for name in chosen):
            continue
        context = bound(subject, recipe)
        start = time.perf_counter()
        model, records = run(subject.source.model, change(context))
        seconds = time.perf_counter() - start
        found = subject.score(model, target)
        default = default or found
        print(f"{subject.name}, {target}, {title}: {seconds:.1f} s", file=sys.stderr, flush=True)
        yield (
            {"model": subject.name, "target": target, "": title, "layers in int8": quantized(records)}
            | {key: f"{value:.{digits(key)}f}" for key, value in found.items()}
            | {
                "passes, s": f"{seconds:.1f}",
                "better/equal/worse": None if found is default else verdict(found, default),
            }
        )


def quantized(records: Sequence[Step]) -> int:
    """How many products and convolutions ``quantize`` stored; the others were too noisy for it."""
    (record,) = (record for record in records if record.name == "quantize")
    layers = (decision for decision in record.decisions if decision.action == "quantized" and decision.op in LAYERS)
    return sum(1 for _ in layers)


def variants(recipe: Recipe) -> Iterator[tuple[str, Callable[[Mapping[str, Any]], Steps]]]:
    """Name and passes of the default, and of everything that differs from it by one technique."""
    present = {step.pass_ for step in recipe.step if step.enabled}
    yield "default", lambda context: passes(recipe, context)
    usual = find_pass("calibrate", "ablation").options()["method"].default
    method = next(step.options.get("method", usual) for step in recipe.step if step.pass_ == "calibrate")
    for name in METHODS:
        if name != method:
            changed = override(recipe, [f"calibrate.method={name}"])
            yield f"{name} ranges, not {method}", lambda context, changed=changed: passes(changed, context)
    for name, behind in STEPS.items():
        if name in present:
            yield f"without {name}", lambda context, name=name: [s for s in passes(recipe, context) if s[0] != name]
        elif behind in present:
            yield f"with {name}", lambda context, at=(name, behind): with_step(passes(recipe, context), *at, context)


def bound(subject: Subject, recipe: Recipe) -> dict[str, Any]:
    """What the build gives to passes; statistics are kept, since many rows share them."""
    samples = open_samples(subject.source, recipe, subject.calibration, None)
    store = Store(Cache(measure.WORK / "ablation"))
    return {"data": samples.calibration, "store": store, "target": recipe.export.target}


def passes(recipe: Recipe, context: Mapping[str, Any]) -> Steps:
    """The recipe's passes up to the cast."""
    given = {name: value for name, value in context.items() if name != "target"}
    return [step for step in instantiate(recipe, given) if step[0] != "half"]


def with_step(steps: Steps, name: str, behind: str, context: Mapping[str, Any]) -> Steps:
    """The same with one more step, in its place."""
    cls = find_pass(name, "ablation")
    given = {key: value for key, value in context.items() if key in cls.options()}
    made = cls(**given, **OPTIONS.get(name, {}))
    at = 1 + next(index for index, (known, _) in enumerate(steps) if known == behind)
    return [*steps[:at], (name, made), *steps[at:]]


def opened(model: ir.Model, target: str) -> OrtSession:
    """The model as it is judged: files for engines with their Q/DQ nodes taken literally."""
    return open_model(model, SessionOptions(literal=find_target(target).engine is not None))


def minilm(wanted: Sequence[str] = ("dev", "test")) -> Subject:
    """The sentence encoder, judged by the splits that are wanted."""
    from scipy.stats import spearmanr

    source, data = load_source(measure.minilm_folder()), measure.SAMPLES / "data"
    splits = {}
    for split in wanted:
        gold = [float(text) for text in sentences.read_column(data / f"stsb-{split}.csv", "score")]
        texts = [sentences.read_column(data / f"stsb-{split}.csv", f"sentence{side}") for side in (1, 2)]
        tokens = sentences.tokenize(texts[0] + texts[1])
        splits[split] = (gold, tokens, embed(open_model(source.model), tokens))

    def score(model: ir.Model, target: str) -> Scores:
        session, scores = opened(model, target), {}
        for split, (gold, tokens, truth) in splits.items():
            found = embed(session, tokens)
            pairs, cosine = (found[: len(gold)] * found[len(gold) :]).sum(1), (found * truth).sum(1)
            scores[f"{split}: Spearman x100"] = 100 * float(spearmanr(pairs, gold).statistic)
            scores[f"{split}: mean cosine"], scores[f"{split}: worst cosine"] = (
                float(cosine.mean()),
                float(cosine.min()),
            )
        return scores

    return Subject("MiniLM", source, load_recipe("int8"), str(methods.SENTENCES), score)


def embed(session: OrtSession, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Embeddings of all sentences, ``[sentences, hidden]``."""
    rows = np.zeros((len(tokens), 0), np.float32)
    for chosen, feeds in sentences.batches(tokens):
        hidden = session.run(feeds, ["last_hidden_state"])["last_hidden_state"].astype(np.float32)
        mask = feeds["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        rows = np.zeros((len(tokens), pooled.shape[1]), np.float32) if not rows.size else rows
        rows[chosen] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return rows


def resnet() -> Subject:
    """The image classifier, judged by its test images."""
    source = load_source(methods.RESNET / "resnet20.onnx")
    feeds = images.batches(methods.RESNET / "test.npz")
    with np.load(methods.RESNET / "test.npz") as file:
        labels = file["labels"]

    def logits(session: OrtSession) -> NDArray[np.float32]:
        return np.concatenate([next(iter(session.run(batch).values())) for batch in feeds])

    truth = logits(open_model(source.model))

    def score(model: ir.Model, target: str) -> Scores:
        found = logits(opened(model, target))
        cosine = (found * truth).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(truth, axis=1))
        return {
            "top-1, %": 100 * float((found.argmax(1) == labels).mean()),
            "unchanged, %": 100 * float((found.argmax(1) == truth.argmax(1)).mean()),
            "test: mean cosine": float(cosine.mean()),
            "test: worst cosine": float(cosine.min()),
        }

    recipe = load_recipe(methods.RESNET / "int8.toml")
    return Subject("ResNet-20", source, recipe, str(methods.RESNET / "calibration.npz"), score)


def digits(key: str) -> int:
    """Decimals of a column."""
    return 4 if "mean" in key else 3 if "worst" in key else 1 if "%" in key else 2


def verdict(found: Scores, default: Scores) -> str:
    """How many numbers are better, equal and worse than the default's."""
    gaps = [(found[key] - default[key], SLACK[key.split(": ")[-1]]) for key in found]
    better, worse = sum(gap > slack for gap, slack in gaps), sum(gap < -slack for gap, slack in gaps)
    return f"{better}/{len(gaps) - better - worse}/{worse}"


if __name__ == "__main__":
    main(sys.argv[1:])
