"""A bench that asks the journal of the build first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qexport.exporter.outcome.result import Latency, Quality
from qexport.exporter.precision.bench import BuildBench
from qexport.exporter.precision.costs import Cost, Kernels, region_costs
from qexport.exporter.precision.regions import Region
from qexport.exporter.product import Product
from qexport.exporter.resume.journal import FRESH, Journal, digest_model, machine


@dataclass(frozen=True, slots=True)
class RecallingBench:
    """Hands on to a bench what the journal does not know.

    Attributes:
        bench: What measures.
        journal: What was measured before.
        decides: Whether times decide what is quantized.
    """

    bench: BuildBench
    journal: Journal
    decides: bool = False

    def again(self, keep: Collection[str]) -> Product:
        """Run the recipe again with the nodes called ``keep`` in float; that takes moments."""
        return self.bench.again(keep)

    def judge(self, product: Product) -> Quality | None:
        """Compare with the model as it came."""
        return self.journal.once("verify", Quality, lambda: self.bench.judge(product), lambda: _digest(product))

    def time(self, product: Product) -> Latency | None:
        """Measure in turn with the model as it came."""
        return self.journal.once(
            "latency",
            Latency,
            lambda: self.bench.time(product),
            lambda: [_digest(product), machine()],
            fresh=FRESH,
            decides=self.decides,
        )

    def errors(self, regions: Sequence[Region]) -> list[float]:
        """The output error that each region causes when it alone is quantized."""
        nodes = [region.nodes for region in regions]
        found = self.journal.once("sensitivity", list[float], lambda: self.bench.errors(regions), lambda: nodes)
        self.bench.note(list(zip(regions, found, strict=True)))
        return found

    def costs(self, product: Product, regions: Sequence[Region]) -> list[Cost]:
        """What each region takes in float and in the product; the profiles are left with the bench."""
        assert product.snapshot is not None

        def find() -> Kernels:
            self.bench.costs(product, regions)
            return self.bench.profiles[product.quantized]

        def about() -> list[object]:
            return [_digest(product), machine()]

        kernels = self.journal.once("profile", Kernels, find, about, fresh=FRESH, decides=self.decides)
        self.bench.profiles[product.quantized] = kernels
        return region_costs(product.snapshot.model, product.model, regions, kernels)


def _digest(product: Product) -> str:
    return digest_model(product.model)
