"""Decoders in the portable layout against a forward in plain numpy: prompts, steps, rollback, ragged batches."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from cached_models import KV_HEADS, LAYERS, VOCABULARY, Tiny, forward, portable, serialized
from helpers import model_from
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import BuildFailed, DataInvalid, EnvironmentMismatch, ModelInvalid, UsageError
from qexport.passes.portable import MAX_POSITIONS
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions, available_providers

ONE = SessionOptions(threads=1)
TOLERANCE = 1e-5
TINY = Tiny(positions=700)
MODEL = serialized(portable(TINY))
IDS = np.random.default_rng(7).integers(0, VOCABULARY, (4, 700))
TRUTH = [forward(TINY, row[:60]) for row in IDS]


@pytest.fixture
def decoder():
    return Decoder(MODEL, ONE)


def decode(model=MODEL, capacity=256, batch=1):
    made = Decoder(model, ONE, capacity=capacity)
    made.reset(batch)
    return made


def error(logits, truth):
    assert logits.dtype == np.float32
    return np.abs(logits - truth).max() / np.abs(truth).max()


def test_the_signature_is_read_off_the_graph(decoder):
    found = decoder.signature
    assert (found.layers, found.dtype, found.vocabulary, found.positions) == (LAYERS, np.float32, VOCABULARY, 700)
    assert set(found.caches.values()) == {(KV_HEADS, 8)}
    assert not found.context


def test_a_prompt_steps_a_wide_step_and_one_that_is_taken_back_equal_the_whole_row(decoder):
    row, wrong = IDS[:1], (IDS[:1] + 1) % VOCABULARY
    got = [decoder.extend(row[:, :20])[0]]
    got += [decoder.extend(row[:, t : t + 1])[0] for t in range(20, 40)]
    decoder.extend(wrong[:, 40:45])
    decoder.rollback(40)
    got += [decoder.extend(row[:, 40:45])[0], decoder.extend(row[:, 45:60])[0]]
    assert decoder.lengths.tolist() == [60]
    assert error(np.concatenate(got), TRUTH[0]) < TOLERANCE


def test_half_of_a_wide_step_may_stay(decoder):
    row = IDS[:1]
    decoder.extend(row[:, :10])
    mixed = np.where(np.arange(5) < 2, row[:, 10:15], (row[:, 10:15] + 1) % VOCABULARY)
    assert error(decoder.extend(mixed)[0, :2], TRUTH[0][10:12]) < TOLERANCE
    decoder.rollback([12])
    assert error(decoder.extend(row[:, 12:20])[0], TRUTH[0][12:20]) < TOLERANCE


def test_results_do_not_change_where_buffers_grow():
    row, made, got = IDS[:1, :530], decode(), []
    capacities = []
    for start, end in ((0, 255), (255, 256), (256, 257), (257, 300), (300, 512), (512, 530)):
        got.append(made.extend(row[:, start:end])[0])
        capacities.append(made.capacity)
    assert capacities == [256, 256, 512, 512, 512, 700]
    assert error(np.concatenate(got), forward(TINY, row[0])) < TOLERANCE


def test_rows_of_different_lengths_equal_rows_by_themselves():
    lengths = np.array([3, 17, 9, 1])
    made = decode(batch=4)
    junk = np.where(np.arange(17) < lengths[:, None], IDS[:, :17], -5)
    logits = made.extend(junk, lengths)
    assert made.lengths.tolist() == lengths.tolist()
    for row, length in enumerate(lengths):
        assert error(logits[row, :length], TRUTH[row][:length]) < TOLERANCE
    for _ in range(4):
        at = made.lengths
        logits = made.extend(IDS[np.arange(4), at][:, None])
        assert error(logits[:, 0], np.stack([TRUTH[row][t] for row, t in enumerate(at)])) < TOLERANCE
    made.rollback([0, 20, 5, 5])
    at, more = made.lengths, np.array([6, 0, 4, 1])
    wide = np.stack([IDS[row, t : t + 6] for row, t in enumerate(at)])
    logits = made.extend(wide, more)
    for row, (t, count) in enumerate(zip(at, more, strict=True)):
        assert not count or error(logits[row, :count], TRUTH[row][t : t + count]) < TOLERANCE
    assert made.lengths.tolist() == [6, 20, 9, 6]


def test_a_row_that_is_done_waits_at_the_last_position_while_others_go_on():
    tiny = Tiny(positions=12)
    made, truth = decode(serialized(portable(tiny)), capacity=8, batch=2), forward(tiny, IDS[1, :12])
    made.extend(IDS[:2, :12], [12, 4])
    for t in range(4, 12):
        logits = made.extend(IDS[:2, [t]], [0, 1])
        assert error(logits[1, 0], truth[t]) < TOLERANCE
    made.rollback([11, 12])
    logits = made.extend(IDS[:2, [11]], [1, 0])
    assert error(logits[0, 0], forward(tiny, IDS[0, :12])[11]) < TOLERANCE


MOVES = st.lists(
    st.tuples(st.integers(1, 9), st.tuples(st.integers(0, 9), st.integers(0, 9)), st.none() | st.integers(0, 8)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(MOVES, st.sampled_from([2, 16]))
def test_any_mix_of_steps_and_ways_back_equals_the_whole_row(moves, capacity):
    made = decode(capacity=capacity, batch=2)
    for width, wanted, back in moves:
        at = made.lengths
        counts = np.minimum(np.minimum(wanted, width), 60 - at)
        ids = np.stack(
            [np.resize(IDS[row, t : t + count], width) for row, (t, count) in enumerate(zip(at, counts, strict=True))]
        )
        logits = made.extend(ids, counts)
        for row, (t, count) in enumerate(zip(at, counts, strict=True)):
            assert not count or error(logits[row, :count], TRUTH[row][t : t + count]) < TOLERANCE
        if back is not None:
            made.rollback(np.maximum(made.lengths - back, 0))


def test_bound_buffers_give_what_arrays_in_and_out_give(decoder):
    session, past = (
        OrtSession(MODEL, ONE),
        {name: np.zeros((1, KV_HEADS, decoder.capacity, 8), np.float32) for name in decoder.signature.caches},
    )
    for start, end in ((0, 9), (9, 10), (10, 15)):
        place = {"position_ids": np.arange(start, end)[None], "write_indices": np.array([start])}
        found = session.run({"input_ids": IDS[:1, start:end], **place, **past})
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        np.testing.assert_array_equal(decoder.extend(IDS[:1, start:end]), found["logits"])
    for name, buffer in decoder._cache.buffers.items():
        np.testing.assert_array_equal(buffer, past[name])


def test_the_runtime_writes_into_the_bound_buffers_without_a_copy(capfd):
    """Without binding, onnxruntime warns of the copy; with it there must be no such line."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 2  # warnings, whatever the rest of the process wants to hear
    session = ort.InferenceSession(MODEL, settings, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS[:1, :2], "position_ids": np.arange(2)[None], "write_indices": np.zeros(1, np.int64)}
    past = {name: np.zeros((1, KV_HEADS, 8, 8), np.float32) for name in decode().signature.caches}
    session.run(None, {**feeds, **past})
    assert "in-place optimization not activated" in capfd.readouterr().err
    binding = session.io_binding()
    for name, array in {**feeds, **past}.items():
        value = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        if name in past:
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    assert capfd.readouterr().err == ""
    assert all(array[:, :, :2].any() and not array[:, :, 2:].any() for array in past.values())


