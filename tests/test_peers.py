"""What the benchmark of other tools says about files: whether TensorRT reads them, and what is known of a row."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("peers", BENCHMARKS / "peers.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["peers"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("peers", None)


def written(folder, nodes, **tensors):
    """An ONNX file with the input x [4], the output y and the constants ``tensors``."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    path = folder / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("far", 1)]), path
    )
    return path


def quantized(*zero_point):
    """A pair of quantizers."""
    return [
        helper.make_node("QuantizeLinear", ["x", "s", *zero_point], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", *zero_point], ["y"]),
    ]


@pytest.mark.parametrize(
    ("zero_point", "verdict"),
    [
        (np.int8(0), "yes"),
        (np.int8(3), "no: zero points"),
        (np.uint8(0), "no: uint8"),
        (np.uint8(128), "no: uint8"),
        (np.int16(0), "no: int16"),
    ],
)
def test_signed_8_bit_with_zero_point_0_is_what_tensorrt_reads(peers, tmp_path, zero_point, verdict):
    path = written(tmp_path, quantized("z"), s=np.float32(0.1), z=zero_point)
    assert peers.engine_reads(path) == verdict


def test_a_quantizer_without_zero_point_is_unsigned(peers, tmp_path):
    verdict = peers.engine_reads(written(tmp_path, quantized(), s=np.float32(0.1)))
    assert verdict.startswith("no: ")
    assert "uint8" in verdict


def test_one_bad_channel_is_enough(peers, tmp_path):
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0)]
    nodes.append(helper.make_node("Add", ["x", "d"], ["y"]))
    tensors = {"w": np.arange(4, dtype=np.int8), "s": np.ones(4, np.float32)}
    assert peers.engine_reads(written(tmp_path, nodes, z=np.zeros(4, np.int8), **tensors)) == "yes"
    assert peers.engine_reads(written(tmp_path, nodes, z=np.int8([0, 0, 0, 1]), **tensors)) == "no: zero points"


def test_operators_that_quantize_at_every_call_and_foreign_ones_are_named(peers, tmp_path):
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Wonder", ["d"], ["y"], domain="far"),
    ]
    verdict = peers.engine_reads(written(tmp_path, nodes))
    assert verdict.startswith("no: ")
    assert {"DynamicQuantizeLinear", "operators of far"} <= set(verdict.removeprefix("no: ").split(", "))


def test_a_file_that_is_not_onnx_is_not_read(peers, tmp_path):
    assert peers.engine_reads(tmp_path / "model.xml") == "no: not ONNX"


def test_what_is_noted_of_a_row_is_merged(peers, tmp_path, monkeypatch):
    monkeypatch.setattr(peers.peer, "PLACE", tmp_path)
    peers.note("float", {"mean": 1.0, "speed": "old"})
    peers.note("float", {"speed": "new"})
    assert peers.known("float") == {"mean": 1.0, "speed": "new"}
    assert peers.known("nncf") == {}


def test_a_tool_that_is_missing_says_so_and_keeps_what_was_measured(peers):
    row = peers.ROWS["nncf"]
    assert peers.line(row, {}, installed=False)["Spearman x100"] == "not installed"
    assert peers.line(row, {}, installed=True)["Spearman x100"] is None
    assert peers.line(row, {"spearman": 82.0}, installed=False)["Spearman x100"] == "82.00"
    assert peers.find_python("a_tool_that_nobody_has", []) is None


def test_every_row_has_a_method(peers):
    known = {*peers.methods.METHODS, *peers.peer.METHODS}
    assert {row.method for row in peers.ROWS.values()} <= known
