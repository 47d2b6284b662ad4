"""How much the output changes when a layer's error is random: the Fisher estimate of its sensitivity."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qexport.exporter.precision.probe import Error, Port, Probe, side_by_side
from qexport.exporter.proof.layout import Feeds, Vectors


def fisher(
    probe: Probe, batches: Iterable[tuple[list[int], Feeds]], *, draws: int = 1, seed: int = 0
) -> dict[str, float]:
    """Return for each layer the expected squared change of the output over the squared output.

    To second order, an error e with independent signs changes the output y by ``sum_i e_i^2 |dy/dx_i|^2``: the layer's
    squared errors weighted by the diagonal of ``J' J``, which is the Fisher information of a model whose output is the
    mean of a Gaussian (Dong et al. 2020, HAWQ-V2, eq. 3, with the Gauss-Newton matrix). The expectation is taken over
    random signs of the very errors that the layer makes (Hutchinson 1990) on the samples and over ``draws``.
    """
    rng = np.random.default_rng(seed)
    noise = {port.node: 0.0 for port in probe.ports}
    signal = 0.0
    for indices, feeds in batches:
        truth = probe.rows(feeds, len(indices))
        signal += float(np.square(truth).sum())

        def run_one(
            job: tuple[Port, Error], feeds: Feeds = feeds, truth: Vectors = truth, count: int = len(indices)
        ) -> tuple[str, float]:
            return job[0].node, squared_gap(probe.rows(feeds, count, dict([job])), truth)

        jobs = ((port, flip(error, rng)) for port, error in probe.errors(feeds) for _ in range(draws))
        for node, gap in side_by_side(run_one, jobs):
            noise[node] += gap / draws
    return {node: total / max(signal, 1e-30) for node, total in noise.items()}


def flip(error: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    """Give every element a random sign."""
    signs = rng.integers(0, 2, error.shape, np.int8) * 2 - 1
    return np.asarray(error * signs, error.dtype)


def squared_gap(one: Vectors, other: Vectors) -> float:
    """Sum of the squared differences."""
    return float(np.square(one - other).sum())
