"""Looking at graphs of many nodes: seconds and peak memory of ``check``, ``inspect`` and ``inspect --tree``.

    python benchmarks/huge_graph.py [NODES ...]

Every graph has a chain of blocks like those of transformers, four nodes to an initializer, and no ``value_info``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from measure import WORK, Row, report
from onnx import TensorProto, helper

SIZES = (50_000, 200_000)
BLOCK = ("MatMul", "Add", "Relu", "Mul", "Tanh", "Sub", "Sigmoid", "Neg")
WEIGHTED = {"MatMul", "Add"}  # of each block: one initializer for every four nodes
COMMANDS = {"check": ("check",), "inspect": ("inspect",), "inspect --tree": ("inspect", "--tree")}
WIDTH = 4


def write_graph(path: Path, nodes: int) -> None:
    """Write a chain of ``nodes`` nodes with a quarter as many initializers."""
    blocks = nodes // len(BLOCK)
    made = [node for number in range(blocks) for node in block_nodes(number)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("0", str(len(made))))
    weights = [weight for number in range(blocks) for weight in block_weights(number)]
    graph = helper.make_graph(made, "huge", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def block_nodes(number: int) -> Iterator[onnx.NodeProto]:
    """The nodes of one block, each reading what the one before it makes."""
    for place, op in enumerate(BLOCK):
        index = number * len(BLOCK) + place
        second = {"MatMul": f"w{number}", "Add": f"b{number}"}.get(op)
        inputs = [str(index), *([second] if second else [str(index)] * (op in ("Mul", "Sub")))]
        name = f"/encoder/layer.{number // 8}/part{number % 8}/{op}"
        yield helper.make_node(op, inputs, [str(index + 1)], name=name)


def block_weights(number: int) -> Iterator[onnx.TensorProto]:
    """The initializers of one block."""
    yield helper.make_tensor(f"w{number}", TensorProto.FLOAT, [WIDTH, WIDTH], bytes(4 * WIDTH * WIDTH), raw=True)
    yield helper.make_tensor(f"b{number}", TensorProto.FLOAT, [WIDTH], bytes(4 * WIDTH), raw=True)


@dataclass(frozen=True)
class Taken:
    """What a command took: seconds on the wall and of a processor, and its largest resident size in bytes."""

    wall: float
    processor: float
    peak: int


def run_command(words: tuple[str, ...], path: Path) -> Taken:
    """Run a command of qexport in a process of its own, and see what it and its children took."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "qexport", words[0], str(path), *words[1:]], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(words)} failed with exit code {child.returncode}")
    return Taken(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def measure_size(nodes: int) -> Iterator[Row]:
    """A row for every command on a graph of this size."""
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / f"huge-{nodes}.onnx"
    write_graph(path, nodes)
    for name, words in COMMANDS.items():
        taken = run_command(words, path)
        yield {
            "nodes": nodes,
            "initializers": nodes // 4,
            "command": f"`{name}`",
            "processor, s": round(taken.processor, 1),
            "wall, s": round(taken.wall, 1),
            "peak memory, MB": round(taken.peak / 1e6),
        }
    path.unlink()


def main() -> None:
    """Measure and write the table."""
    sizes = [int(argument) for argument in sys.argv[1:]] or list(SIZES)
    rows = [row for size in sizes for row in measure_size(size)]
    note = "The whole command, the start of the interpreter included; one process, nothing else ran."
    report("huge_graph", rows, note)


if __name__ == "__main__":
    main()
