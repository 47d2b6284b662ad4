"""The calls that prove a decoder: what they cover, that right exports pass them, and that faults do not."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cached_models import VOCABULARY, Tiny, forward, portable
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import DataInvalid, GateFailed
from qexport.exporter.families.form import FLOATS, Form
from qexport.exporter.load import open_folder
from qexport.exporter.proof.closeness import SINGLE, Tally, Tolerance, compare, tolerances
from qexport.exporter.proof.decoding import compare_calls, decode, plan
from qexport.exporter.proof.source import Material, find_texts
from qexport.exporter.references import find_reference

STORIES = Path(__file__).resolve().parents[1] / "samples/decoder/stories260k"
LENGTHS = (96, 61, 40)


def padded(texts):
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return ids


@pytest.fixture(scope="module")
def stories():
    """Texts and the logits of whole rows."""
    found = find_texts(Material(tokenizer=STORIES / "tokenizer.json", vocabulary=512, positions=512))
    texts = [row["input_ids"] for row in found.rows]
    config, folder, _ = open_folder(STORIES)
    return texts, find_reference(config, folder, Form())({"input_ids": padded(texts)})["logits"]


def export(dtype):
    config, folder, build = open_folder(STORIES)
    return build(config, folder, Form(dtype=FLOATS[dtype], cached=True, lazy=True))


def verdict(model, stories, dtype):
    texts, truth = stories
    calls = plan(texts)
    found, exact = (decode(model, calls, rounded=rounded) for rounded in (True, False))
    pairs = zip(calls, exact, found, strict=True)
    judged = [(call.what, {"logits": a[call.judged]}, {"logits": b[call.judged]}) for call, a, b in pairs]
    return compare_calls(truth, calls, found, tolerances(FLOATS[dtype], judged))


def everywhere(error, rms):
    return defaultdict(lambda: Tolerance(error, rms))


# ---------------------------------------------------------------- the plan


@given(st.lists(st.integers(1, 120), min_size=1, max_size=4), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_plan_keeps_to_its_texts_and_reads_the_first_one_to_its_end(lengths, seed):
    lengths[0] = max(lengths[0], 6)
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 50, length) for length in lengths]
    written = [np.full(200, -1)] * len(texts)
    for call in plan(texts):
        if call.fresh:
            written = [np.full(200, -1) for _ in texts]
        for line, row in enumerate(call.rows):
            start, columns = call.write_indices[line], np.arange(call.ids.shape[1])
            written[row][start + columns] = call.ids[line]
            judged = call.judged[line]
            assert np.array_equal(call.positions[line][judged], start + columns[judged])
            assert np.array_equal(call.ids[line][judged], texts[row][call.positions[line][judged]])
            for place in call.positions[line][judged]:  # all that it sees was written, and is of the text
                assert np.array_equal(written[row][: place + 1], texts[row][: place + 1])
            assert (call.positions[line] < len(texts[row])).all()
    alone = [call for call in plan(texts) if len(call.rows) == 1 and call.judged.any()]
    judged = np.concatenate([call.positions[call.judged] for call in alone if call.rows == (0,)])
    assert set(judged.tolist()) == set(range(len(texts[0])))


def test_the_calls_are_those_that_decoders_see():
    rng = np.random.default_rng(0)
    calls = plan([rng.integers(0, 50, length) for length in LENGTHS])
    widths = [call.ids.shape for call in calls]
    assert widths == [(1, 20), *[(1, 1)] * 8, (1, 5), (1, 5), (1, 63), (3, 20), (3, 1), (3, 5), (3, 1)]
    assert not calls[9].judged.any()
    assert calls[9].write_indices == calls[10].write_indices
    assert (calls[9].ids != calls[10].ids).any()
    ragged = calls[12:]
    assert all(len(set(call.write_indices.tolist())) == 3 for call in ragged[1:])
    assert not all(call.judged.all() for call in ragged)
    assert [call.fresh for call in calls].count(True) == 2


# ---------------------------------------------------------------- right and wrong decoders


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_right_export_passes_with_a_third_of_what_is_allowed(stories, dtype):
    checks = verdict(export(dtype), stories, dtype)
    assert len(checks) == 5
    for check in checks:
        assert check.error <= check.allowed_error / 3
        assert check.rms <= check.allowed_rms / 2.5
    assert min(check.argmax for check in checks) > 0.95
    assert sum(check.numbers for check in checks) > 512 * (96 + 40)


def theta(model):
    """Positions turn with another base."""
    for name, value in model.graph.initializers.items():
        if name.endswith((".cos", ".sin")):
            rows, pairs = value.shape
            angles = np.outer(np.arange(rows), 20000.0 ** -(np.arange(pairs) / pairs))
            turned = np.cos(angles) if name.endswith("cos") else np.sin(angles)
            value.const_value = ir.tensor(turned.astype(value.dtype.numpy()), name=name)


def norm(model):
    """A norm is left out."""
    node = next(n for n in model.graph if n.op_type == "RMSNormalization" and "layers.1.post" in n.name)
    node.outputs[0].replace_all_uses_with(node.inputs[0])


def gain(model):
    """The gain of a norm is left out."""
    name = next(n for n in model.graph.initializers if "layers.2.input_layernorm" in n)
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(np.ones_like(value.const_value.numpy()), name=name)


def blind(model):
    """A token does not see itself."""
    next(n for n in model.graph if n.op_type == "LessOrEqual").op_type = "Less"


def ahead(model):
    """A token sees the one behind it."""
    node = next(n for n in model.graph if n.op_type == "LessOrEqual")
    one = ir.Value(name="one", type=ir.TensorType(ir.DataType.INT64), const_value=ir.tensor(np.array([1]), name="one"))
    model.graph.register_initializer(one)
    shifted = ir.node("Add", [node.inputs[1], one])
    shifted.outputs[0].name = "shifted"
    model.graph.insert_before(node, shifted)
    node.replace_input_with(1, shifted.outputs[0])


def scale(model):
    """Scores of one layer are twice what they should be."""
    node = [n for n in model.graph if n.op_type == "Attention"][2]
    node.attributes["scale"] = ir.AttrFloat32("scale", 2 * node.attributes["scale"].as_float())


def swapped(model):
    """Keys and values of a layer are swapped."""
    node = [n for n in model.graph if n.op_type == "Attention"][3]
    keys, values = node.inputs[1], node.inputs[2]
    node.replace_input_with(1, values)
    node.replace_input_with(2, keys)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fault", [theta, norm, gain, blind, ahead, scale, swapped])
def test_a_fault_is_caught_in_every_type(stories, dtype, fault):
    model = export(dtype)
    fault(model)
    with pytest.raises(GateFailed, match="not what the source computes") as caught:
        verdict(model, stories, dtype)
    assert "logits" in caught.value.where


def ragged_only(model):
    """All rows write where the first one does."""
    first = ir.Value(name="zero", type=ir.TensorType(ir.DataType.INT64), const_value=ir.tensor([0], name="zero"))
    model.graph.register_initializer(first)
    places = next(value for value in model.graph.inputs if value.name == "write_indices")
    taken = ir.node("Gather", [places, first])
    shape = ir.node("Shape", [places])
    spread = ir.node("Expand", [taken.outputs[0], shape.outputs[0]])
    for number, node in enumerate((taken, shape, spread)):
        node.outputs[0].name = f"spread_{number}"
    users = [(use.node, use.idx) for use in places.uses()]
    model.graph.insert_before(model.graph[0], [taken, shape, spread])
    for node, index in users:
        if node not in (taken, shape):
            node.replace_input_with(index, spread.outputs[0])


def test_a_fault_that_only_batches_have_is_caught_there(stories):
    model = export("float32")
    ragged_only(model)
    with pytest.raises(GateFailed) as caught:
        verdict(model, stories, "float32")
    assert "different lengths" in caught.value.where


def test_a_decoder_of_another_make_passes_with_a_reference_of_its_own():
    tiny, rng = Tiny(), np.random.default_rng(1)
    texts = [rng.integers(0, VOCABULARY, length) for length in (40, 30, 20)]
    truth = np.zeros((3, 40, VOCABULARY), np.float32)
    for row, text in zip(truth, texts, strict=True):
        row[: len(text)] = forward(tiny, text)
    calls, model = plan(texts), portable(tiny)
    checks = compare_calls(truth, calls, decode(model, calls), tolerances(ir.DataType.FLOAT))
    assert all(check.argmax == 1 for check in checks)
    truth[0, 33] = truth[0, 32]
    with pytest.raises(GateFailed, match="text 0, positions"):
        compare_calls(truth, calls, decode(model, calls), tolerances(ir.DataType.FLOAT))


# ---------------------------------------------------------------- closeness


def test_errors_are_shares_of_the_spread():
    truth = np.random.default_rng(0).normal(100, 2, (50, 400))
    noise = np.random.default_rng(1).normal(0, 0.02, truth.shape)
    (check,) = compare("a run", [("here", {"y": truth}, {"y": truth + noise})], everywhere(1, 1))
    assert check.rms == pytest.approx(0.01, rel=0.02)
    assert check.error == pytest.approx(np.abs(noise).max() / 102, rel=0.1)
    assert check.argmax is None


def test_rows_of_few_numbers_are_measured_by_their_size():
    tally = Tally("a run", "logits")
    tally.add(np.array([[3.0, 4.0]]), np.array([[3.0, 4.01]]), "here")
    check = tally.result(Tolerance(1, 1))
    assert check.rms == pytest.approx(0.01 / 5)
    assert check.argmax == 1


def test_whole_numbers_must_be_equal():
    truth = np.array([[1, 2, 3]])
    compare("a run", [("here", {"y": truth}, {"y": truth})], everywhere(1, 1))
    with pytest.raises(GateFailed):
        compare("a run", [("here", {"y": truth}, {"y": truth + np.array([0, 0, 1])})], everywhere(1, 1))


@pytest.mark.parametrize(
    ("truth", "found", "error", "words"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), GateFailed, r"\[2, 4\].*\[2, 3\]"),
        (np.ones((2, 3)), np.full((2, 3), np.nan), GateFailed, "NaN"),
        (np.full((2, 3), np.inf), np.ones((2, 3)), DataInvalid, "source gives NaN or infinity"),
    ],
)
def test_shapes_and_finiteness_count(truth, found, error, words):
    with pytest.raises(error, match=words):
        compare("a run", [("here", {"y": truth}, {"y": found})], everywhere(1e9, 1e9))


def test_an_output_that_is_missing_is_a_failure():
    with pytest.raises(GateFailed, match="no output 'y'"):
        compare("a run", [("here", {"y": np.ones(3)}, {})], everywhere(1, 1))


def test_the_worst_place_is_named():
    truth = np.random.default_rng(0).normal(0, 1, (4, 20))
    found = truth.copy()
    found[2, 7] += 5
    with pytest.raises(GateFailed, match="row 2, number 7"):
        compare("a run", [("here", {"y": truth}, {"y": found})], everywhere(1e-3, 1e9))


def test_sixteen_bits_may_be_as_far_off_as_rounding_puts_them():
    rng = np.random.default_rng(0)
    exact = rng.normal(0, 1, (10, 500))
    runs = [("here", {"y": exact, "z": exact}, {"y": exact + rng.normal(0, 0.01, exact.shape), "z": exact})]
    allowed = tolerances(ir.DataType.FLOAT16, runs)
    assert allowed["z"] == Tolerance(1e-2, 1e-3)
    assert allowed["y"].rms == pytest.approx(0.041, rel=0.05)
    assert allowed["y"].error == pytest.approx(0.41, rel=0.05)
    assert tolerances(ir.DataType.FLOAT)["y"] == SINGLE == Tolerance(1e-4, 2e-5)


def test_numbers_beyond_sixteen_bits_are_a_failure():
    exact = np.full((2, 20), 70000.0)
    with pytest.raises(GateFailed, match="NaN or infinity") as caught, np.errstate(over="ignore"):
        tolerances(ir.DataType.FLOAT16, [("here", {"y": exact}, {"y": exact.astype(np.float16)})])
    assert "float16" in caught.value.where
