"""Decoders that share a session, drop rows, start again and end: each has a state of its own, and frees it."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from cached_models import VOCABULARY, Tiny, forward, portable, serialized

from qexport.errors import DataInvalid, UsageError
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions

ONE = SessionOptions(threads=1)
TOLERANCE = 1e-5
TINY = Tiny(positions=300)
MODEL = serialized(portable(TINY))
IDS = np.random.default_rng(7).integers(0, VOCABULARY, (4, 40))
TRUTH = [forward(TINY, row) for row in IDS]


@pytest.fixture(scope="module")
def session():
    return OrtSession(MODEL, ONE)


def error(logits, truth):
    return np.abs(logits - truth).max() / np.abs(truth).max()


def test_decoders_of_one_session_know_nothing_of_each_other(session):
    made = [Decoder(session) for _ in IDS]
    for start, end in ((0, 9), (9, 10), (10, 15), (15, 40)):
        for decoder, row, truth in zip(made, IDS, TRUTH, strict=True):
            assert error(decoder.extend(row[None, start:end])[0], truth[start:end]) < TOLERANCE


def test_decoders_of_one_session_run_in_threads(session):
    def decode(row):
        with Decoder(session) as decoder:
            parts = [decoder.extend(IDS[row : row + 1, :7])[0]]
            parts += [decoder.extend(IDS[row : row + 1, [t]])[0] for t in range(7, 40)]
            return np.concatenate(parts)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode, [0, 1, 2, 3] * 3))
    for place, logits in enumerate(found):
        assert error(logits, TRUTH[place % 4]) < TOLERANCE


def test_rows_that_are_kept_go_on_and_the_others_are_gone(session):
    made = Decoder(session)
    made.reset(4)
    made.extend(IDS[:, :12], [12, 5, 9, 1])
    made.keep([2, 1])
    assert made.lengths.tolist() == [9, 5]
    logits = made.extend(np.stack([IDS[2, 9:13], IDS[1, 5:9]]))
    assert error(logits[0], TRUTH[2][9:13]) < TOLERANCE
    assert error(logits[1], TRUTH[1][5:9]) < TOLERANCE
    made.keep([1])
    assert error(made.extend(IDS[1:2, 9:40])[0], TRUTH[1][9:40]) < TOLERANCE


def test_rows_may_change_places_between_steps_of_one_shape(session):
    made = Decoder(session)
    made.reset(2)
    made.extend(IDS[:2, :9], [9, 6])
    made.extend(np.stack([IDS[0, 9:11], IDS[1, 6:8]]))
    made.keep([1, 0])
    logits = made.extend(np.stack([IDS[1, 8:10], IDS[0, 11:13]]))
    assert error(logits[0], TRUTH[1][8:10]) < TOLERANCE
    assert error(logits[1], TRUTH[0][11:13]) < TOLERANCE


def test_rows_are_kept_while_their_buffers_have_grown(session):
    made = Decoder(session, capacity=4)
    made.reset(3)
    made.extend(IDS[:3, :30], [3, 30, 11])
    made.keep([1, 2])
    assert made.capacity == 32
    logits = made.extend(IDS[1:3, 30:40], [10, 0])
    assert error(logits[0], TRUTH[1][30:40]) < TOLERANCE
    rest = made.extend(np.stack([IDS[1, :29], IDS[2, 11:]]), [0, 29])
    assert error(rest[1], TRUTH[2][11:]) < TOLERANCE


def test_the_context_of_the_rows_that_are_kept_stays_theirs():
    made = Decoder(serialized(portable(TINY, extra=True)), ONE)
    bias = np.random.default_rng(0).standard_normal((3, VOCABULARY)).astype(np.float32)
    made.reset(3, {"bias": bias})
    made.extend(IDS[:3, :6])
    made.keep([2])
    assert error(made.extend(IDS[2:3, 6:9])[0] - bias[2], TRUTH[2][6:9]) < TOLERANCE


@pytest.mark.parametrize("rows", [[], [1], [-1]])
def test_rows_that_are_not_there_cannot_be_kept(session, rows):
    made = Decoder(session)
    made.extend(IDS[:1, :4])
    with pytest.raises(DataInvalid, match="the batch has 1"):
        made.keep(rows)
    assert error(made.extend(IDS[:1, 4:9])[0], TRUTH[0][4:9]) < TOLERANCE


def test_logits_stay_as_they_are_when_more_is_read(session):
    made = Decoder(session)
    made.extend(IDS[:1, :10])
    found = [made.extend(IDS[:1, [t]]) for t in range(10, 14)]
    assert error(np.concatenate(found, 1)[0], TRUTH[0][10:14]) < TOLERANCE


def test_what_was_not_a_number_before_a_reset_does_not_come_back(session):
    made = Decoder(session)
    made.extend(IDS[:1, :20])
    for buffer in made._cache.buffers.values():
        buffer[:, :, 5:20] = np.nan
    made.reset()
    assert error(made.extend(IDS[:1, :9])[0], TRUTH[0][:9]) < TOLERANCE


def test_a_reset_of_the_same_size_takes_the_same_buffers(session):
    made = Decoder(session)
    before = made._cache.buffers
    made.extend(IDS[:1, :20])
    made.reset()
    assert made._cache.buffers is before
    assert made.lengths.tolist() == [0]
    made.reset(2)
    assert made._cache.buffers is not before


def test_what_is_closed_is_closed_and_closing_again_does_nothing(session):
    with Decoder(session) as made:
        made.extend(IDS[:1, :4])
        buffer = weakref.ref(next(iter(made._cache.buffers.values())))
    made.close()
    gc.collect()
    assert buffer() is None
    for use in (lambda: made.extend(IDS[:1, :4]), made.reset, lambda: made.rollback(0), lambda: made.keep([0])):
        with pytest.raises(UsageError, match="the decoder is closed"):
            use()
    assert error(Decoder(session).extend(IDS[:1, :9])[0], TRUTH[0][:9]) < TOLERANCE


def test_the_time_inside_the_backend_is_counted_since_the_reset(session):
    made = Decoder(session)
    made.extend(IDS[:1, :30])
    assert 0 < made.seconds < 10
    before = made.seconds
    made.extend(IDS[:1, [30]])
    assert made.seconds > before
    made.reset()
    assert made.seconds == 0


def test_many_requests_leave_memory_flat(session):
    made, process = Decoder(session), psutil.Process()
    for request in range(600):
        if request == 200:
            before = process.memory_info().rss
        made.reset(1 + request % 3)
        made.extend(IDS[: 1 + request % 3, : 5 + request % 7])
        made.extend(IDS[: 1 + request % 3, : 1 + request % 2])
    assert process.memory_info().rss - before < 2 << 20
