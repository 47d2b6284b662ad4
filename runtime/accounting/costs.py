"""What one call of a decoder must read and multiply at least, counted from its graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexport.errors import ModelInvalid
from qexport.passes.portable import PAST
from qexport.safe_io import open_file

if TYPE_CHECKING:
    import onnx_ir as ir

# Of these inputs a step reads a few rows, the ones of its tokens and their positions.
_ROWS = {"Gather": (0,), "GatherBlockQuantized": (0,), "RotaryEmbedding": (1, 2)}
# Where the weight of a product stands.
_WEIGHT = {
    "MatMul": 1,
    "Gemm": 1,
    "MatMulInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulIntegerToFloat": 1,
    "QLinearMatMul": 3,
    "QGemm": 3,
}
_PACKED = "MatMulNBits"  # its attributes tell
_PASSED = ("DequantizeLinear", "Transpose", "Cast", "Reshape", "Identity", "Squeeze")


@dataclass(frozen=True, slots=True)
class Costs:
    """What a decoder reads and computes, whoever runs it.

    Attributes:
        weights: Bytes of constants that every call reads whole, however many tokens it has; of tables of embeddings
            only those count that are multiplied with too.
        kv: Bytes of keys and values of one token in the cache, all layers together.
        flops: Operations per token in products with weights, a multiplication and an addition being two.
        flops_pair: Operations for each pair of a token and one that it looks at, in all layers of attention.
    """

    weights: int
    kv: int
    flops: int
    flops_pair: int = 0

    def bytes_read(self, cached: float, calls: float = 1) -> float:
        """Bytes of so many calls, in which ``cached`` tokens are looked at, of all rows and calls together."""
        return self.weights * calls + self.kv * cached

    def operations(self, tokens: float, pairs: float) -> float:
        """Operations for so many tokens, and pairs of a token and one that it looks at."""
        return self.flops * tokens + self.flops_pair * pairs

    def as_json(self) -> dict[str, Any]:
        """Plain values, for files."""
        return asdict(self)


def count_costs(model: ir.Model) -> Costs:
    """Count what a decoder in the portable layout costs; weights stay where they are, their shapes are enough."""
    graph = model.graph
    nodes = list(graph.all_nodes())
    whole = {
        id(value): value.const_value.nbytes
        for node in nodes
        for place, value in enumerate(node.inputs)
        if value is not None and value.const_value is not None and place not in _ROWS.get(node.op_type, ())
    }
    kv = sum(_cache_bytes(value) for value in graph.inputs if (value.name or "").startswith(PAST))
    return Costs(
        weights=sum(whole.values()),
        kv=kv,
        flops=sum(2 * size for node in nodes if (size := _multiplied(node)) is not None),
        flops_pair=sum(4 * _attended(node) for node in nodes if node.op_type == "Attention"),
    )


def load_costs(path: Path) -> Costs:
    """Count what the decoder in a file costs; its weights are not read where they lie in a file of their own.

    Raises:
        ModelInvalid: The file is no graph.
        QexportError: It cannot be read.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no types

    open_file(path).close()
    try:
        return count_costs(ir.load(path))
    except (DecodeError, ValueError) as error:
        raise ModelInvalid(f"no graph: {error}", where=str(path)) from error


def _cache_bytes(value: ir.Value) -> int:
    """Bytes of one token in a cache ``[batch, heads, max_seq, size]``."""
    sizes = [axis for axis in value.shape or () if isinstance(axis, int)]
    if len(sizes) != 2 or value.dtype is None:
        return 0
    return int(sizes[0] * sizes[1] * value.dtype.itemsize)


def _multiplied(node: ir.Node) -> int | None:
    """Elements of the weight that a node multiplies with; ``None`` where it does not."""
    if node.op_type == _PACKED:
        return int(node.attributes["K"].as_int() * node.attributes["N"].as_int())
    place = _WEIGHT.get(node.op_type)
    shape = None if place is None else _constant_shape(node.inputs[place])
    if shape is None or len(shape) < 2:
        return None
    return _product(shape)


def _constant_shape(value: ir.Value | None) -> Sequence[int] | None:
    """Shape of a constant, looked for behind what stores it otherwise."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in _PASSED:
            return None
        value = node.inputs[0]
    if value is None or value.const_value is None:
        return None
    return [int(axis) for axis in value.const_value.shape]  # type: ignore[arg-type]  # a constant's axes are numbers


def _attended(node: ir.Node) -> int:
    """Heads times size of a head of the queries: what the next product reads of a token; 0 where none is found."""
    for follower in _following(node):
        if follower.op_type == _PACKED:
            return int(follower.attributes["K"].as_int())
        if follower.op_type in _WEIGHT and (size := _multiplied(follower)):
            shape = _constant_shape(follower.inputs[_WEIGHT[follower.op_type]]) or (1,)
            turned = follower.op_type == "Gemm" and "transB" in follower.attributes
            width = shape[0] if turned and follower.attributes["transB"].as_int() else shape[-1]
            return size // width
    return 0


def _following(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes behind one, nearest first."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        after = [user for value in waiting.pop(0).outputs for user, _ in value.uses()]
        for user in after:
            if id(user) not in seen:
                seen.add(id(user))
                waiting.append(user)
                yield user


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
