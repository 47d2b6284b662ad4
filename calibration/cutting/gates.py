"""Gates: a factor on each unit, as inputs of the model, to see what its outputs do without a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.gradients.saliency import gradients
from qexport.calibration.reading.data import Sample
from qexport.calibration.reading.spec import input_specs, static_batch
from qexport.calibration.running.execute import open_model
from qexport.calibration.statistics.collect import numbered, workers
from qexport.passes.folding.axes import FREE
from qexport.passes.match import Names, add_constant
from qexport.passes.pruning.spaces import Space
from qexport.runtime.session import SessionOptions

GATE = "qexport.gate"
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}
Feeds = Mapping[str, NDArray[Any]]


def gated(model: ir.Model, spaces: Sequence[Space]) -> tuple[ir.Model, list[str]]:
    """A copy with an input ``[units]`` for each space whose numbers are multiplied with its units; their names."""
    work = model.clone()
    graph, names, inputs = work.graph, Names(work.graph), []
    values = {value.name: value for node in graph for value in node.outputs}
    for space in spaces:
        value = values[space.value.name]
        maker = value.producer()
        assert maker is not None
        gate = ir.val(names.fresh(GATE), value.dtype or ir.DataType.FLOAT, (space.count + 1,))
        ids = add_constant(maker, f"{GATE}/ids", space.ids.astype(np.int64))  # FREE is -1: the last number of a gate
        spread = ir.node("Gather", [gate, ids], {"axis": 0}, name=names.fresh(f"{GATE}/Gather"))
        product = ir.node("Mul", [value, spread.outputs[0]], name=names.fresh(f"{GATE}/Mul"))
        spread.outputs[0].name, product.outputs[0].name = names.fresh(f"{GATE}/spread"), names.fresh(f"{GATE}/product")
        product.outputs[0].shape, product.outputs[0].type = value.shape, value.type
        value.replace_all_uses_with(product.outputs[0])
        product.replace_input_with(0, value)
        graph.insert_after(maker, [spread, product])
        graph.inputs.append(gate)
        inputs.append(str(gate.name))
    return work, inputs


def output_change(
    model: ir.Model, spaces: Sequence[Space], samples: Iterable[Sample], advance: Callable[[], None] = lambda: None
) -> list[NDArray[np.float64]]:
    """How much the outputs change without each unit: the mean over samples of ``|y - y'|^2 / |y|^2``, ``[units]``.

    Every unit is taken out of the whole model by itself (Michel et al. 2019, "Are Sixteen Heads Really Better than
    One?", section 3.2, with the change of the outputs for the loss, so that no labels are needed).
    """
    work, gates = gated(model, spaces)
    session = open_model(work, SessionOptions(threads=1))
    outputs = [str(value.name) for value in model.graph.outputs if value.dtype in FLOATS]
    batch = static_batch(input_specs(model)) or 1
    found = [np.zeros(space.count) for space in spaces]
    open_gates = {name: np.ones(space.count + 1, np.float32) for name, space in zip(gates, spaces, strict=True)}
    jobs = [(place, unit) for place, space in enumerate(spaces) for unit in range(space.count)]
    count = 0
    with ThreadPoolExecutor(workers()) as pool:
        for _, _, sample in numbered(samples, advance):
            feeds = {name: np.stack([array] * batch) for name, array in sample.items()}
            truth = session.run(feeds | open_gates, outputs)

            def without(job: tuple[int, int], feeds: Feeds = feeds, truth: Feeds = truth) -> float:
                gate = np.ones(spaces[job[0]].count + 1, np.float32)
                gate[job[1]] = 0
                return _change(truth, session.run({**feeds, **open_gates, gates[job[0]]: gate}, outputs))

            for (place, unit), change in zip(jobs, pool.map(without, jobs), strict=True):
                found[place][unit] += change
            count += 1
    return [row / max(count, 1) for row in found]


def _change(truth: Feeds, found: Feeds) -> float:
    """Squared change over squared output, the mean over the outputs."""
    shares = []
    for name, numbers in truth.items():
        exact = np.asarray(numbers, np.float64)
        shares.append(float(np.square(exact - found[name]).sum() / max(float(np.square(exact).sum()), 1e-30)))
    return float(np.mean(shares))


def gate_gradients(
    model: ir.Model, spaces: Sequence[Space], samples: Iterable[Sample], advance: Callable[[], None] = lambda: None
) -> list[NDArray[np.float64]]:
    """Squared gradient of the outputs with respect to the gate of each unit, the mean over samples, ``[units]``.

    That is the change of :func:`output_change` to first order, up to the size of the outputs, for one run of the model
    and its gradient for each sample, however many units there are (Michel et al. 2019, equation 2, with outputs
    projected on random signs for the loss).
    """
    names = [str(space.value.name) for space in spaces]
    found, count = [np.zeros(space.count) for space in spaces], 0
    for products in gradients(model, names, ticking(samples, advance), times_value=True):
        for space, name, total in zip(spaces, names, found, strict=True):
            ids = np.broadcast_to(space.ids, products[name].shape)
            held = ids != FREE
            total += np.square(np.bincount(ids[held], products[name][held], space.count))
        count += 1
    return [total / max(count, 1) for total in found]


def ticking(samples: Iterable[Sample], advance: Callable[[], None]) -> Iterator[Sample]:
    """The samples, with a call of ``advance`` for each."""
    for sample in samples:
        yield sample
        advance()
