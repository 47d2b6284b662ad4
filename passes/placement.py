"""Where quantizers go: the roots worth quantizing, which of their inputs, and the reason for every refusal.

Decisions are per consumer: a tensor that feeds a MatMul and a residual Add is quantized for the MatMul only, and no
normalization, softmax or activation ever reads a tensor that was quantized for somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from qexport.passes.base import Decision
from qexport.passes.match import constant, consumer, dims, operands
from qexport.passes.numbers.masks import Pattern
from qexport.passes.target import Target

ATTENTION = "both inputs are computed (attention product)"
MIN_HEAD, MAX_HEAD, MAX_SEQUENCE = 16, 256, 512
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, None}
TWO_OF_FOUR = Pattern.parse("2:4")

Outputs = Literal["none", "sparse"]
"""Which roots have their output quantized, too: those with 2:4 weights, where the target has kernels for them."""


@dataclass(frozen=True, slots=True)
class Site:
    """One node to quantize.

    Attributes:
        node: The node.
        inputs: Indices of its inputs that get an activation quantizer.
        weight: Index of its constant weight, or ``None``.
        axis: Axis of the weight's output channels.
        output: What leaves the fused kernel, where all its readers shall get quantized numbers.
    """

    node: ir.Node
    inputs: tuple[int, ...]
    weight: int | None = None
    axis: int = 0
    output: ir.Value | None = None

    @property
    def measured(self) -> Iterator[ir.Value]:
        """All values that need a range."""
        yield from self.values
        if self.output is not None:
            yield self.output

    @property
    def values(self) -> Iterator[ir.Value]:
        """The activations to quantize at its inputs."""
        for index in self.inputs:
            value = self.node.inputs[index]
            if value is not None:
                yield value

    @property
    def kind(self) -> str:
        """What is quantized, for the report."""
        if self.weight is not None:
            return "weight and activation" if self.output is None else "2:4 weight, activation and output"
        return "both inputs" if len(self.inputs) == 2 else "skip input of a residual Add"

    @property
    def kernel(self) -> ir.TensorProtocol:
        """The constant weight."""
        tensor = None if self.weight is None else constant(self.node.inputs[self.weight])
        if tensor is None:
            raise ValueError(f"node {self.node.name!r} has no constant weight")
        return tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """What may be quantized, in graph order, and what was left out.

    Attributes:
        roots: Products and convolutions.
        skips: What a residual Add could need if all roots are quantized; :func:`residual_sites` says what it does need.
        refused: One decision for every root that should stay in float.
    """

    roots: tuple[Site, ...]
    skips: tuple[Site, ...]
    refused: tuple[Decision, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """All of them: what calibration measures."""
        return self.roots + self.skips


def plan(model: ir.Model, target: Target, *, attention: bool = False, outputs: Outputs = "none") -> Plan:
    """Find the sites of ``model`` that are worth quantizing for ``target``.

    With ``attention``, products of two computed tensors are sites too, where sizes that are known allow it.
    """
    sites: list[Site] = []
    refused: list[Decision] = []
    for node in model.graph:
        if node.op_type not in CHANNEL_AXIS or node.domain not in ("", "ai.onnx"):
            continue
        reason = next(_reasons(node, target), None)
        if reason is None:
            sites.append(Site(node, (0,), 1, CHANNEL_AXIS[node.op_type](node)))
        elif reason == ATTENTION and attention and _attention_fits(node):
            sites.append(Site(node, (0, 1)))
        else:
            refused.append(Decision(node.name or "", node.op_type, "skipped", reason))
    refused += [
        Decision(node.name or "", node.op_type, "skipped", "inside a control-flow branch")
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type in CHANNEL_AXIS and node.graph is not model.graph
    ]
    if outputs == "sparse" and target.sparse_kernels:
        sites = list(_with_outputs(model.graph, sites, target))
    skips = [] if target.residual_add == "none" else _possible_skips(model.graph, sites, target)
    return Plan(tuple(sites), tuple(skips), tuple(refused))


def _gemm_axis(node: ir.Node) -> int:
    return 0 if node.attributes.get_int("transB", 0) else 1


CHANNEL_AXIS: dict[str, Callable[[ir.Node], int]] = {
    "Conv": lambda node: 0,
    "ConvTranspose": lambda node: 1,
    "Gemm": _gemm_axis,
    "MatMul": lambda node: 1,
}


def _reasons(node: ir.Node, target: Target) -> Iterator[str]:
    """Yield why ``node`` should stay in float; nothing if it should not."""
    x, w = node.inputs[:2]
    kernel = constant(w)
    if x is None or x.dtype not in FLOATS or (kernel is not None and kernel.dtype not in FLOATS):
        yield "not a float operator"
    elif kernel is None:
        yield "weight is on the left" if constant(x) is not None else ATTENTION
    elif node.op_type in ("Conv", "ConvTranspose"):
        yield from _conv_reasons(node, kernel, target)
    else:
        yield from _product_reasons(node, kernel, target)


def _attention_fits(node: ir.Node) -> bool:
    """Whether no known size is beyond what int8 attention kernels take: heads of 16 to 256, sequences up to 512.

    In Q K^T the inner axis is the head; in P V the inner axis is a sequence and the last axis is the head.
    """
    if node.op_type != "MatMul" or any(value is None or value.dtype not in FLOATS for value in node.inputs):
        return False
    sizes = [size for value in node.inputs for size in (dims(value) or ())[-2:] if isinstance(size, int)]
    return all(size <= MAX_SEQUENCE for size in sizes) and any(MIN_HEAD <= size <= MAX_HEAD for size in sizes or [16])


def _conv_reasons(node: ir.Node, kernel: ir.TensorProtocol, target: Target) -> Iterator[str]:
    group = node.attributes.get_int("group", 1)
    shape = kernel.numpy().shape
    channels = shape[0] if node.op_type == "ConvTranspose" else shape[1] * group
    if group > 1 and group == channels:
        yield "depthwise convolution"
    if channels < target.min_channels and channels % 8:
        yield f"fewer than {target.min_channels} input channels"


def _product_reasons(node: ir.Node, kernel: ir.TensorProtocol, target: Target) -> Iterator[str]:
    if len(kernel.shape) != 2:
        yield "weight is not a matrix"
    elif min(kernel.numpy().shape) < target.min_dim:
        yield f"K or N below {target.min_dim}"
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is not None and len(shape) > 0 and shape.is_static() and all(d == 1 for d in shape.numpy()[:-1]):
        yield "matrix-vector product"
    if node.attributes.get_int("transA", 0):
        yield "transposed activation"


def residual_sites(graph: ir.Graph, chosen: Iterable[Site], target: Target) -> list[Site]:
    """Every Add with an input that comes straight from a chosen convolution; the other input, the skip, is anything.

    Of two convolutions the one farther from the graph inputs is fused with the Add.
    """
    if target.residual_add == "none":
        return []
    return [
        Site(node, (1 - main,) if target.residual_add == "skip" else (0, 1))
        for node, main in _fused_adds(graph, chosen)
    ]


def _fused_adds(graph: ir.Graph, chosen: Iterable[Site]) -> Iterator[tuple[ir.Node, int]]:
    """Every residual Add that fuses with a convolution, and the index of the input that it makes."""
    depth = _depths(graph)
    for node, fused in _fusing_adds(graph, chosen):
        main = max(fused, key=lambda index: depth[_consumed_alone(node.inputs[index])])
        if constant(node.inputs[1 - main]) is None:
            yield node, main


def _with_outputs(graph: ir.Graph, roots: Iterable[Site], target: Target) -> Iterator[Site]:
    """The roots, those with 2:4 weights together with what their fused kernel makes.

    TensorRT takes a sparse int8 kernel only where its epilogue keeps data in int8 (NVIDIA Model Optimizer, "Sparse +
    INT8 -> ONNX -> TensorRT example", which quantizes what a linear layer makes, its bias added). So the quantizer
    stands behind what the engine fuses into the product: the bias; the residual sum of a convolution, where the target
    says that they fuse; a Relu or Clip. What comes then, a Gelu or a residual sum, computes with dequantized numbers.
    """
    known = list(roots)
    sums = {} if target.residual_add != "skip" else {node.inputs[i]: node for node, i in _fused_adds(graph, known)}
    for site in known:
        if site.weight is None or not is_two_of_four(site):
            yield site
            continue
        made = _biased(site)
        made = sums[made].outputs[0] if made in sums else made
        activation = consumer(made, "Relu", "Clip")
        made = made if activation is None else activation.outputs[0]
        yield site if made.is_graph_output() else replace(site, output=made)


def is_two_of_four(site: Site) -> bool:
    """Whether of every 4 consecutive inputs of each output of a layer at most 2 have a weight."""
    zero = site.kernel.numpy() == 0
    convolution = {"Conv": 1, "ConvTranspose": 0}
    inputs = convolution.get(site.node.op_type, 1 - site.axis)
    moved = zero.swapaxes(0, inputs)
    return TWO_OF_FOUR.fits(moved.reshape(len(moved), -1))


def _biased(site: Site) -> ir.Value:
    """The output of a root, or of the only thing that reads it if that adds a bias."""
    made = site.node.outputs[0]
    add, channels = consumer(made, "Add"), site.kernel.numpy().shape[site.axis]
    biases = (constant(other) for one, other in operands(add) if one is made)
    return add.outputs[0] if add and any(b is not None and b.size in (1, channels) for b in biases) else made


def _possible_skips(graph: ir.Graph, roots: Iterable[Site], target: Target) -> Iterator[Site]:
    """The sites of :func:`residual_sites` for any choice among ``roots``."""
    for node, fused in _fusing_adds(graph, roots):
        for main in fused:
            if constant(node.inputs[1 - main]) is None:
                yield Site(node, (1 - main,) if target.residual_add == "skip" else (0, 1))


def _fusing_adds(graph: ir.Graph, sites: Iterable[Site]) -> Iterator[tuple[ir.Node, list[int]]]:
    """Every Add that reads a convolution of ``sites`` alone, and the indices of such inputs."""
    convs = {site.node for site in sites if site.node.op_type == "Conv"}
    for node in graph:
        if node.op_type == "Add" and node.domain == "":
            fused = [index for index, value in enumerate(node.inputs) if _consumed_alone(value) in convs]
            if fused:
                yield node, fused


def _consumed_alone(value: ir.Value | None) -> ir.Node | None:
    """The node that makes ``value``, if only one input reads it and it is no output of the model."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return value.producer()


def _depths(graph: ir.Graph) -> dict[ir.Node | None, int]:
    """Longest distance of every node from the graph inputs."""
    depth: dict[ir.Node | None, int] = {None: 0}
    for node in graph:
        depth[node] = 1 + max((depth.get(v.producer(), 0) for v in node.inputs if v is not None), default=0)
    return depth
