"""A model taken to the point where it is quantized, with all that is needed to try choices of layers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from qexport.calibration.reading.spec import input_specs, static_batch
from qexport.errors import UsageError
from qexport.exporter.load import Source
from qexport.exporter.opening import choose_recipe, open_model
from qexport.exporter.options import BuildOptions
from qexport.exporter.precision.bench import BuildBench
from qexport.exporter.precision.excerpt import Excerpt, take_excerpt
from qexport.exporter.product import Product, can_keep, run_recipe
from qexport.exporter.proof.gates import check_judge
from qexport.exporter.proof.layout import Feeds
from qexport.exporter.proof.quality import Judge
from qexport.exporter.recipe import Recipe, instantiate
from qexport.exporter.recipe_files import override
from qexport.exporter.samples import Samples, open_samples
from qexport.exporter.steps import find_pass
from qexport.passes.target import Target, find_target

MIN_SQNR = "min_sqnr"  # the option by which a quantizing pass leaves noisy nodes out
CHOOSERS = ("triage",)  # steps that leave layers in float because of what they measured


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about.

    Attributes:
        model: An .onnx file or a Hugging Face folder.
        recipe: A shipped recipe's name, or the path of one.
        calib: Calibration data.
        evaluation: Held-out data.
        options: Target, overrides, cache, progress.
        samples: How many samples layers are measured on.
    """

    model: str | Path
    recipe: str | Path = "int8"
    calib: str | Path | None = None
    evaluation: str | Path | None = None
    options: BuildOptions = field(default_factory=BuildOptions)
    samples: int = 64


@dataclass(frozen=True, slots=True)
class Lab:
    """A calibrated model and its data.

    Attributes:
        source: The model as it came.
        recipe: The recipe, with every layer that it could quantize quantized, however noisy.
        samples: The data.
        target: Where the result runs.
        product: What the recipe makes.
        excerpt: A few samples to measure layers on.
    """

    source: Source
    recipe: Recipe
    samples: Samples
    target: Target
    product: Product
    excerpt: Excerpt

    @property
    def judge(self) -> Judge:
        """The data to judge by; there is some, since there is calibration data."""
        assert self.samples.judge is not None
        return self.samples.judge

    @property
    def batch(self) -> Feeds:
        """A typical batch."""
        return self.judge.typical_batch(static_batch(input_specs(self.source.model)))

    def bench(self, options: BuildOptions) -> BuildBench:
        """The bench of a build that starts here."""
        return BuildBench(self.source, self.product, self.samples, self.target, options.progress)


def open_lab(question: Question) -> Lab:
    """Load the model and run the recipe over it, its quality thresholds off.

    Raises:
        UsageError: The recipe quantizes nothing, or nothing that could be left out by name; there is no data; the
            number of samples is not above 0.
    """
    asked = question.options
    if question.samples < 1:
        raise UsageError(f"the number of samples is {question.samples}, expected 1 or more")
    recipe = without_thresholds(choose_recipe(question.recipe, asked))
    target = find_target(recipe.export.target)
    with asked.progress.stage("load"):
        source = open_model(question.model, recipe, asked)
        samples = open_samples(source, recipe, question.calib, question.evaluation)
    judge = samples.judge
    check_judge(samples, recipe.gates)
    if judge is None:
        raise UsageError("no data to measure on", hint="give data with --calib or --eval")
    _demand_choice(recipe, samples)
    product = run_recipe(source, recipe, samples, replace(asked, set=()))
    if not product.quantized:
        reasons = dict.fromkeys(d.reason for s in product.steps for d in s.decisions if d.action == "skipped")
        raise UsageError(f"recipe {recipe.name!r} quantizes nothing here", hint="; ".join([*reasons][:3]) or None)
    excerpt = take_excerpt(judge, question.samples, static_batch(input_specs(source.model)))
    return Lab(source, recipe, samples, target, product, excerpt)


def without_thresholds(recipe: Recipe) -> Recipe:
    """The recipe with nothing left in float because of its noise: what is measured decides."""
    names = {step.pass_: find_pass(step.pass_, recipe.name) for step in recipe.step if step.enabled}
    noisy = [f"{name}.{MIN_SQNR}=0" for name, cls in names.items() if cls.quantizes and MIN_SQNR in cls.options()]
    return override(recipe, [*noisy, *(f"{name}.enabled=false" for name in CHOOSERS if name in names)])


def _demand_choice(recipe: Recipe, samples: Samples) -> None:
    steps = instantiate(recipe, {"data": samples.calibration})
    if not any(can_keep(step) for _, step in steps):
        what = f"recipe {recipe.name!r} has no step that quantizes and can leave nodes in float by name"
        raise UsageError(what, hint="try the recipe int8")