def test_caches_of_16_bits_stay_close():
    made = decode(serialized(portable(TINY, ir.DataType.FLOAT16)))
    assert made.signature.dtype == np.float16
    got = [made.extend(IDS[:1, :20])[0]] + [made.extend(IDS[:1, [t]])[0] for t in range(20, 30)]
    assert error(np.concatenate(got), TRUTH[0][:30]) < 2e-2


def test_reset_forgets_and_takes_another_batch(decoder):
    decoder.extend(IDS[:1, :300])
    assert decoder.capacity == 320
    decoder.reset(2)
    assert (decoder.capacity, decoder.lengths.tolist()) == (64, [0, 0])
    assert error(decoder.extend(IDS[2:, :9])[1], TRUTH[3][:9]) < TOLERANCE


def test_a_context_is_given_once_per_sequence():
    model = serialized(portable(TINY, extra=True))
    made = Decoder(model, ONE)
    assert list(made.signature.context) == ["bias"]
    with pytest.raises(DataInvalid, match=r"the model reads bias once per sequence \(give them to reset"):
        made.extend(IDS[:1, :3])
    bias = np.random.default_rng(0).standard_normal((2, VOCABULARY)).astype(np.float32)
    made.reset(2, {"bias": bias})
    for start, end in ((0, 5), (5, 6), (6, 300)):
        logits = made.extend(IDS[:2, start:end])
    assert error(logits[1, :54] - bias[1], TRUTH[1][6:]) < TOLERANCE


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ({}, "the context has nothing, the model reads .'bias'."),
        ({"bias": np.zeros((2, VOCABULARY), np.float32), "b": np.zeros(1)}, "the context has .'b', 'bias'."),
        ({"bias": np.zeros((1, VOCABULARY), np.float32)}, r"'bias' is float32 \[1, 50\], .* reads float32 \[2, 50\]"),
        ({"bias": np.zeros((2, 4), np.float32)}, r"'bias' is float32 \[2, 4\]"),
        ({"bias": np.zeros((2, VOCABULARY))}, r"'bias' is float64"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(context, words):
    with pytest.raises(DataInvalid, match=words):
        Decoder(serialized(portable(TINY, extra=True)), ONE).reset(2, context)


@pytest.mark.parametrize(
    ("ids", "counts", "words"),
    [
        (np.array([[0, VOCABULARY]]), None, f"token {VOCABULARY} does not exist, the model has a vocabulary of 50"),
        (np.array([[-1, 0]]), None, "token -1 does not exist"),
        ([[0, 1]], None, r"tokens are a list, expected an array"),
        (None, None, "tokens are a NoneType"),
        (np.zeros((1, 0), np.int64), None, r"int64 \[1, 0\], expected integers \[batch, sequence\], not empty"),
        (np.zeros((1, 2)), None, r"float64 \[1, 2\], expected integers"),
        (np.zeros(2, np.int64), None, r"int64 \[2\], expected integers"),
        (np.zeros((2, 2), np.int64), None, "tokens of 2 rows for a batch of 1"),
        (np.zeros((1, 2), np.int64), [3], r"counts are \[3\], expected 1 integers from 0 to 2"),
        (np.zeros((1, 2), np.int64), [-1], r"counts are \[-1\]"),
        (np.zeros((1, 2), np.int64), [1, 1], r"counts are \[1, 1\]"),
        (np.zeros((1, 2), np.int64), [0.5], r"counts are \[0.5\]"),
        (np.zeros((1, 697), np.int64), None, "row 0 has 4 tokens and 697 more, the model has 700 positions"),
    ],
)
def test_what_cannot_be_read_is_refused_and_changes_nothing(decoder, ids, counts, words):
    decoder.extend(IDS[:1, :4])
    with pytest.raises(DataInvalid, match=words):
        decoder.extend(ids, counts)
    assert decoder.lengths.tolist() == [4]
    assert error(decoder.extend(IDS[:1, 4:9])[0], TRUTH[0][4:9]) < TOLERANCE


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (5, "cannot go back to 5 tokens, it has 4"),
        (1.0, "float64"),
        ([1, 1], "2 lengths"),
        ([[1]], r"int64 \[1, 1\], expected an integer"),
        (None, "object"),
    ],
)
def test_a_way_back_that_is_none_is_refused(decoder, lengths, words):
    decoder.extend(IDS[:1, :4])
    with pytest.raises(DataInvalid, match=words):
        decoder.rollback(lengths)


