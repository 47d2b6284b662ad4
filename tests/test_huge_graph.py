"""Graphs of many nodes: commands stay near-linear in time, small in memory, and need no recursion."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import onnx
import pytest

from qexport.exporter.load import load_model
from qexport.exporter.looking.inspect import inspect_model
from qexport.exporter.looking.tree import name_tree

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL, LARGE = 3_000, 12_000


@pytest.fixture(scope="module")
def huge():
    """The benchmark's module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("huge_graph", BENCHMARKS / "huge_graph.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["huge_graph"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_the_graph_has_the_nodes_and_initializers_that_it_promises(huge, tmp_path):
    huge.write_graph(tmp_path / "g.onnx", 800)
    graph = onnx.load(tmp_path / "g.onnx").graph
    assert (len(graph.node), len(graph.initializer), len(graph.value_info)) == (800, 200, 0)


def look(path):
    """Seconds of a processor that loading, inspecting and the tree take."""
    start = time.process_time()
    model = load_model(path)
    found = inspect_model(model)
    assert name_tree(model, found.layers)[0].nodes == found.nodes
    return time.process_time() - start


def test_four_times_the_nodes_take_about_four_times_as_long(huge, tmp_path):
    for nodes in (SMALL, LARGE):
        huge.write_graph(tmp_path / f"{nodes}.onnx", nodes)
    look(tmp_path / f"{SMALL}.onnx")  # what is imported and looked up once
    small = min(look(tmp_path / f"{SMALL}.onnx") for _ in range(3))
    assert look(tmp_path / f"{LARGE}.onnx") < 8 * small
