"""Decoders over engines of TensorRT, on a fake GPU, against decoders over onnxruntime: the same tokens everywhere."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cached_models import VOCABULARY, Tiny, portable, serialized
from fake_cuda import FakeCuda
from fake_tensorrt import Library, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import BuildFailed, DataInvalid, ResourceExhausted, UsageError
from qexport.runtime.backends.cuda import Cuda
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.backends.tensorrt import EngineSession
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions

ONE = SessionOptions(threads=1)
COLUMNS = 64
PROMPTS, STEPS = ({"batch": (1, 2, 4), "sequence": (1, 16, wide)} for wide in (32, 8))
MODEL = serialized(portable(Tiny(positions=300)))
PLAN = plan_of(MODEL, COLUMNS, (PROMPTS, STEPS))
TRUTH = OrtSession(MODEL, ONE)
IDS = np.random.default_rng(7).integers(0, VOCABULARY, (4, 80))
KINDS = [(name, graphs) for name in ("tensorrt_rtx", "tensorrt") for graphs in (False, True)]


class Machine:
    """A GPU with an engine."""

    def __init__(self, name="tensorrt_rtx", graphs=False, plan=PLAN, **metadata):
        self.cuda = FakeCuda()
        self.library = Library(self.cuda, name)
        options = SessionOptions(graphs=graphs)
        self.session = EngineSession(plan, self.library.module(), Cuda(self.cuda.module()), options, metadata)

    def decoder(self, batch=1):
        made = Decoder(self.session)
        made.reset(batch)
        return made


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}{'-graphs' if kind[1] else ''}")
def machine(request):
    return Machine(*request.param)


def twins(machine, batch=1):
    """A decoder over the engine and one over onnxruntime, which must agree."""
    other = Decoder(TRUTH)
    other.reset(batch)
    return machine.decoder(batch), other


def both(pair, ids, counts=None):
    """The logits of both, which must be the same where they mean something."""
    found, truth = (decoder.extend(ids, counts) for decoder in pair)
    assert found.shape == truth.shape
    for row, count in enumerate(counts if counts is not None else [ids.shape[1]] * len(ids)):
        np.testing.assert_allclose(found[row, :count], truth[row, :count], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(found[row, :count].argmax(-1), truth[row, :count].argmax(-1))
    assert pair[0].lengths.tolist() == pair[1].lengths.tolist()
    return found


def test_the_signature_tells_of_the_engine(machine):
    made = machine.decoder()
    assert (made.signature.columns, made.capacity, made.limit, made.widest) == (64, 64, 64, 32)
    assert made.signature.vocabulary == VOCABULARY
    assert machine.session.backend == machine.library.name.replace("_", "-")
    assert machine.session.aliases["present.1.value"] == "past_key_values.1.value"


def test_a_prompt_steps_a_wrong_wide_step_and_the_right_one(machine):
    pair, row = twins(machine), IDS[:1]
    both(pair, row[:, :20])
    for at in range(20, 30):
        both(pair, row[:, at : at + 1])
    for decoder in pair:
        decoder.extend((row[:, 30:35] + 1) % VOCABULARY)
        decoder.rollback(31)
    both(pair, row[:, 31:36])
    for at in (36, 41, 46):
        both(pair, row[:, at : at + 5])


def test_text_is_the_same_token_for_token(machine):
    pair, token = twins(machine), IDS[:1, :5]
    for _ in range(50):
        token = both(pair, token)[:, -1:].argmax(-1)
    assert pair[0].lengths.tolist() == [54]


def test_rows_of_different_lengths_and_rows_that_are_kept(machine):
    pair = twins(machine, 4)
    both(pair, IDS[:, :17], [17, 3, 9, 0])
    at = pair[0].lengths
    both(pair, IDS[np.arange(4), at][:, None], [1, 1, 0, 1])
    for decoder in pair:
        decoder.rollback([10, 4, 9, 0])
        decoder.keep([2, 0])
    both(pair, IDS[[2, 0], 30:36], [6, 2])
    for decoder in pair:
        decoder.keep([1])
    both(pair, IDS[:1, 40:48])


def test_prompts_and_steps_each_use_the_profile_for_them(machine):
    made = machine.decoder()
    made.extend(IDS[:1, :20])
    for at in range(20, 26):
        made.extend(IDS[:1, [at]])
    runs = {context._profile: context.runs for context in machine.library.contexts}
    assert {0, 1} <= set(runs)
    assert sum(c.runs for c in machine.library.contexts if c._profile == 0) == 1
    assert sum(c.runs for c in machine.library.contexts if c._profile == 1) == 6


def test_more_than_a_profile_takes_is_read_in_pieces(machine):
    pair = twins(machine)
    both(pair, IDS[:1, :50])
    assert sum(context.runs for context in machine.library.contexts) == 2
    both(pair, IDS[:1, 50:64])
    with pytest.raises(DataInvalid, match="row 0 has 64 tokens and 1 more, the engine has room for 64"):
        pair[0].extend(IDS[:1, :1])


def test_what_is_wrong_in_a_later_piece_stops_the_first(machine):
    made = machine.decoder()
    wrong = IDS[:1, :50].copy()
    wrong[0, 45] = VOCABULARY
    with pytest.raises(DataInvalid, match=f"token {VOCABULARY} does not exist"):
        made.extend(wrong)
    assert made.lengths.tolist() == [0]
    assert sum(context.runs for context in machine.library.contexts) == 0


def test_rows_that_wait_at_the_end_are_not_written_over(machine):
    pair = twins(machine, 2)
    assert pair[0].limit == 63
    both(pair, np.stack([IDS[0], IDS[1]])[:, :63], [63, 40])
    both(pair, np.stack([IDS[0, :8], IDS[1, 40:48]]), [0, 8])
    for decoder in pair:
        decoder.rollback([60, 48])
    both(pair, np.stack([IDS[0, 60:68], IDS[1, 48:56]])[:, :4], [3, 4])
    with pytest.raises(DataInvalid, match="row 0 has 63 tokens and 1 more, the engine has room for 63"):
        pair[0].extend(IDS[:2, :1])


def test_the_model_s_own_end_is_heeded_where_it_comes_first():
    machine = Machine(**{"qexport.max_positions": "30"})
    made = machine.decoder()
    assert made.limit == 30
    with pytest.raises(DataInvalid, match="room for 30"):
        made.extend(IDS[:1, :31])


def test_nothing_to_read_runs_nothing(machine):
    made = machine.decoder()
    made.extend(IDS[:1, :COLUMNS])
    before = sum(context.runs for context in machine.library.contexts)
    assert made.extend(IDS[:1, :3], [0]).shape == (1, 3, VOCABULARY)
    assert sum(context.runs for context in machine.library.contexts) == before


def test_a_batch_without_a_profile_is_refused(machine):
    with pytest.raises(DataInvalid, match=r"no profile for steps of one token of 5 rows.*\[1\.\.4, 1\.\.32\]"):
        machine.decoder(5)
    wide = Machine(plan=plan_of(MODEL, COLUMNS, ({"batch": (1, 1, 4), "sequence": (4, 8, 16)},)))
    with pytest.raises(DataInvalid, match="steps of one token"):
        wide.decoder()


MOVES = st.lists(
    st.tuples(st.integers(1, 40), st.tuples(st.integers(0, 40), st.integers(0, 40)), st.none() | st.integers(0, 9)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(MOVES, st.sampled_from(KINDS))
def test_any_mix_of_steps_and_ways_back_is_the_same(moves, kind):
    pair = twins(Machine(*kind), 2)
    for width, wanted, back in moves:
        at = pair[0].lengths
        counts = np.minimum(np.minimum(wanted, width), 63 - at).tolist()
        both(pair, np.resize(IDS[:2, at.max() % 40 :], (2, width)), counts)
        if back is not None:
            for decoder in pair:
                decoder.rollback(np.maximum(decoder.lengths - back, 0))


def test_steps_that_come_again_set_nothing_and_are_recorded_where_that_is_asked_for(machine):
    made = machine.decoder()
    made.extend(IDS[:1, :10])
    for at in range(10, 20):
        made.extend(IDS[:1, [at]])
    sets = sum(context.sets for context in machine.library.contexts)
    for at in range(20, 30):
        made.extend(IDS[:1, [at]])
    assert sum(context.sets for context in machine.library.contexts) == sets
    recorded = machine.session.graphs and machine.library.name == "tensorrt"
    assert machine.cuda.launched == (18 if recorded else 0)
    made.close()
    assert not machine.cuda.graphs


def test_a_network_that_cannot_be_recorded_runs_all_the_same():
    machine = Machine("tensorrt", graphs=True)
    machine.cuda.refuses = True
    pair = twins(machine)
    for at in range(8):
        both(pair, IDS[:1, [at]])
    assert machine.cuda.launched == 0


def test_decoders_of_one_engine_run_side_by_side(machine):
    machine.library.delay = 0.001
    row_of = dict(enumerate([0, 1, 2, 3] * 2))
    other = Decoder(TRUTH)
    truth = []
    for row in range(4):
        other.reset()
        truth.append(other.extend(IDS[row : row + 1, :40])[0])

    def decode(place):
        row = row_of[place]
        with Decoder(machine.session) as made:
            parts = [made.extend(IDS[row : row + 1, :12])]
            parts += [made.extend(IDS[row : row + 1, at : at + 2]) for at in range(12, 40, 2)]
            return np.concatenate(parts, 1)[0]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode, row_of))
    for place, logits in enumerate(found):
        np.testing.assert_allclose(logits, truth[row_of[place]], rtol=0, atol=1e-4)
    assert len(machine.library.contexts) <= 12


def test_what_fails_leaves_the_state_as_it_was(machine):
    pair = twins(machine)
    both(pair, IDS[:1, :10])
    machine.library.breaks = True
    for width in (1, 40):
        with pytest.raises(BuildFailed, match="cudaErrorLaunchFailure"):
            pair[0].extend(IDS[:1, 10 : 10 + width])
        assert pair[0].lengths.tolist() == [10]
    machine.library.breaks = False
    both(pair, IDS[:1, 10:50])


def test_a_second_piece_that_fails_takes_back_the_first(machine, monkeypatch):
    pair = twins(machine)
    both(pair, IDS[:1, :4])
    step, calls = Decoder._step, []

    def failing(self, *arguments, **named):
        calls.append(arguments)
        if len(calls) == 2:
            raise BuildFailed("broken")
        return step(self, *arguments, **named)

    monkeypatch.setattr(Decoder, "_step", failing)
    with pytest.raises(BuildFailed, match="broken"):
        pair[0].extend(IDS[:1, 4:54])
    monkeypatch.undo()
    assert pair[0].lengths.tolist() == [4]
    both(pair, IDS[:1, 4:54])


def test_everything_on_the_gpu_is_given_back(machine):
    before = machine.cuda.used
    made = machine.decoder(3)
    made.extend(IDS[:3, :10])
    for _ in range(4):
        made.extend(IDS[:3, :1])
    made.keep([1])
    made.extend(IDS[:1, :2])
    assert machine.cuda.used > before
    made.close()
    made.close()
    gc.collect()
    assert machine.cuda.used == before
    assert not machine.cuda.pinned
    with pytest.raises(UsageError, match="the decoder is closed"):
        made.extend(IDS[:1, :1])
    machine.session.close()
    machine.session.close()
    with pytest.raises(UsageError, match="the session is closed"):
        Decoder(machine.session)


def test_a_decoder_that_nobody_has_gives_its_memory_back(machine):
    made = machine.decoder()
    made.extend(IDS[:1, :10])
    before = machine.cuda.used
    del made
    gc.collect()
    assert machine.cuda.used < before
    for _ in range(20):
        machine.decoder(2).extend(IDS[:2, :10])
    gc.collect()
    assert machine.cuda.used < before


def test_many_resets_leave_memory_flat(machine):
    made, seen = machine.decoder(), set()
    for request in range(60):
        made.reset(1 + request % 3)
        made.extend(IDS[: 1 + request % 3, :10])
        made.extend(IDS[: 1 + request % 3, :1])
        if request % 3 == 0 and request > 3:
            seen.add(machine.cuda.used)
    assert len(seen) == 1
    assert len(machine.library.contexts) <= 4


def test_no_memory_is_said_so():
    machine = Machine()
    machine.cuda.room = machine.cuda.used + 1000
    with pytest.raises(ResourceExhausted, match="the GPU has not enough memory"):
        machine.decoder()


def test_what_was_not_a_number_before_a_reset_does_not_come_back(machine):
    pair = twins(machine)
    pair[0].extend(IDS[:1, :20])
    for buffer in pair[0]._cache.buffers.values():
        view = np.frombuffer(machine.cuda.view(buffer.address, buffer.nbytes), np.float32)
        view[:] = np.nan
    pair[0].reset()
    both(pair, IDS[:1, :9])
