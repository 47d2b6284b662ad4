"""Many callers, one batch: who is served when, who hears of which error, and what becomes of those who leave."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from embedders import TABLE, WORDS, folder, hidden_of, opened, spied, unit

from qexport.errors import BuildFailed, DataInvalid, ResourceExhausted, UsageError
from qexport.runtime.embedding.batcher import Batcher

SOON = 20  # seconds; nothing here takes that long


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("encoder") / "model")


def stopped(path, batch_tokens=512, **asked):
    """An embedder whose model waits for ``spy.go``, its spy, and a batcher that is busy with one text already."""
    embedder = opened(path, batch_tokens=batch_tokens)
    spy = spied(embedder)
    spy.go.clear()
    batcher = Batcher(embedder, **asked)
    first = batcher.submit(["j j j j"])
    assert spy.started.acquire(timeout=SOON)
    return spy, batcher, first


def expect(found, *texts):
    np.testing.assert_allclose(found, [unit(hidden_of(text).mean(0)) for text in texts], rtol=1e-5, atol=1e-6)


def test_texts_that_come_while_a_batch_runs_share_the_next_one(path):
    spy, batcher, first = stopped(path)
    with batcher:
        futures = [batcher.submit([text]) for text in ("a", "b", "c d", "e")]
        spy.go.set()
        expect(first.result(SOON), "j j j j")
        for future, text in zip(futures, ("a", "b", "c d", "e"), strict=True):
            expect(future.result(SOON), text)
    assert spy.batches == [(1, 6), (4, 4)]
    stats = batcher.stats
    assert (stats.texts, stats.batches, stats.tokens) == (5, 2, 6 + 3 * 3 + 4)


def test_the_oldest_text_is_served_next_with_those_that_fit_beside_it(path):
    spy, batcher, _ = stopped(path, batch_tokens=30)
    long = "a b c d e f g h i j"
    with batcher:
        order = []
        for text in ("a", long, "b", f"{long} a", "c"):
            batcher.submit([text]).add_done_callback(lambda _, text=text: order.append(text))
        spy.go.set()
    assert spy.batches == [(1, 6), (3, 3), (2, 13)]
    assert sorted(order[:3]) == ["a", "b", "c"]


def test_a_request_may_be_larger_than_any_batch_and_than_the_queue(path):
    texts = [f"{a} {b}" for a in "abcdefghij" for b in "abcdefghij"]
    with Batcher(opened(path, batch_tokens=20), room=3, workers=2) as batcher:
        expect(batcher.embed(texts), *texts)
        assert batcher.embed([]).shape == (0, 4)


def crowded(path, **asked):
    """A batcher whose last batch had four texts, and its spy."""
    spy, batcher, _ = stopped(path, **asked)
    futures = [batcher.submit([text]) for text in "abcd"]
    spy.go.set()
    wait(futures, SOON)
    assert spy.batches == [(1, 6), (4, 3)]
    spy.batches.clear()
    return spy, batcher


def test_a_text_waits_for_as_many_as_came_the_last_time(path):
    spy, batcher = crowded(path, wait=SOON)
    with batcher:
        first = batcher.submit(["a"])
        time.sleep(0.05)
        assert not first.done()
        wait([first, *(batcher.submit([text]) for text in "bcd")], SOON)
        assert spy.batches == [(4, 3)]
        last = batcher.submit(["e"])
        begin = time.monotonic()
    assert time.monotonic() - begin < SOON / 2
    expect(last.result(0), "e")


def test_a_full_batch_waits_for_nobody(path):
    _, batcher = crowded(path, wait=SOON, batch_tokens=12)
    with batcher:
        begin = time.monotonic()
        expect(batcher.embed(["a b c d e f g h i j"]), "a b c d e f g h i j")
        assert time.monotonic() - begin < SOON / 2


def test_the_wait_ends_and_is_over_for_who_stays_alone(path):
    _, batcher = crowded(path, wait=0.2)
    with batcher:
        begin = time.monotonic()
        batcher.embed(["a"])
        waited = time.monotonic() - begin
        assert waited >= 0.2
        batcher.embed(["a"])
        assert time.monotonic() - begin - waited < 0.2


def test_what_is_wrong_with_a_text_is_told_to_its_caller_alone(tmp_path):
    table = TABLE.copy()
    table[WORDS["c"]] = np.nan
    spy, batcher, _ = stopped(folder(tmp_path / "model", table=table))
    spy.fails = lambda feeds: (feeds["input_ids"] == WORDS["d"]).any()
    with batcher:
        with pytest.raises(DataInvalid, match="text 1 is not Unicode"):
            batcher.submit(["a", "\udcff"])
        futures = {text: batcher.submit([text, "a b"]) for text in ("a", "c", "d", "e")}
        spy.go.set()
        wait(futures.values(), SOON)
    for text in "ae":
        expect(futures[text].result(), text, "a b")
    with pytest.raises(BuildFailed, match="the vector of text 0 holds NaN or Inf"):
        futures["c"].result()
    with pytest.raises(RuntimeError, match="the device is gone"):
        futures["d"].result()


def test_the_worker_outlives_a_failure(path):
    spy, batcher, first = stopped(path)
    spy.fails = lambda feeds: True
    spy.go.set()
    with batcher:
        with pytest.raises(RuntimeError):
            first.result(SOON)
        spy.fails = lambda feeds: False
        expect(batcher.embed(["a"]), "a")


def test_what_is_cancelled_in_time_is_never_computed(path):
    spy, batcher, first = stopped(path)
    with batcher:
        left, kept = batcher.submit(["a a", "b b"]), batcher.submit(["c"])
        assert left.cancel()
        assert not first.cancel()
        spy.go.set()
        expect(kept.result(SOON), "c")
        assert wait([left], SOON).done == {left}
        expect(first.result(SOON), "j j j j")
    assert spy.batches == [(1, 6), (1, 3)]


def test_there_is_room_for_so_many_and_who_comes_later_waits_or_hears_of_it(path):
    spy, batcher, _ = stopped(path, room=2)
    with batcher, ThreadPoolExecutor(1) as pool:
        futures = [batcher.submit([text]) for text in "ab"]
        with pytest.raises(ResourceExhausted, match="2 texts are waiting"):
            batcher.submit(["c"], timeout=0)
        with pytest.raises(ResourceExhausted, match="2 texts are waiting"):
            batcher.embed(["c"], timeout=0.05)
        late = pool.submit(batcher.embed, ["d", "e", "f"])
        time.sleep(0.05)
        assert not late.done()
        spy.go.set()
        expect(late.result(SOON), "d", "e", "f")
        wait(futures, SOON)
    assert sum(rows for rows, _ in spy.batches) == 6


def test_what_is_cancelled_makes_room(path):
    spy, batcher, _ = stopped(path, room=1)
    with batcher, ThreadPoolExecutor(1) as pool:
        left = batcher.submit(["a"])
        late = pool.submit(batcher.embed, ["b"], SOON)
        time.sleep(0.05)
        assert left.cancel()
        spy.go.set()
        expect(late.result(SOON), "b")


def test_a_request_without_room_for_all_of_it_leaves_nothing_behind(path):
    spy, batcher, _ = stopped(path, room=2)
    with batcher:
        with pytest.raises(ResourceExhausted):
            batcher.submit(["a", "b", "c"], timeout=0)
        future = batcher.submit(["d"], timeout=0)
        spy.go.set()
        expect(future.result(SOON), "d")
    assert sum(rows for rows, _ in spy.batches) == 2


def test_embed_gives_up_after_its_timeout(path):
    spy, batcher, _ = stopped(path)
    with batcher:
        with pytest.raises(TimeoutError):
            batcher.embed(["a"], timeout=0.02)
        spy.go.set()
    assert spy.batches == [(1, 6)]


def test_closing_computes_what_waits(path):
    spy, batcher, first = stopped(path, wait=0.2)
    futures = [batcher.submit([text]) for text in "abc"]
    spy.go.set()
    batcher.close()
    for future, text in zip([first, *futures], ["j j j j", *"abc"], strict=True):
        expect(future.result(0), text)
    batcher.close()
    with pytest.raises(UsageError, match="the batcher is closed"):
        batcher.submit(["a"])


def test_closing_without_that_cancels_what_has_not_begun(path):
    spy, batcher, first = stopped(path)
    futures = [batcher.submit([text]) for text in "abc"]
    close = threading.Thread(target=lambda: batcher.close(drain=False))
    close.start()
    assert wait(futures, SOON).not_done == set()
    assert all(future.cancelled() for future in futures)
    spy.go.set()
    close.join(SOON)
    expect(first.result(0), "j j j j")
    assert spy.batches == [(1, 6)]


def test_a_request_that_is_half_done_is_told_that_the_batcher_was_closed(path):
    embedder = opened(path, batch_tokens=5)
    spy = spied(embedder)
    spy.go.clear()
    batcher = Batcher(embedder)
    future = batcher.submit(["a", "b c d"])
    assert spy.started.acquire(timeout=SOON)
    close = threading.Thread(target=lambda: batcher.close(drain=False))
    close.start()
    with pytest.raises(UsageError, match="closed before the request was done"):
        future.result(SOON)
    spy.go.set()
    close.join(SOON)
    assert not close.is_alive()


def test_futures_can_be_awaited(path):
    async def both():
        with Batcher(opened(path)) as batcher:
            return await asyncio.gather(*(asyncio.wrap_future(batcher.submit([text])) for text in ("a", "b c")))

    found = asyncio.run(both())
    expect(np.concatenate(found), "a", "b c")


def test_a_crowd_gets_what_each_asked_for(path):
    texts = [" ".join(letters) for letters in zip("abcdefghij" * 4, "bcdefghija" * 4, strict=True)]
    with Batcher(opened(path, batch_tokens=30), room=8, workers=3, wait=0.001) as batcher:
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda at: batcher.embed(texts[at : at + 1 + at % 3]), range(len(texts))))
        assert batcher.stats.texts == sum(len(vectors) for vectors in found)
    for at, vectors in enumerate(found):
        expect(vectors, *texts[at : at + 1 + at % 3])


NAN, ENDLESS = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("wait", value) for value in (-1, NAN, ENDLESS, 1e12, "1", None)),
        *(("room", value) for value in (0, 1.5, NAN, "5")),
        *(("workers", value) for value in (0, 1.5, 10**6)),
    ],
)
def test_options_out_of_range_are_refused(path, name, value):
    with pytest.raises(UsageError, match=f"{name} is {value!r}, expected "):
        Batcher(opened(path), **{name: value})


@pytest.mark.parametrize("timeout", [ENDLESS, 1e12, SOON])
def test_who_waits_for_longer_than_clocks_go_waits_for_as_long_as_it_takes(path, timeout):
    spy, batcher, _ = stopped(path, room=1)
    with batcher, ThreadPoolExecutor(1) as pool:
        late = pool.submit(batcher.embed, ["a", "b", "c"], timeout)
        time.sleep(0.05)
        spy.go.set()
        expect(late.result(SOON), "a", "b", "c")


@pytest.mark.parametrize("timeout", [NAN, "5"])
def test_a_timeout_that_is_no_number_is_refused(path, timeout):
    with Batcher(opened(path)) as batcher:
        for call in (batcher.submit, batcher.embed):
            with pytest.raises(UsageError, match="timeout is "):
                call(["a"], timeout)


@pytest.mark.parametrize("place", ["pack", "compute"])
def test_the_worker_outlives_what_fails_around_a_run(path, monkeypatch, place):
    embedder = opened(path)
    with Batcher(embedder) as batcher:
        with monkeypatch.context() as patched:

            def failing(*_):
                raise MemoryError(place)

            patched.setattr(embedder, place, failing)
            futures = [batcher.submit([text]) for text in "ab"]
            for future in futures:
                with pytest.raises(MemoryError, match=place):
                    future.result(SOON)
        expect(batcher.embed(["a", "b"], SOON), "a", "b")


def test_the_worker_outlives_vectors_that_do_not_go_together(path, monkeypatch):
    embedder = opened(path)
    with Batcher(embedder) as batcher:
        with monkeypatch.context() as patched:
            patched.setattr(embedder, "compute", lambda rows, _: [np.zeros(1 + len(row.ids)) for row in rows])
            with pytest.raises(ValueError, match="same shape"):
                batcher.submit(["a", "a b c"]).result(SOON)
        expect(batcher.embed(["a"], SOON), "a")


def test_an_interrupt_while_there_is_no_room_leaves_nothing_behind(path, monkeypatch):
    spy, batcher, _ = stopped(path, room=1)
    with batcher:
        with monkeypatch.context() as patched:

            def interrupted(left):
                raise KeyboardInterrupt

            patched.setattr(batcher._changed, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                batcher.submit(["a", "b"])
        assert batcher._waiting == []
        spy.go.set()
        expect(batcher.embed(["c"], SOON), "c")


def test_one_text_is_no_list(path):
    with Batcher(opened(path)) as batcher:
        for texts, kind in (("a", "one text"), (b"a", "a bytes"), (None, "a NoneType"), (5, "a int")):
            with pytest.raises(UsageError, match=f"texts is {kind}"):
                batcher.submit(texts)