@pytest.mark.parametrize("rows", [None, 0, [0.0], ["a"], [[0]], [None]], ids=str)
def test_rows_that_are_none_are_refused_and_change_nothing(decoder, rows):
    decoder.extend(IDS[:1, :4])
    with pytest.raises(DataInvalid, match="rows are"):
        decoder.keep(rows)
    decoder.keep(np.array([0]))
    assert error(decoder.extend(IDS[:1, 4:9])[0], TRUTH[0][4:9]) < TOLERANCE


@pytest.mark.parametrize("batch", [0, -1, 1.5, None, "a"])
def test_a_batch_that_is_none_is_refused_and_changes_nothing(decoder, batch):
    decoder.extend(IDS[:1, :4])
    with pytest.raises(DataInvalid, match=f"the batch is {batch!r}, expected at least one row"):
        decoder.reset(batch)
    assert decoder.lengths.tolist() == [4]


def test_a_decoder_without_memory_for_a_batch_takes_a_smaller_one(decoder):
    with pytest.raises(MemoryError):
        decoder.reset(10**12)
    with pytest.raises(DataInvalid, match=r"there are no buffers for any row \(reset\(\) makes them\)"):
        decoder.extend(IDS[:1, :4])
    decoder.reset(1)
    assert error(decoder.extend(IDS[:1, :9])[0], TRUTH[0][:9]) < TOLERANCE


