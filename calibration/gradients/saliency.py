"""Gradients of every sample, and how much the outputs owe to each number of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.gradients.backward import cotangent, differentiate, gradient
from qexport.calibration.reading.data import Sample
from qexport.calibration.reading.spec import input_specs, static_batch
from qexport.calibration.running.execute import open_model
from qexport.calibration.statistics.collect import numbered, workers
from qexport.calibration.statistics.gram import cut
from qexport.errors import DataInvalid, ModelInvalid, UsageError
from qexport.passes.match import dims
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions

BUDGET = 128 << 20  # bytes of gradients that one run gives

Arrays = dict[str, NDArray[Any]]


def gradients(
    model: ir.Model,
    wrt: Sequence[str],
    samples: Iterable[Sample],
    *,
    outputs: Sequence[str] | None = None,
    times_value: bool = False,
    seed: int = 0,
) -> Iterator[Arrays]:
    """Yield the gradients of ``sum(output * u)`` for each distinct sample, ``u`` being signs at random.

    The expected square of such a gradient is what the squared change of all outputs is made of: with the Jacobian J
    of the outputs, ``E (J^T u)_i^2 = (J^T J)_ii`` (Hutchinson 1990, "A stochastic estimator of the trace of the
    influence matrix"), the diagonal of the Gauss-Newton matrix. No labels are needed. The signs of a sample follow
    from its digest and ``seed``, so that they are the same in every run, whatever is asked for.

    Args:
        model: It is not changed.
        wrt: Names of initializers, inputs or inner values; inner ones have the batch axis of the model.
        samples: Gone through once, one at a time; equal samples count once.
        outputs: Names of float outputs, all of them by default.
        times_value: Whether each gradient is multiplied with its value: summed over the elements of a unit, this is
            the gradient of a gate in front of the unit (Molchanov et al. 2019, section 3.2).
        seed: Of the signs.

    Raises:
        UsageError: As :func:`~qexport.calibration.gradients.backward.differentiate`.
        DataInvalid: A gradient is NaN or infinite, naming the sample and the value.
        ModelInvalid: An output has other sizes than the model says.
    """
    for _, found in _stream(model, _Asked(tuple(wrt), outputs, times_value, seed), samples):
        yield found


def weight_saliency(
    model: ir.Model,
    names: Sequence[str],
    samples: Iterable[Sample],
    *,
    outputs: Sequence[str] | None = None,
    seed: int = 0,
    budget: int = BUDGET,
) -> Arrays:
    """Return the sum of ``|w g|`` over the samples for each weight, in its shape and in double.

    That is, to first order, how far the outputs move without a number (Molchanov et al. 2016, "Pruning Convolutional
    Neural Networks for Resource Efficient Inference", eq. 7, and 2019, "Importance Estimation for Neural Network
    Pruning", eq. 8), in a direction drawn at random for each sample; see :func:`gradients`.

    Args:
        model: It is not changed.
        names: Names of float initializers, or of what Constant nodes make.
        samples: Gone through once for every group of weights whose gradients are within ``budget``.
        outputs: Names of float outputs, all of them by default.
        seed: Of the signs.
        budget: Bytes of the gradients of one sample; sums take twice as much. One weight at least is in a group.

    Raises:
        UsageError: A name is no constant's; and as :func:`gradients`.
        DataInvalid: A gradient is NaN or infinite, naming the sample and the value.
    """
    weights = _constants(model, names)
    found: Arrays = {}
    for group in _groups(weights, budget):
        sums = {name: np.zeros(weights[name].numpy().shape) for name in group}
        for _, grads in _stream(model, _Asked(tuple(group), outputs, seed=seed), samples):
            for name, total in sums.items():
                np.add(total, np.abs(grads[name]), out=total)
        for name, total in sums.items():
            found[name] = total * np.abs(weights[name].numpy().astype(np.float64))
    return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """What to differentiate."""

    wrt: tuple[str, ...]
    outputs: Sequence[str] | None = None
    times_value: bool = False
    seed: int = 0


def _stream(model: ir.Model, asked: _Asked, samples: Iterable[Sample]) -> Iterator[tuple[int, Arrays]]:
    """Yield the position of each distinct sample and its gradients."""
    backward = differentiate(model, asked.wrt, asked.outputs)
    names = {name: gradient(name) for name in asked.wrt}
    if asked.times_value:
        _multiply(backward.graph, asked.wrt)
    takes = {value.name: value for value in backward.graph.inputs}
    ends = {value.name or "": value for value in model.graph.outputs if cotangent(value.name or "") in takes}
    work = numbered(samples)
    first = next(work, None)
    if first is None or not names:
        return
    options = SessionOptions(threads=workers())
    session = open_model(cut(backward, [*names.values(), *ends]), options)
    sizes = _Sizes(model, ends, options)
    batch = static_batch(input_specs(model)) or 1
    for index, digest, sample in chain([first], work):
        feeds = {name: np.stack([array] * batch) for name, array in sample.items()}
        rng = np.random.default_rng([asked.seed, *digest[:16]])
        shapes = sizes.of(feeds)
        signs = {cotangent(name): _signs(rng, shapes[name], value) for name, value in ends.items()}
        found = session.run(feeds | signs, [*names.values(), *ends])
        for name in ends:
            if found[name].shape != shapes[name]:
                what = f"output {name!r} has the sizes {found[name].shape}, not {shapes[name]} as the model says"
                raise ModelInvalid(what, hint="export it with names for sizes that differ")
        yield index, {name: _checked(found[told], name, index) for name, told in names.items()}


def _multiply(graph: ir.Graph, wrt: Sequence[str]) -> None:
    """Multiply every gradient with its value, under its name."""
    known = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    known.update({value.name: value for node in graph for value in node.outputs})
    for index, value in enumerate(graph.outputs):
        own = next((name for name in wrt if gradient(name) == value.name), None)
        if own is None:
            continue
        value.name, told = f"{value.name}/alone", value.name
        node = ir.node("Mul", [value, known[own]])
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = told, value.type, value.shape
        graph.append(node)
        graph.outputs[index] = node.outputs[0]


class _Sizes:
    """Sizes of outputs: what the names of sizes say, or what a run of the model alone gives."""

    def __init__(self, model: ir.Model, ends: Mapping[str, ir.Value], options: SessionOptions) -> None:
        self._inputs = {value.name or "": dims(value) or () for value in model.graph.inputs}
        self._ends = {name: dims(value) for name, value in ends.items()}
        self._model, self._options = model, options
        self._session: OrtSession | None = None

    def of(self, feeds: Arrays) -> dict[str, tuple[int, ...]]:
        """For one sample."""
        known: dict[object, int] = {}
        for name, array in feeds.items():
            known.update(zip(self._inputs.get(name, ()), array.shape, strict=False))
        known = {size: count for size, count in known.items() if isinstance(size, str)}
        found = {}
        for name, shape in self._ends.items():
            sizes = [None] if shape is None else [n if isinstance(n, int) else known.get(n) for n in shape]
            if any(size is None for size in sizes):
                return self._seen(feeds)
            found[name] = tuple(int(size) for size in sizes if size is not None)
        return found

    def _seen(self, feeds: Arrays) -> dict[str, tuple[int, ...]]:
        if self._session is None:
            self._session = open_model(cut(self._model, self._ends), self._options)
        return {name: value.shape for name, value in self._session.run(feeds, list(self._ends)).items()}


def _signs(rng: np.random.Generator, shape: tuple[int, ...], value: ir.Value) -> NDArray[Any]:
    assert value.dtype is not None
    return np.asarray(rng.integers(0, 2, shape) * 2 - 1, value.dtype.numpy())


def _checked(array: NDArray[Any], name: str, index: int) -> NDArray[Any]:
    if not np.isfinite(array).all():
        hint = "look for overflow in the model or in the sample, or for a mask that hides everything"
        raise DataInvalid(f"gradient is NaN or infinite at {name!r}", where=f"sample {index}", hint=hint)
    return array


def _constants(model: ir.Model, names: Sequence[str]) -> dict[str, ir.TensorProtocol]:
    known = dict(model.graph.initializers)
    known.update({node.outputs[0].name or "": node.outputs[0] for node in model.graph if node.op_type == "Constant"})
    found: dict[str, ir.TensorProtocol] = {}
    for name in names:
        tensor = None if name not in known else ir.convenience.get_const_tensor(known[name])
        if tensor is None:
            raise UsageError(f"no constant is called {name!r}", where="names", hint="give names of initializers")
        found[name] = tensor
    return found


def _groups(weights: Mapping[str, ir.TensorProtocol], budget: int) -> list[list[str]]:
    """Runs of weights whose gradients are within ``budget`` bytes together."""
    found: list[list[str]] = []
    held = 0
    for name, tensor in weights.items():
        if not found or held + tensor.nbytes > budget:
            found.append([])
            held = 0
        found[-1].append(name)
        held += tensor.nbytes
    return found
