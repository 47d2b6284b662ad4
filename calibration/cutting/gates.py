"""Gates: a factor on each unit, as inputs of the model, to see what its outputs do without a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.cutting.readers import sums_of
from qexport.calibration.gradients.saliency import gradients
from qexport.calibration.reading.data import Sample
from qexport.calibration.reading.spec import input_specs, static_batch
from qexport.calibration.running.execute import open_model
from qexport.calibration.statistics.collect import numbered, workers
from qexport.errors import DataInvalid, UsageError
from qexport.passes.folding.axes import FREE, Ids
from qexport.passes.folding.flood import FLOATS
from qexport.passes.match import Names, add_constant, is_cache
from qexport.passes.pruning.cut import Cut
from qexport.passes.pruning.spaces import Space
from qexport.runtime.session import SessionOptions

GATE = "qexport.gate"
Feeds = Mapping[str, NDArray[Any]]
Make = Callable[[int, ir.Value, Ids], Sequence[ir.Node]]


def gated(model: ir.Model, spaces: Sequence[Space]) -> tuple[ir.Model, list[str]]:
    """A copy with an input ``[units + 1]`` for each space that is multiplied with what weights read of its units.

    A gate of zero is what is left when the unit is cut, as nothing else of a unit reaches the outputs; the last number
    of a gate is that of what belongs to no unit, one always.

    Returns:
        The copy, and the names of the inputs.
    """
    gates = [ir.val(f"{GATE}/{place}", ir.DataType.FLOAT, (space.count + 1,)) for place, space in enumerate(spaces)]

    def make(place: int, value: ir.Value, ids: Ids) -> Sequence[ir.Node]:
        maker = value.producer()
        assert maker is not None
        nodes = [ir.node("Gather", [gates[place], add_constant(maker, f"{GATE}/ids", ids.astype(np.int64))])]
        if value.dtype not in (ir.DataType.FLOAT, None):
            nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": int(value.dtype)}))
        return [*nodes, ir.node("Mul", [value, nodes[-1].outputs[0]])]

    work, _ = _interposed(model, spaces, make)
    work.graph.inputs.extend(gates)
    return work, [str(gate.name) for gate in gates]


def _interposed(
    model: ir.Model, spaces: Sequence[Space], make: Make
) -> tuple[ir.Model, list[list[tuple[ir.Value, Ids]]]]:
    """A copy in which weights read a space's units through nodes; what these make, with the unit of each element."""
    work = model.clone()
    copies, names = dict(zip(model.graph, work.graph, strict=True)), Names(work.graph)
    found: list[list[tuple[ir.Value, Ids]]] = [[] for _ in spaces]
    for place, space in enumerate(spaces):
        made: dict[ir.Value, ir.Value] = {}
        for node, index, ids in _places(space):
            value = copies[node].inputs[index]
            assert value is not None
            if value not in made:
                nodes, before = make(place, value, ids), value.producer()
                assert before is not None
                for new in nodes:
                    new.name, new.outputs[0].name = names.fresh(f"{GATE}/{new.op_type}"), names.fresh(f"{GATE}/value")
                before.graph.insert_after(before, nodes)  # type: ignore[union-attr]  # it is in the graph
                made[value] = nodes[-1].outputs[0]
                made[value].shape, made[value].type = value.shape, value.type
                found[place].append((made[value], ids))
            copies[node].replace_input_with(index, made[value])
    return work, found


def _places(space: Space) -> list[tuple[ir.Node, int, Ids]]:
    """The inputs that weights sum over units of; all readers of a space's value where no weight does."""
    assert isinstance(space.cut, Cut)
    values, found = space.cut.values, []
    for node, weight in dict.fromkeys((slot.node, slot.index) for slot in sums_of(space.cut)):
        inputs = [(i, value) for i, value in enumerate(node.inputs) if i != weight and value in values]
        found += [(node, i, values[value]) for i, value in inputs[:1] if value is not None]
    return found or [(node, index, space.ids) for node, index in space.value.uses()]


