"""An unrolled decoder says what the decoder says step by step: against a forward in plain numpy, row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cached_models import KV_HEADS, LAYERS, VOCABULARY, Tiny, forward, portable, serialized
from helpers import model_from, session

from qexport.errors import UsageError
from qexport.exporter.families.form import Form
from qexport.exporter.load import open_folder
from qexport.passes.portable import MAX_POSITIONS
from qexport.passes.unroll import Unroll
from qexport.passes.weight_only import WeightOnly

STORIES = Path(__file__).resolve().parents[1] / "samples/decoder/stories260k"
POSITIONS, COLUMNS = 40, 48
TINY = Tiny(positions=POSITIONS)
NAMES = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
ROWS = [[7, 3, 9, 30, 2], [4], [11, 12, 49]]


def unrolled(model=None, **options):
    """A session of the tiny decoder, and its model."""
    model = portable(TINY) if model is None else model
    outcome = Unroll(**options)(model)
    assert outcome.modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return session(model), model


def feeds(rows, start=None, caches=None, **more):
    """What a call reads: rows of any lengths, each behind ``start`` columns."""
    start = np.zeros(len(rows), np.int64) if start is None else np.array(start)
    counts = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), counts.max()), np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    places = np.minimum(np.arange(counts.max()), counts[:, None] - 1)
    empty = np.zeros((len(rows), KV_HEADS, COLUMNS, 8), np.float32)
    caches = caches or dict.fromkeys(NAMES, empty)
    past = {f"past_key_values.{name}": caches[name] for name in NAMES}
    known = {"input_ids": ids, "position_ids": start[:, None] + places, "write_indices": start, "last": counts - 1}
    return known | past | more


def run(opened, given):
    return dict(zip((port.name for port in opened.get_outputs()), opened.run(None, given), strict=True))


def continued(row, steps, choose=np.argmax, tiny=TINY):
    """What follows a row, and the logits of each token, step by step."""
    ids, logits = list(row), []
    for _ in range(steps):
        logits.append(forward(tiny, ids)[-1])
        ids.append(int(choose(logits[-1])))
    return ids[len(row) :], np.array(logits)


def softmax(logits):
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    return chances / chances.sum(-1, keepdims=True)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_most_likely_tokens_of_rows_of_different_lengths(steps):
    opened, _ = unrolled(steps=steps)
    assert run(opened, feeds(ROWS))["ids"].tolist() == [continued(row, steps)[0] for row in ROWS]


def test_caches_go_on_where_the_steps_ended():
    opened, _ = unrolled(steps=3)
    found = run(opened, feeds(ROWS))
    said = found["ids"].tolist()
    caches = {name: found[f"present.{name}"] for name in NAMES}
    kept = [2, 0, 1]  # of what was said, two tokens are right in the first row, none in the second
    new = [[*tokens[2:], 5, 6] if right == 2 else [17, 18] for tokens, right in zip(said, kept, strict=True)]
    start = [len(row) + right for row, right in zip(ROWS, kept, strict=True)]
    whole = [[*row, *tokens[:right], *more] for row, tokens, right, more in zip(ROWS, said, kept, new, strict=True)]
    got = run(opened, feeds(new, start, caches))["ids"].tolist()
    assert got == [continued(row, 3)[0] for row in whole]


def test_caches_are_those_of_reading_the_same_tokens():
    opened, _ = unrolled(steps=4)
    found = run(opened, feeds(ROWS))
    plain = session(portable(TINY))
    for index, (row, said) in enumerate(zip(ROWS, found["ids"].tolist(), strict=True)):
        ids = [*row, *said[:-1]]
        known = feeds([ids])
        known.pop("last")
        truth = run(plain, known)
        for name in NAMES:
            got = found[f"present.{name}"][index, :, : len(ids)]
            np.testing.assert_allclose(got, truth[f"present.{name}"][0, :, : len(ids)], atol=1e-5)


def test_drawn_tokens_come_from_the_distribution_that_is_told():
    opened, _ = unrolled(steps=4, drawn=True)
    rng = np.random.default_rng(5)
    for temperature in (0.5, 1.0, 3.0):
        uniform = rng.random((3, 4))
        found = run(opened, feeds(ROWS, uniform=uniform, inverse_temperature=np.float32([1 / temperature])))
        np.testing.assert_allclose(found["chances"].sum(-1), 1, atol=1e-14)
        assert found["chances"].dtype == np.float64
        for row, tokens, chances, numbers in zip(ROWS, found["ids"], found["chances"], uniform, strict=True):
            chosen = iter(tokens)
            _, logits = continued(row, 4, lambda _, chosen=chosen: next(chosen))
            np.testing.assert_allclose(chances, softmax(logits / temperature), atol=1e-5)
            assert tokens.tolist() == [np.searchsorted(p.cumsum(), u) for p, u in zip(chances, numbers, strict=True)]


def test_drawn_tokens_are_as_frequent_as_they_are_likely():
    opened, _ = unrolled(steps=1, drawn=True)
    count = 4000
    uniform = ((np.arange(count) + 0.5) / count)[:, None]  # every part of the interval as often
    sharp = np.ones(1, np.float32)
    known = feeds([[7, 3]] * count, uniform=uniform, inverse_temperature=sharp)
    found = run(opened, known)
    share = np.bincount(found["ids"][:, 0], minlength=VOCABULARY) / count
    truth = softmax(forward(TINY, [7, 3])[-1])
    assert np.abs(share - truth).max() <= 1.01 / count


def test_the_ends_of_the_interval_draw_tokens_that_have_a_chance():
    tiny = Tiny(positions=POSITIONS)
    tiny.weights["head"] = tiny.weights["head"] * 400  # nearly all probabilities are zero in float32
    opened, _ = unrolled(portable(tiny), steps=1, drawn=True)
    uniform = np.array([[0.0], [np.nextafter(1, 0)], [1.0]])
    found = run(opened, feeds([[7, 3]] * 3, uniform=uniform, inverse_temperature=np.ones(1, np.float32)))
    chances = found["chances"][:, 0]
    assert (chances == 0).mean() > 0.9
    there = np.flatnonzero(chances[0])
    assert found["ids"][:, 0].tolist() == [there[0], there[-1], there[-1]]


@pytest.mark.parametrize("drawn", [False, True])
def test_a_smaller_vocabulary_leaves_the_other_tokens_out(drawn):
    opened, _ = unrolled(steps=4, vocabulary=11, drawn=drawn)
    drawing = {"uniform": np.full((3, 4), 0.7), "inverse_temperature": np.ones(1, np.float32)} if drawn else {}
    found = run(opened, feeds(ROWS, **drawing))
    if drawn:
        assert found["chances"].shape == (3, 4, 11)
        assert (found["ids"] < 11).all()
    else:
        assert found["ids"].tolist() == [continued(row, 4, lambda logits: logits[:11].argmax())[0] for row in ROWS]


def test_a_larger_vocabulary_changes_nothing():
    opened, _ = unrolled(steps=2, vocabulary=VOCABULARY + 7)
    assert run(opened, feeds(ROWS))["ids"].tolist() == [continued(row, 2)[0] for row in ROWS]


def test_positions_end_where_the_model_has_no_more():
    opened, _ = unrolled(steps=4)
    row = np.random.default_rng(0).integers(0, VOCABULARY, POSITIONS - 1).tolist()
    said = run(opened, feeds([row, row[:5]]))["ids"]
    assert said[0, :2].tolist() == continued(row, 2)[0]  # the second reads the last position
    assert said[1].tolist() == continued(row[:5], 4)[0]


def test_a_model_that_says_no_limit_has_none():
    model = portable(Tiny(positions=100))
    del model.metadata_props[MAX_POSITIONS]
    opened, _ = unrolled(model, steps=3)
    assert run(opened, feeds(ROWS))["ids"].tolist() == [continued(row, 3)[0] for row in ROWS]


def test_inputs_for_a_whole_sequence_are_read_by_every_step():
    opened, _ = unrolled(portable(TINY, extra=True), steps=3)
    bias = 3 * np.random.default_rng(1).standard_normal((3, VOCABULARY)).astype(np.float32)
    found = run(opened, feeds(ROWS, bias=bias))["ids"].tolist()
    for row, said, more in zip(ROWS, found, bias, strict=True):
        assert said == continued(row, 3, lambda logits, more=more: (logits + more).argmax())[0]
    assert found != [continued(row, 3)[0] for row in ROWS]


def test_weights_are_there_once():
    def floats(model):
        return sorted(name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT)

    _, model = unrolled(steps=6)
    assert floats(model) == floats(portable(TINY))
    assert len(serialized(model)) < 2 * len(serialized(portable(TINY)))


def test_the_head_computes_logits_of_one_token_of_each_row():
    _, model = unrolled(steps=1)
    head = next(node for node in model.graph if node.inputs[-1] is model.graph.initializers["head"])
    norm = head.inputs[0].producer()
    assert norm.op_type == "RMSNormalization"
    assert norm.inputs[0].producer().op_type == "GatherND"


def test_the_length_of_caches_is_asked_for_once():
    _, model = unrolled(steps=4)
    asked = [node.inputs[0].name for node in model.graph if node.op_type == "Shape"]
    assert set(asked) == {"past_key_values.0.key"}


def test_a_second_run_changes_nothing():
    _, model = unrolled(steps=2)
    before = serialized(model)
    assert not Unroll(steps=2)(model).modified
    assert serialized(model) == before


def circular(model):
    next(node for node in model.graph if node.op_type == "TensorScatter").attributes["mode"] = ir.AttrString(
        "mode", "circular"
    )


def elsewhere(model):
    node = next(node for node in model.graph if node.op_type == "TensorScatter")
    node.replace_input_with(2, ir.val("other", ir.DataType.INT64, ["batch"]))
    model.graph.inputs.append(node.inputs[2])


def read_first(model):
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.replace_input_with(1, model.graph.inputs[3])


def another_output(model):
    value = next(node for node in model.graph if node.op_type == "Gather").outputs[0]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", 32])
    model.graph.outputs.append(value)


def no_positions(model):
    model.graph.inputs[1].name = "places"


def no_present(model):
    model.graph.outputs.pop()


def free_vocabulary(model):
    model.graph.outputs[0].shape = ir.Shape(["batch", "sequence", None])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (circular, "past_key_values.0.key is not written at write_indices"),
        (elsewhere, "past_key_values.0.key is not written at write_indices"),
        (read_first, "past_key_values.0.key is read before it is written"),
        (another_output, "belongs to one step"),
        (no_positions, "no decoder in the portable layout: position_ids missing"),
        (no_present, "no decoder in the portable layout: present.1.value missing"),
        (free_vocabulary, "the size of the vocabulary is not known"),
    ],
)
def test_what_is_not_portable_is_refused_before_any_edit(edit, reason):
    model = portable(TINY)
    edit(model)
    before = serialized(model)
    outcome = Unroll()(model)
    assert not outcome.modified
    assert [decision.action for decision in outcome.decisions] == ["skipped"]
    assert reason in outcome.decisions[0].reason
    assert serialized(model) == before


def test_a_graph_of_another_kind_is_refused():
    model = model_from("g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }")
    outcome = Unroll()(model)
    assert not outcome.modified
    assert "input_ids, position_ids, write_indices, logits missing" in outcome.decisions[0].reason


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": -1}, {"vocabulary": 0}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(UsageError, match="expected a number above 0"):
        Unroll(**options)


def test_weights_in_few_bits():
    model = portable(TINY)
    assert WeightOnly(target="ort-cpu", bits=8, group=16)(model).modified
    opened, plain = unrolled(model.clone(), steps=3)[0], session(model)
    said = run(opened, feeds(ROWS))["ids"].tolist()
    for row, tokens in zip(ROWS, said, strict=True):
        ids = list(row)
        for token in tokens:
            step = feeds([ids])
            step.pop("last")
            assert run(plain, step)["logits"][0, -1].argmax() == token
            ids.append(token)


def test_half_precision():
    tiny = Tiny(positions=POSITIONS)
    opened, _ = unrolled(portable(tiny, ir.DataType.FLOAT16), steps=3)
    known = feeds(ROWS)
    known = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in known.items()}
    plain = session(portable(tiny, ir.DataType.FLOAT16))
    said = run(opened, known)["ids"].tolist()
    for row, tokens in zip(ROWS, said, strict=True):
        ids = list(row)
        for token in tokens:
            step = feeds([ids], caches={name: known[f"past_key_values.{name}"][:1] for name in NAMES})
            step.pop("last")
            assert run(plain, step)["logits"][0, -1].argmax() == token
            ids.append(token)


def test_a_real_draft_says_what_it_says_step_by_step():
    config, folder, build = open_folder(STORIES)
    model = build(config, folder, Form(cached=True))
    plain = session(model)
    assert Unroll(steps=6)(model).modified
    opened = session(model)
    inputs = {port.name: port.shape for port in plain.get_inputs()}
    caches = {
        name: np.zeros((1, shape[1], 64, shape[3]), np.float32) for name, shape in inputs.items() if len(shape) == 4
    }
    row = [1, 403, 407, 261, 378, 432]
    known = feeds([row]) | caches
    given = {port.name: known[port.name] for port in opened.get_inputs()}
    said = run(opened, given)["ids"][0].tolist()
    for token in said:
        known = feeds([row]) | caches
        assert run(plain, {name: known[name] for name in inputs})["logits"][0, -1].argmax() == token
        row.append(token)
    assert len(set(said)) > 2
