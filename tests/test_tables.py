"""Embedding tables as integer rows."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers import model_from

from qexport.passes.quantize import Quantize

RNG = np.random.default_rng(0)
TWO = """g (int64[n] a, int64[m] b) => (float[n, 64] y, float[m, 64] z) {
    y = Gather(table, a)  z = Gather(table, b) }"""


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def run(model, **feeds):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def two_readers(table):
    model = model_from(TWO, table=table)
    model.graph[0].name, model.graph[1].name = "first", "second"
    return model


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_two_readers_of_one_table_share_its_rows_and_have_names_of_their_own(target):
    table = normal(2048, 64)
    model = two_readers(table)
    assert Quantize(target=target)(model).modified
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) < table.nbytes / 3.5
    ids = np.arange(0, 2048, 31)
    for found in run(model, a=ids, b=ids):
        np.testing.assert_allclose(found, table[ids], atol=0.03)
    assert not Quantize(target=target)(model).modified


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_a_table_is_kept_by_the_name_of_a_reader(target):
    model = two_readers(normal(2048, 64))
    result = Quantize(target=target, keep=("first",))(model)
    assert not result.modified
    assert {d.node: d.reason for d in result.decisions} == {
        "first": "kept in float by name",
        "second": "something else reads the float table",
    }


@pytest.mark.parametrize("other", ["z = Transpose(table)", "z = Gather <axis = 1> (table, b)"])
@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_a_table_that_something_else_reads_is_not_stored_twice(target, other):
    text = f"g (int64[n] a, int64[m] b) => (float[n, 64] y, float[p, q] z) {{ y = Gather(table, a) {other} }}"
    model = model_from(text, table=normal(2048, 64))
    assert not Quantize(target=target)(model).modified
    assert list(model.graph.initializers) == ["table"]


def test_a_table_too_small_for_float16_scales_keeps_its_digits():
    table, ids = normal(2048, 64) * np.float32(1e-4), np.arange(9)
    for target, modified in (("tensorrt-rtx", False), ("ort-cpu", True)):
        model = two_readers(table)
        result = Quantize(target=target)(model)
        assert result.modified == modified
        assert modified or {d.reason for d in result.decisions} == {"weights too small for float16 scales"}
        np.testing.assert_allclose(run(model, a=ids, b=ids)[0], table[ids], atol=3e-6)


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_a_half_precision_table_is_read_back_in_half_precision(target):
    table, ids = normal(2048, 64).astype(np.float16), np.arange(0, 2048, 31)
    model = model_from(TWO.replace("float", "float16"), table=table)
    assert Quantize(target=target)(model).modified
    (found, _) = run(model, a=ids, b=ids)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, table[ids], atol=0.03)


def test_the_scales_of_a_very_tall_table_are_no_table():
    table = normal(1 << 17, 16)
    model = model_from("g (int64[n] a) => (float[n, 16] y) { y = Gather(table, a) }", table=table)
    assert Quantize(target="ort-cpu")(model).modified
    assert not Quantize(target="ort-cpu")(model).modified
