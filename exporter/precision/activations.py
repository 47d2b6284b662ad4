"""Which activations cannot bear 8 bits: quantize them all, then leave out one group at a time.

After Bondarenko et al. 2021, "Understanding and Overcoming the Challenges of Efficient Transformer Quantization",
section 3 and table 2: weights stay in float, every activation has one scale for the whole tensor, from the extremes
that were seen. The groups are found by tracing the graph, not by names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qexport.calibration.reading.data import Sample
from qexport.calibration.running.execute import open_model
from qexport.calibration.statistics.collect import collect
from qexport.calibration.statistics.methods import minmax
from qexport.exporter.precision.excerpt import Excerpt
from qexport.exporter.precision.probe import Preset, side_by_side
from qexport.exporter.precision.residual import Residual, find_residuals
from qexport.exporter.precision.yardstick import Score, Tally
from qexport.exporter.proof.layout import Feeds, Vectors, fill, find_layout
from qexport.passes.match import Names, constant
from qexport.passes.numbers.range import Range, integers_for
from qexport.passes.placement import CHANNEL_AXIS
from qexport.passes.target import Target
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions

SOFTMAX_IN, SOFTMAX_OUT = "softmax input", "softmax output"
EMBEDDINGS, ATTENTION, FFN = "sum of embeddings", "self-attention output", "residual after FFN"
OTHERS = "inputs of products"
LAST = "residual after FFN, last layers only"
LAST_SHARE = 6  # the last sixth of the layers: 2 of BERT-base's 12, as in the paper
NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")

Groups = Mapping[str, tuple[str, ...]]


def find_groups(graph: ir.Graph) -> dict[str, tuple[str, ...]]:
    """Return the tensors of each group by name; groups that the graph does not have are left out.

    1. Softmax input: the scores, before a mask is added to them; softmax output.
    2. Residual additions: the branch that holds a Softmax is attention, whose output is what is added; one that
       multiplies by weights and holds none is a feed-forward network, whose residual is the sum.
    3. Sum of embeddings: what goes around the first residual branch, before its normalization.
    4. Inputs of products: what multiplies a constant weight and is none of the above.
    """
    products = _products(graph)  # a classifier's Softmax reads none
    softmaxes = [n for n in graph if n.op_type == "Softmax" and n.domain == "" and n.inputs[0] in products]
    weighted = {node for node in graph if node.op_type in CHANNEL_AXIS and _has_weight(node)}
    residuals = find_residuals(graph)
    inside = set(softmaxes)
    attention = [found for found in residuals if not inside.isdisjoint(found.layers)]
    ffn = [f for f in residuals if inside.isdisjoint(f.layers) and not weighted.isdisjoint(f.layers)]
    groups: dict[str, list[ir.Value | None]] = {
        SOFTMAX_IN: [_unmasked(node.inputs[0], products) for node in softmaxes],
        EMBEDDINGS: _embeddings(residuals) if softmaxes else [],
        ATTENTION: [found.branch for found in attention],
        SOFTMAX_OUT: [node.outputs[0] for node in softmaxes],
        FFN: [found.node.outputs[0] for found in ffn] if softmaxes else [],
    }
    named = {group: tuple(dict.fromkeys(v.name or "" for v in values if v)) for group, values in groups.items()}
    taken = {name for names in named.values() for name in names}
    inputs = [node.inputs[0] for node in graph if node in weighted]
    rest = (value.name or "" for value in inputs if value is not None and value.producer() is not None)
    named[OTHERS] = tuple(dict.fromkeys(name for name in rest if name not in taken))
    return {group: names for group, names in named.items() if names}


def last_layers(names: Collection[str]) -> tuple[str, ...]:
    """The part of a group that belongs to the last sixth of the layers, at least one."""
    return tuple(names)[-max(1, round(len(names) / LAST_SHARE)) :]


def _has_weight(node: ir.Node) -> bool:
    return len(node.inputs) > 1 and constant(node.inputs[1]) is not None


def _products(graph: ir.Graph) -> set[ir.Value]:
    """The values behind which the nearest operator that is no scaling or masking multiplies two computed tensors."""
    found: set[ir.Value] = set()
    for node in graph:
        operands = [operand for operand in node.inputs if operand is not None]
        if node.op_type in ("MatMul", "Einsum"):
            is_one = len(operands) == len(node.inputs) and all(constant(operand) is None for operand in operands)
        else:
            is_one = node.op_type in ("Add", "Where", "Mul", "Div", "Reshape") and not found.isdisjoint(operands)
        found.update(node.outputs if is_one else ())
    return found


def _unmasked(value: ir.Value | None, products: Collection[ir.Value]) -> ir.Value | None:
    """The scores behind masks: their numbers say 'never', and a scale that holds them has room for nothing else."""
    while value is not None and (maker := value.producer()) is not None and maker.op_type in ("Add", "Where"):
        operands = maker.inputs if maker.op_type == "Add" else maker.inputs[1:]
        scores = [operand for operand in operands if operand in products]
        if len(scores) != 1:
            break
        value = scores[0]
    return value


def _embeddings(residuals: tuple[Residual, ...]) -> list[ir.Value | None]:
    if not residuals:
        return []
    around = residuals[0].skip
    maker = around.producer()
    before = maker.inputs[0] if maker is not None and maker.op_type in NORMS else around
    return [before] if before is not None and before.producer() is not None else []


def measure_ranges(model: ir.Model, groups: Groups, samples: Iterable[Sample]) -> dict[str, Range]:
    """The extremes of every tensor of the groups over the samples."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    found = collect(model, dict.fromkeys(names, ()), samples)
    return {name: minmax(known.histogram, "int8") for name, known in found.items() if known.histogram.total}