@pytest.mark.parametrize("capacity", [0, 3, 1.5, None])
def test_a_capacity_that_is_no_power_of_two_is_refused(capacity):
    with pytest.raises(UsageError, match=f"the capacity is {capacity!r}, expected a power of two"):
        Decoder(serialized(portable(TINY)), ONE, capacity=capacity)


def test_small_types_of_integers_are_tokens_too(decoder):
    assert error(decoder.extend(IDS[:1, :9].astype(np.uint8))[0], TRUTH[0][:9]) < TOLERANCE


SCORING = (
    "g (int64[n, s] input_ids, int64[n, s] attention_mask) => (float[n, s] logits) { logits = Cast<to = 1>(input_ids) }"
)


def test_another_layout_is_refused_with_what_it_lacks():
    with pytest.raises(ModelInvalid, match=r"inputs missing: position_ids, write_indices, past_key_values\.0\.key"):
        Decoder(serialized(model_from(SCORING)), ONE)


def edited(change):
    model = portable(TINY)
    change(model)
    return serialized(model)


def rename(old, new):
    def change(model):
        next(value for value in (*model.graph.inputs, *model.graph.outputs) if value.name == old).name = new

    return change


def reshape(name, *shape):
    def change(model):
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.name in (name, name.replace("past_key_values", "present")):
                value.shape = ir.Shape(shape)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename("past_key_values.1.value", "past.1.value"), r"inputs missing: past_key_values\.1\.value"),
        (rename("present.0.key", "here.0.key"), r"outputs missing: present\.0\.key"),
        (rename("logits", "scores"), "outputs missing: logits"),
        (reshape("past_key_values.0.key", "batch", KV_HEADS, 64, 8), r"has the shape \['batch', 2, 64, 8\]"),
        (lambda model: model.metadata_props.update({MAX_POSITIONS: "-3"}), "max_positions is '-3'"),
    ],
)
def test_a_graph_that_is_almost_in_the_layout_is_refused(change, words):
    with pytest.raises(ModelInvalid, match=words):
        Decoder(edited(change), ONE)


def test_without_metadata_a_sequence_has_no_end_but_that_of_the_graph():
    made = decode(edited(lambda model: model.metadata_props.clear()))
    assert made.signature.positions is None
    made.extend(IDS[:1, :700])
    with pytest.raises(BuildFailed, match="onnxruntime failed on bound arrays"):
        made.extend(IDS[:1, :1])
    assert made.lengths.tolist() == [700]


@pytest.mark.skipif("CUDAExecutionProvider" in available_providers(), reason="it has the provider")
def test_where_buffers_cannot_lie_nothing_is_run():
    with pytest.raises(EnvironmentMismatch, match="this onnxruntime has no CUDAExecutionProvider"):
        Decoder(MODEL, SessionOptions(backend="ort-cuda"))
    with pytest.raises(UsageError, match="expected a power of two"):
        Decoder(MODEL, ONE, capacity=100)
