"""The bench of a build: makes the product again with less int8, judges it, times it, and says what costs what."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from qexport.calibration.reading.spec import input_specs, static_batch
from qexport.exporter.load import Source
from qexport.exporter.options import Progress
from qexport.exporter.outcome.result import Latency, Quality
from qexport.exporter.precision.costs import Cost, Kernels, profile_both, region_costs
from qexport.exporter.precision.regions import Region
from qexport.exporter.product import Product, requantize
from qexport.exporter.proof.latency import measure, measured_on
from qexport.exporter.proof.layout import Feeds
from qexport.exporter.proof.quality import compare, layer_quality
from qexport.exporter.samples import Samples
from qexport.passes.numbers.notes import ERROR_KEY
from qexport.passes.target import Target
from qexport.runtime.session import SessionOptions

EXCERPT = 32  # samples by which regions are ordered


@dataclass(frozen=True, slots=True)
class BuildBench:
    """What a build measures with.

    Attributes:
        source: The model as it came.
        first: The product of the whole recipe, which later ones start from.
        samples: The data.
        target: Where the result runs.
        stages: Who hears about it.
        profiles: What the runtime's profiles told of the float graph and of a product, by what the product quantizes.
    """

    source: Source
    first: Product
    samples: Samples
    target: Target
    stages: Progress
    profiles: dict[tuple[str, ...], Kernels] = field(default_factory=dict)

    def again(self, keep: Collection[str]) -> Product:
        """Run the recipe again from where it began to quantize, with the nodes called ``keep`` in float."""
        with self.stages.stage("back off"):
            return requantize(self.first, self.samples, keep)

    def judge(self, product: Product) -> Quality | None:
        """Judge the product against the model as it came: outputs, task, layers; ``None`` without data."""
        judge = self.samples.judge
        if judge is None:
            return None
        with self.stages.stage("verify", len(judge.data)) as advance:
            quality = compare(self.source.model, product.model, judge, self.target, advance)
            changed = [d.node for step in product.steps for d in step.decisions if d.action == "quantized"]
            layers = layer_quality(product.plain, product.model, changed, judge.data, self.target)
        return quality.model_copy(update={"layers": layers})

    def time(self, product: Product) -> Latency | None:
        """Measure the model as it came and the product in turn; ``None`` without data."""
        if self.samples.judge is None:
            return None
        with self.stages.stage("latency"):
            return measure(self.source.model, product.model, self._batch(), self.target)

    def errors(self, regions: Sequence[Region]) -> list[float]:
        """The relative output error of each region quantized alone, on a few samples."""
        from qexport.exporter.precision.excerpt import take_excerpt
        from qexport.exporter.precision.layers import measure_groups, open_probe

        assert self.samples.judge is not None
        with self.stages.stage("sensitivity", EXCERPT) as advance:
            excerpt = take_excerpt(self.samples.judge, EXCERPT, static_batch(input_specs(self.source.model)))
            probe = open_probe(self.first, excerpt, self.target)
            scores = measure_groups(probe, [region.nodes for region in regions], advance)
        self.note([(region, score.error) for region, score in zip(regions, scores, strict=True)])
        return [score.error for score in scores]

    def kernels(self, product: Product) -> Kernels | None:
        """The profiles of the float graph and of a product, if its costs were asked for."""
        return self.profiles.get(product.quantized)

    def costs(self, product: Product, regions: Sequence[Region]) -> list[Cost]:
        """What each region takes in float and in the product, by the runtime's profile."""
        assert product.snapshot is not None
        with self.stages.stage("profile"):
            plain, options = product.snapshot.model, SessionOptions(threads=1, providers=measured_on(self.target))
            kernels = profile_both(plain, product.model, self._batch(), options)
        self.profiles[product.quantized] = kernels
        return region_costs(plain, product.model, regions, kernels)

    def note(self, errors: Sequence[tuple[Region, float]]) -> None:
        """Leave the errors of single nodes on the model that all products start from, where nobody else did."""
        known = {region.nodes[0]: error for region, error in errors if len(region.nodes) == 1}
        if self.first.snapshot is not None:
            for node in self.first.snapshot.model.graph:
                if node.name in known:
                    node.meta.setdefault(ERROR_KEY, known[node.name])

    def _batch(self) -> Feeds:
        assert self.samples.judge is not None
        return self.samples.judge.typical_batch(static_batch(input_specs(self.source.model)))
