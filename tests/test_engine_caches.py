"""Engines of graphs that write into caches: what TensorRT-RTX takes, and what it would misread."""

from __future__ import annotations

import pytest
from onnx import TensorProto as T
from onnx import helper

from qexport.errors import BuildFailed
from qexport.exporter.engines.engine import EngineOptions, build_engine

pytestmark = pytest.mark.rtx
SIZES = {"batch": (1, 1, 2), "n": (1, 1, 8), "max_seq": (32, 32, 32)}
FROZEN = (("max_seq", 32),)


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def cached(dtype=T.FLOAT16, size=16, extra=("mask",), **attributes):
    """One attention to a cache that is as long as ``max_seq``, its heads of some size."""
    nodes = [
        helper.make_node("TensorScatter", ["past", "new", "at"], ["present"], name="write", axis=-2),
        helper.make_node("Attention", ["q", "present", "present", *extra], ["y"], name="att", **attributes),
    ]
    shapes = {
        "past": (dtype, ["batch", 1, "max_seq", size]),
        "new": (dtype, ["batch", 1, "n", size]),
        "q": (dtype, ["batch", 2, "n", size]),
        "mask": (dtype, ["batch", 1, "n", "max_seq"]),
        "at": (T.INT64, ["batch"]),
    }
    used = {name for node in nodes for name in node.input}
    inputs = [helper.make_tensor_value_info(name, *shapes[name]) for name in shapes if name in used]
    outputs = [helper.make_tensor_value_info(name, *shapes[like]) for name, like in (("y", "q"), ("present", "past"))]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def profile_of(model):
    """Smallest, best and largest shape of every input."""
    return {
        value.name: tuple(
            [SIZES[dim.dim_param][at] if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for at in range(3)
        )
        for value in model.graph.input
    }


def build(model, rtx, frozen=FROZEN):
    return build_engine(model.SerializeToString(), rtx, EngineOptions((profile_of(model),), frozen=frozen))


@pytest.mark.parametrize(
    ("dtype", "size"), [(T.FLOAT16, 16), (T.FLOAT16, 8), (T.FLOAT, 16)], ids=["kernel", "small heads", "float32"]
)
def test_a_cache_whose_length_is_frozen_becomes_an_engine(rtx, dtype, size):
    engine = build(cached(dtype, size), rtx)
    assert engine.info.profiles[0]["past"][0][2] == 32


def test_a_model_in_a_file_is_frozen_for_the_parser_alone(rtx, tmp_path):
    model, path = cached(), tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert build_engine(path, rtx, EngineOptions((profile_of(model),), frozen=FROZEN)).plan
    assert path.read_bytes() == model.SerializeToString()


def test_a_cache_of_any_length_is_refused_by_the_parser(rtx):
    with pytest.raises(BuildFailed, match=r"write \(TensorScatter\).*static sequence length"):
        build(cached(), rtx, frozen=())


def test_causal_attention_with_lengths_is_refused(rtx):
    with pytest.raises(BuildFailed, match=r"att \(Attention\): nonpad_kv_seqlen with is_causal would be ignored"):
        build(cached(extra=("", "", "", "at"), is_causal=1), rtx)
