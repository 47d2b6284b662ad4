"""One float session into which the error of any layer can be injected, and the layers' own errors.

With ``y' = y + e`` for one layer and ``e`` the difference between its quantized and its float output on the same input,
the model computes what it would with that layer alone quantized. So one session measures all layers, and the same
errors with random signs give the expectation that Fisher estimates stand for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.running.execute import open_model
from qexport.calibration.statistics.collect import workers
from qexport.exporter.precision.excerpt import Excerpt
from qexport.exporter.proof.layout import Feeds, Layout, Vectors, fill, find_layout
from qexport.passes.match import Names, constant
from qexport.passes.target import Target
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import Feeds as AnyFeeds
from qexport.runtime.session import SessionOptions

GROUP = 8  # layers whose inputs and outputs are held at a time
Error = NDArray[Any]
Job = TypeVar("Job")
Done = TypeVar("Done")


@dataclass(frozen=True, slots=True)
class Port:
    """Where the error of one layer goes in.

    Attributes:
        node: Name of the layer.
        op: Its operator.
        output: The tensor it makes.
        raw: What that is called before the error is added.
        inputs: The computed tensors it reads.
        probe: The input of the probed model that holds the error.
        dtype: Type of the error.
        local: Opens the layer alone, quantized; not before it runs, or all weights would be held once more.
    """

    node: str
    op: str
    output: str
    raw: str
    inputs: tuple[str, ...]
    probe: str
    dtype: np.dtype[Any]
    local: Callable[[], OrtSession]


class Preset(OrtSession):
    """A session some of whose inputs are set."""

    def __init__(self, inner: OrtSession, preset: Mapping[str, NDArray[Any]]) -> None:
        self._inner, self._preset = inner, preset

    def run(self, feeds: AnyFeeds, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run once with the inputs that are set added to ``feeds``."""
        return self._inner.run({**feeds, **self._preset}, outputs)


class Probe:
    """A float model with a port at each layer.

    Args:
        model: The float model, before anything is quantized.
        quantized: The same with all layers quantized, under the same names.
        nodes: Names of the layers.
        excerpt: The samples to run.
        target: Whose integer arithmetic the layers have.
    """

    def __init__(
        self, model: ir.Model, quantized: ir.Model, nodes: Sequence[str], excerpt: Excerpt, target: Target
    ) -> None:
        self.excerpt = excerpt
        options = SessionOptions(threads=1, literal=target.engine is not None)
        work = model.clone()
        layers = _Locals(quantized, options)
        names, wanted = Names(work.graph), set(nodes)
        found = [_add_port(work.graph, node, names, layers) for node in tuple(work.graph) if node.name in wanted]
        self.ports = tuple(port for port in found if port is not None)
        self.unreached = tuple(sorted(wanted - {port.node for port in self.ports}))
        taps = {name for port in self.ports for name in (port.raw, *port.inputs)}
        held = {value.name for value in work.graph.inputs}
        self._taps = taps - held
        self._session = open_model(work, SessionOptions(threads=1), sorted(self._taps))
        self._zeros = {port.probe: np.zeros((), port.dtype) for port in self.ports}
        self.layout: Layout = find_layout(self._injecting({}), excerpt.samples[0], excerpt.static, excerpt.output)

    def batches(self) -> Iterator[tuple[list[int], Feeds]]:
        """Batches of the excerpt, as large as the model wants them."""
        size = self.layout.samples
        for indices, feeds in self.excerpt.batches():
            for start in range(0, len(indices), size):
                part = {name: array[start : start + size] for name, array in feeds.items()}
                yield indices[start : start + size], fill(part, self.layout.rows)

    def rows(self, feeds: Feeds, count: int, errors: Mapping[Port, Error] | None = None) -> Vectors:
        """The main output's rows for ``count`` samples, with errors injected."""
        injected = {port.probe: error for port, error in (errors or {}).items()}
        return self.layout.run(self._injecting(injected), feeds, count)[self.layout.main]

    def errors(self, feeds: Feeds) -> Iterator[tuple[Port, Error]]:
        """Each layer with the error that it makes on one batch when it alone is quantized."""
        for start in range(0, len(self.ports), GROUP):
            group = self.ports[start : start + GROUP]
            wanted = sorted({name for port in group for name in (port.raw, *port.inputs)} & self._taps)
            values = {**feeds, **self._injecting({}).run(feeds, wanted)}
            for port in group:
                found = port.local().run({name: values[name] for name in port.inputs})[port.output]
                error = found.astype(np.float32) - values[port.raw].astype(np.float32)
                yield port, error.astype(port.dtype)

    def _injecting(self, errors: Mapping[str, Error]) -> OrtSession:
        return Preset(self._session, {**self._zeros, **errors})


def side_by_side(work: Callable[[Job], Done], jobs: Iterable[Job]) -> Iterator[Done]:
    """Yield the results of ``work`` in order; as many run side by side as calibration's, and no more are begun."""
    waiting = iter(jobs)
    with ThreadPoolExecutor(workers()) as pool:
        running = deque(pool.submit(work, job) for job in islice(waiting, workers() + 1))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(work, job) for job in islice(waiting, 1))


class _Locals:
    """Cuts single layers out of the quantized model."""

    def __init__(self, model: ir.Model, options: SessionOptions) -> None:
        self._model, self._options = model, options
        self._made = {value.name for node in model.graph for value in node.outputs}
        self._made |= {value.name for value in model.graph.inputs}

    def cut(self, inputs: Sequence[str], output: str) -> Callable[[], OrtSession] | None:
        """What opens ``inputs`` to ``output``; ``None`` where the quantized model does not know one of them."""
        if not self._made.issuperset([*inputs, output]) or not inputs:
            return None
        try:
            graph = ir.convenience.extract(self._model.graph, list(inputs), [output])
        except ValueError:  # it reads something else by now
            return None
        graph.opset_imports.update(self._model.opset_imports)
        for value in (*graph.inputs, *graph.outputs):
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        functions = tuple(self._model.functions.values())
        return partial(
            open_model, ir.Model(graph, ir_version=self._model.ir_version, functions=functions), self._options
        )


def _add_port(graph: ir.Graph, node: ir.Node, names: Names, layers: _Locals) -> Port | None:
    """Put an Add with a new model input behind ``node``; the sum takes over the name of the node's output."""
    value = node.outputs[0]
    output = value.name or ""
    inputs = tuple(dict.fromkeys(v.name or "" for v in node.inputs if v is not None and constant(v) is None))
    local = layers.cut(inputs, output)
    if local is None:
        return None
    dtype = value.dtype or ir.DataType.FLOAT
    probe = ir.Value(name=names.fresh(f"{output}/probe"), type=ir.TensorType(dtype))
    add = ir.node("Add", [value, probe], name=names.fresh(f"{output}/Add"))
    total = add.outputs[0]
    ir.convenience.replace_all_uses_with(value, total, replace_graph_outputs=True)
    add.replace_input_with(0, value)
    value.name = names.fresh(f"{output}/raw")
    total.name, total.type = output, ir.TensorType(dtype)
    graph.inputs.append(probe)
    graph.insert_after(node, add)
    return Port(node.name or "", node.op_type, output, value.name, inputs, probe.name or "", dtype.numpy(), local)
