"""Put the neurons between two products in an order that costs the second one least when it gets zeros in groups.

The first product makes its outputs in the new order, so that the model computes what it did (Pool and Yu 2021,
"Channel Permutations for N:M Sparsity"). Inputs of other layers cannot change places: a residual stream has one order
for all its readers, and heads have their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.reading.data import Sample
from qexport.calibration.statistics.gram import Gram, Tap, groups, measure
from qexport.calibration.zeros.kernels import Kernel
from qexport.passes.base import Decision
from qexport.passes.numbers.masks import Pattern, Scores, magnitude, wanda
from qexport.passes.numbers.permute import group_order
from qexport.passes.placement import Site
from qexport.passes.pruning.cut import Blocked, Cut
from qexport.passes.pruning.spaces import find_spaces
from qexport.passes.writing.lowbit import decision

REORDERED = "its inputs are in an order that zeros in groups suit"
Samples = Callable[[], Iterable[Sample]]


def reorder_neurons(
    model: ir.Model, layers: Mapping[Tap, Iterable[Site]], pattern: Pattern, samples: Samples
) -> list[Decision]:
    """Let neurons change places that only ``layers`` read, for the scores that stay; one decision for each of these.

    Args:
        model: It is edited, and computes the same.
        layers: Layers that get zeros, by what they read.
        pattern: Zeros in groups.
        samples: Gives them from the first on; without any, the size of weights alone is their score.
    """
    taps = {site.node: tap for tap, sites in layers.items() for site in sites}
    sites = {site.node: site for found in layers.values() for site in found}
    cuts = [space.cut for space in find_spaces(model, "neurons") if isinstance(space.cut, Cut)]
    known = {cut: readers for cut in cuts if (readers := _readers(cut, sites))}
    wanted = dict.fromkeys(taps[site.node] for readers in known.values() for site in readers)
    found: dict[Site, Scores] = {}
    for group in groups(wanted):
        for tap, gram in measure(model, group, samples()).items():
            found |= {site: _scores(site, gram) for site in layers[tap]}
    done = []
    for cut, readers in known.items():
        scores = np.concatenate([found[site] for site in readers], axis=1)
        if _reordered(cut, group_order(scores, pattern)):
            done += [decision(site.node, "reordered", REORDERED) for site in readers]
    return done


def _readers(cut: Cut, sites: Mapping[ir.Node, Site]) -> list[Site]:
    """The layers that read the units of a cut, each unit as one input; none where others read them too."""
    readers = []
    places = cut.consumers[0].ids.reshape(-1) if cut.consumers else np.zeros(0)
    for slot in cut.consumers:
        site = sites.get(slot.node)
        if site is None or slot.axes != (1 - site.axis,) or not np.array_equal(slot.ids.reshape(-1), places):
            return []
        readers.append(site)
    return readers if np.array_equal(np.sort(places), np.arange(cut.count)) else []


def _scores(site: Site, gram: Gram) -> Scores:
    kernel = Kernel(site)
    return wanda(kernel.matrix(), kernel.hessian(gram)) if gram.rows else magnitude(kernel.matrix())


def _reordered(cut: Cut, order: NDArray[np.int64]) -> bool:
    """Let inputs change places as ``order`` says, if units can; whether any did."""
    places = cut.consumers[0].ids.reshape(-1)
    units = np.empty_like(order)
    units[places] = places[order]
    try:
        cut.reorder(units)
    except Blocked:
        return False
    return not np.array_equal(order, np.arange(len(order)))