def output_change(model: ir.Model, spaces: Sequence[Space], samples: Iterable[Sample]) -> list[NDArray[np.float64]]:
    """How much the outputs change without each unit: the mean over samples of ``|y - y'|^2 / |y|^2``, ``[units]``.

    Every unit is taken out of the whole model by itself (Michel et al. 2019, "Are Sixteen Heads Really Better than
    One?", section 3.2, with the change of the outputs for the loss, so that no labels are needed).

    Raises:
        UsageError: No output is a float.
        DataInvalid: An output is NaN or infinite, naming the sample and the output.
    """
    outputs = [str(value.name) for value in model.graph.outputs if value.dtype in FLOATS and not is_cache(value)]
    if not outputs:
        raise UsageError("the model has no float output to see a change of", hint="choose another criterion")
    work, gates = gated(model, spaces)
    session = open_model(work, SessionOptions(threads=1))
    batch = static_batch(input_specs(model)) or 1
    found = [np.zeros(space.count) for space in spaces]
    open_gates = {name: np.ones(space.count + 1, np.float32) for name, space in zip(gates, spaces, strict=True)}
    jobs = [(place, unit) for place, space in enumerate(spaces) for unit in range(space.count)]
    count = 0
    with ThreadPoolExecutor(workers()) as pool:
        for index, _, sample in numbered(samples):
            feeds = {name: np.stack([array] * batch) for name, array in sample.items()}
            truth = session.run(feeds | open_gates, outputs)
            _check(truth, index)

            def without(job: tuple[int, int], feeds: Feeds = feeds, truth: Feeds = truth) -> float:
                gate = np.ones(spaces[job[0]].count + 1, np.float32)
                gate[job[1]] = 0
                return _change(truth, session.run({**feeds, **open_gates, gates[job[0]]: gate}, outputs))

            for (place, unit), change in zip(jobs, pool.map(without, jobs), strict=True):
                found[place][unit] += change
            count += 1
    return [row / max(count, 1) for row in found]


def _check(outputs: Feeds, index: int) -> None:
    for name, numbers in outputs.items():
        if not np.isfinite(numbers).all():
            hint = "look for overflow in the model or in the sample"
            raise DataInvalid(f"output {name!r} is NaN or infinite", where=f"sample {index}", hint=hint)


def _change(truth: Feeds, found: Feeds) -> float:
    """Squared change over squared output, the mean over the outputs; infinite where an output is no number."""
    shares = []
    for name, numbers in truth.items():
        exact = np.asarray(numbers, np.float64)
        shares.append(float(np.square(exact - found[name]).sum() / max(float(np.square(exact).sum()), 1e-30)))
    mean = float(np.mean(shares))
    return mean if np.isfinite(mean) else np.inf


def gate_gradients(model: ir.Model, spaces: Sequence[Space], samples: Iterable[Sample]) -> list[NDArray[np.float64]]:
    """Squared gradient of the outputs with respect to the gate of each unit, the mean over samples, ``[units]``.

    That is the change of :func:`output_change` to first order, up to the size of the outputs, for one run of the model
    and its gradient for each sample, however many units there are (Michel et al. 2019, equation 2, with outputs
    projected on random signs for the loss).

    Raises:
        UsageError: The model cannot be differentiated, naming the node.
        DataInvalid: A gradient is NaN or infinite, naming the sample and the value.
    """
    work, taps = _interposed(model, spaces, lambda _, value, __: [ir.node("Identity", [value])])
    names = [str(value.name) for row in taps for value, _ in row]
    found, count = [np.zeros(space.count) for space in spaces], 0
    for products in gradients(work, names, samples, times_value=True):
        for space, row, total in zip(spaces, taps, found, strict=True):
            total += np.square(sum(_by_unit(products[str(value.name)], ids, space.count) for value, ids in row))
        count += 1
    return [total / max(count, 1) for total in found]


def _by_unit(numbers: NDArray[Any], ids: Ids, count: int) -> NDArray[np.float64]:
    wide = np.broadcast_to(ids, numbers.shape)
    held = wide != FREE
    return np.asarray(np.bincount(wide[held], numbers[held], count), np.float64)
