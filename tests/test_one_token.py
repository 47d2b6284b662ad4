"""A decoder that reads one token of each row computes what it did, without nodes that only move that axis."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cached_models import KV_HEADS, LAYERS, VOCABULARY, Tiny, portable, serialized
from helpers import feeds_of, model_from, session

from qexport.passes.one_token import OneToken

TINY = Tiny(positions=40)


def ops(model):
    return [node.op_type for node in model.graph]


def text(body, shape="n, 1, 12"):
    """A model that reads tokens' numbers beside ``input_ids``, so that there is a sequence."""
    graph = f"g (int64[n, 1] input_ids, float[{shape}] x) => (float[] y) {{ {body} }}"
    return model_from(graph, opset=24)


def constants(first, second):
    return f"a = Constant<value_ints = {first}>() b = Constant<value_ints = {second}>()"


def same(model):
    """Whether numbers stay bit for bit the same, whatever the pass does."""
    given = {name: array[:, :1] if name == "input_ids" else array for name, array in feeds_of(model).items()}
    before = session(model).run(None, given)
    OneToken()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return all(np.array_equal(a, b) for a, b in zip(before, session(model).run(None, given), strict=True))


def test_a_decoder_has_no_transposes_left_and_the_same_numbers():
    model, rng = portable(TINY), np.random.default_rng(0)
    known = {
        "input_ids": rng.integers(0, VOCABULARY, (3, 1)),
        "position_ids": np.array([[3], [0], [7]]),
        "write_indices": np.array([3, 0, 7]),
    }
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            cache = rng.standard_normal((3, KV_HEADS, 16, 8)).astype(np.float32)
            known[f"past_key_values.{layer}.{kind}"] = cache
    before = session(model).run(None, known)
    count = len(model.graph)
    outcome = OneToken()(model)
    assert outcome.modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert "Transpose" not in ops(model)
    assert len(model.graph) == count - 4 * LAYERS
    for a, b in zip(before, session(model).run(None, known), strict=True):
        assert np.array_equal(a, b)


def test_a_second_run_changes_nothing():
    model = portable(TINY)
    OneToken()(model)
    before = serialized(model)
    outcome = OneToken()(model)
    assert (outcome.modified, outcome.decisions) == (False, ())
    assert serialized(model) == before


def test_logits_are_those_of_one_token():
    model = portable(TINY)
    OneToken()(model)
    assert [str(size) for size in model.graph.outputs[0].shape] == ["batch", "1", str(VOCABULARY)]


@pytest.mark.parametrize(
    ("shape", "perm", "moves"),
    [
        ("n, 1, 12", "0, 2, 1", False),
        ("n, 1, 12", "1, 0, 2", True),  # the batch would have to be told in another place
        ("2, 1, 12", "1, 0, 2", False),
        ("2, 1, 12", "2, 1, 0", True),
        ("n, 3, 12", "0, 2, 1", True),
        ("1, m, 1, n", "2, 1, 0, 3", False),
        ("1, m, 1, n", "0, 2, 1, 3", True),
    ],
)
def test_a_transpose_goes_where_it_moves_nothing(shape, perm, moves):
    model = text(f"y = Transpose<perm = [{perm}]>(x)", shape)
    assert same(model)
    assert ops(model) == (["Transpose"] if moves else ["Reshape"])


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ([0, 0, 4, 3], [0, 4, 1, 3], 1),
        ([0, 12, 1], [0, 3, 4], 1),
        ([0, 0, -1, 3], [0, 0, 2, 6], 1),
        ([0, 0, 4, 3], [0, 0, 0, 3, 1], 1),
        ([0, -1, 3], [0, 0, -1], 2),  # two sizes that nobody tells
    ],
)
def test_two_reshapes_become_one(first, second, left):
    model = text(f"{constants(first, second)} h = Reshape(x, a) y = Reshape(h, b)")
    assert same(model)
    assert ops(model).count("Reshape") == left


def test_a_reshape_that_others_read_stays():
    model = text(f"{constants([0, 12], [0, 3, 4])} h = Reshape(x, a) r = Reshape(h, b) s = ReduceSum(h) y = Add(r, s)")
    assert same(model)
    assert ops(model).count("Reshape") == 2
    assert next(node for node in model.graph if node.outputs[0].name == "r").inputs[0].name == "x"


def test_zeros_that_are_meant_are_left_alone():
    model = text(f"{constants([2, 12], [3, 8])} h = Reshape<allowzero = 1>(x, a) y = Reshape(h, b)")
    assert same(model)
    assert ops(model).count("Reshape") == 2


def test_a_shape_that_is_computed_is_left_alone():
    model = text(f"c = Shape(x) {constants([0], [0, 3, 4])} h = Reshape(x, c) y = Reshape(h, b)")
    assert same(model)
    assert ops(model).count("Reshape") == 2