@dataclass
class Switchboard:
    """A float model whose groups of activations can be quantized and left alone from run to run.

    Attributes:
        model: The float model.
        ranges: Tensor name to its range; tensors without one stay in float.
        target: Whose integers stand for the numbers.
    """

    model: ir.Model
    ranges: Mapping[str, Range]
    target: Target
    _session: OrtSession = field(init=False)
    _flags: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        work = self.model.clone()
        names = Names(work.graph)
        made = [value for node in work.graph for value in node.outputs if value.name in self.ranges]
        for value in made:
            name, numbers = value.name or "", self._numbers(value)
            self._flags[name] = _switch(work.graph, value, numbers, names)
        self._session = open_model(work, SessionOptions(threads=1, literal=True))

    def with_quantized(self, names: Collection[str]) -> OrtSession:
        """The model with the tensors called ``names`` quantized."""
        flags = {flag: np.array(name in names) for name, flag in self._flags.items()}
        return Preset(self._session, flags)

    def _numbers(self, value: ir.Value) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
        numbers = integers_for(self.ranges[value.name or ""], self.target.activation, half=False)
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        return ir.tensor(np.array(numbers.scale, dtype)), ir.tensor(numbers.zero)


def _switch(
    graph: ir.Graph, value: ir.Value, numbers: tuple[ir.TensorProtocol, ir.TensorProtocol], names: Names
) -> str:
    """Put ``flag ? dequantize(quantize(value)) : value`` behind ``value``; returns the name of the flag."""
    output = value.name or ""
    flag = ir.Value(name=names.fresh(f"{output}/quantized"), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    scale, zero = (_initializer(graph, names.fresh(f"{output}/{i}"), tensor) for i, tensor in enumerate(numbers))
    q = ir.node("QuantizeLinear", [value, scale, zero], name=names.fresh(f"{output}/QuantizeLinear"))
    dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero], name=names.fresh(f"{output}/DequantizeLinear"))
    chosen = ir.node("Where", [flag, dq.outputs[0], value], name=names.fresh(f"{output}/Where"))
    result = chosen.outputs[0]
    ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
    q.replace_input_with(0, value)
    chosen.replace_input_with(2, value)
    value.name = names.fresh(f"{output}/float")
    result.name, result.type, result.shape = output, value.type, value.shape
    q.outputs[0].name, dq.outputs[0].name = names.fresh(f"{output}/q"), names.fresh(f"{output}/dq")
    graph.inputs.append(flag)
    maker = value.producer()
    assert maker is not None
    graph.insert_after(maker, [q, dq, chosen])
    return flag.name or ""


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]), const_value=tensor)
    graph.register_initializer(value)
    return value


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is left in float.
        tensors: How many tensors that are.
        score: Outputs against those of float.
    """

    name: str
    tensors: int
    score: Score


def leave_one_out(
    model: ir.Model, groups: Groups, ranges: Mapping[str, Range], excerpt: Excerpt, target: Target
) -> list[Row]:
    """Return a row with every tensor quantized, one for each group left out, and one for its last layers.

    Samples run one by one: padding would be quantized as well, and mask what the groups do.
    """
    everything = {name for names in groups.values() for name in names}
    left_out: dict[str, tuple[str, ...]] = {"nothing": (), **groups}
    if FFN in groups:
        left_out[LAST] = last_layers(groups[FFN])
    board = Switchboard(model, ranges, target)
    truth = board.with_quantized(())
    layout = find_layout(truth, excerpt.samples[0], excerpt.static, excerpt.output)
    sessions = {name: board.with_quantized(everything - set(off)) for name, off in left_out.items()}
    tallies = {name: Tally(excerpt.task) for name in left_out}
    for index, sample in enumerate(excerpt.samples):
        feeds = fill({name: array[None] for name, array in sample.items()}, layout.rows)
        rows = layout.run(truth, feeds, 1)[layout.main]

        def run_one(session: OrtSession, feeds: Feeds = feeds) -> Vectors:
            return layout.run(session, feeds, 1)[layout.main]

        found = side_by_side(run_one, sessions.values())
        for name, result in zip(sessions, found, strict=True):
            tallies[name].add([index], feeds, rows, result)
    return [Row(name, len(left_out[name]), tally.score()) for name, tally in tallies.items()]
