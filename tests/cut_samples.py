"""Samples for small models that are cut, and what their values are."""

from __future__ import annotations

import channel_models
import cut_models
import numpy as np
from helpers import Samples, session

from qexport.calibration.cutting.scores import Evidence


def same_numbers(seed=0):
    """Let the next models have the same weights whatever was made before."""
    channel_models.RNG.bit_generator.state = np.random.default_rng(seed).bit_generator.state


def made(name, seed=0):
    same_numbers(seed)
    return cut_models.make(name)


def evidence(model, samples, ridge=1e-9):
    return Evidence(model, lambda: iter(samples), ridge)


def data(model, count=8, seed=0, length=5):
    """Samples without their batch axis."""
    rng = np.random.default_rng(seed)
    shapes = {v.name: [n if isinstance(n, int) else length for n in v.shape][1:] for v in model.graph.inputs}
    return Samples(
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(count)
    )


def run(model, sample, names=None):
    return session(model).run(names, {name: value[None] for name, value in sample.items()})


def tapped(model, sample, *names):
    """What values of a model are on a sample."""
    work = model.clone()
    values = {value.name: value for node in work.graph for value in node.outputs}
    work.graph.outputs.extend(values[name] for name in names if name not in {v.name for v in work.graph.outputs})
    return run(work, sample, list(names))
