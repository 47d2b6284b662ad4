"""Requests that are given up at any point, and what fails in the middle of a round: nothing is left behind."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from cached_models import Tiny
from generating import broken, kept, near, opened, write_folder

from qexport.errors import UsageError
from qexport.runtime.cache import Cache
from qexport.runtime.decoder import Decoder
from qexport.runtime.generation.stops import Stop
from qexport.runtime.speculation.rounds import Rounds

PROMPT, LONG = [5, 9, 17], Stop(900, eos=False)
SECONDS = 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return write_folder(root / "target"), write_folder(root / "draft", near(Tiny(), 0.05))


@pytest.fixture(scope="module")
def generator(folders):
    with opened(*folders, speculate=3) as found:
        yield found


@pytest.fixture
def caches(monkeypatch):
    """The caches that are alive; nothing waits for the collector."""
    found, init = weakref.WeakSet(), Cache.__init__

    def noted(self, *arguments, **options):
        init(self, *arguments, **options)
        found.add(self)

    monkeypatch.setattr(Cache, "__init__", noted)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


class Gate:
    """Calls of a model's decoders stop in front of it, from the ``after``-th on."""

    def __init__(self, monkeypatch, model, after=2):
        self.reached, self.opened, self.calls = threading.Event(), threading.Event(), 0
        extend = Decoder.extend

        def waiting(decoder, ids, counts=None):
            if decoder._session is model._session:
                self.calls += 1
                if self.calls == after:
                    self.reached.set()
                    assert self.opened.wait(SECONDS)
            return extend(decoder, ids, counts)

        monkeypatch.setattr(Decoder, "extend", waiting)


def started(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    return thread, found


def fail_in(monkeypatch, model, error, after=3):
    calls, extend = [], Decoder.extend

    def failing(self, ids, counts=None):
        if self._session is model._session:
            calls.append(1)
            if len(calls) == after:
                raise error
        return extend(self, ids, counts)

    monkeypatch.setattr(Decoder, "extend", failing)


# ---------------------------------------------------------------- by another thread


@pytest.mark.parametrize("model", ["target", "draft"])
def test_another_thread_may_cancel_while_a_token_is_computed(monkeypatch, generator, caches, model):
    gate, stream = Gate(monkeypatch, getattr(generator, model)), generator.generate(PROMPT, stop=LONG)
    thread, found = started(lambda: list(stream))
    assert gate.reached.wait(SECONDS)
    stream.close()
    stream.close()
    gate.opened.set()
    thread.join(SECONDS)
    (tokens,) = found
    assert 1 <= len(tokens) <= 5
    assert len(caches) == 0
    assert (list(stream), stream.completion) == ([], None)


def test_a_request_may_be_cancelled_at_any_moment(generator, caches):
    for _ in range(40):
        stream = generator.generate(PROMPT, stop=LONG)
        thread, found = started(lambda stream=stream: list(stream))
        for _ in range(3):
            stream.close()
        thread.join(SECONDS)
        assert len(found[0]) < 900
    assert len(caches) == 0


def test_threads_that_read_one_request_take_turns(generator):
    expected = [token.id for token in generator.generate(PROMPT, stop=Stop(200, eos=False))]
    stream = generator.generate(PROMPT, stop=Stop(200, eos=False))
    readers = [started(lambda: list(stream)) for _ in range(4)]
    for thread, _ in readers:
        thread.join(SECONDS)
    read = sorted((token.index, token.id) for _, found in readers for token in found[0])
    assert read == list(enumerate(expected))


def test_a_generator_that_is_closed_ends_what_is_under_way(monkeypatch, folders, caches):
    generator = opened(*folders, speculate=3)
    gate, stream = Gate(monkeypatch, generator.target), generator.generate(PROMPT, stop=LONG)

    def read():
        with pytest.raises(UsageError, match="is closed"):
            list(stream)
        return True

    thread, found = started(read)
    assert gate.reached.wait(SECONDS)
    generator.close()
    gate.opened.set()
    thread.join(SECONDS)
    assert found == [True]
    assert len(caches) == 0


# ---------------------------------------------------------------- in the middle of a round


@pytest.mark.parametrize("model", ["target", "draft"])
def test_an_interrupt_inside_of_a_round_frees_caches_and_who_looked_ahead(monkeypatch, generator, caches, model):
    expected = generator.complete([PROMPT], stop=Stop(20))
    before = list(generator._idle)
    with monkeypatch.context() as patched:
        fail_in(patched, getattr(generator, model), KeyboardInterrupt())
        stream = generator.generate(PROMPT, stop=LONG)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert len(caches) == 0
    assert (list(stream), stream.completion) == ([], None)
    assert len(generator._idle) == len(before) - 1
    assert generator.complete([PROMPT], stop=Stop(20)) == expected


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("the device is gone"), IndexError(3)], ids=repr)
def test_a_draft_that_fails_in_any_way_is_left_alone(monkeypatch, generator, caches, error):
    expected = [found.tokens for found in generator.complete([PROMPT, [3]], stop=Stop(40))]
    fail_in(monkeypatch, generator.draft, error)
    batch = generator.batch([PROMPT, [3]], stop=Stop(40))
    assert [number for number, _ in batch]
    assert [found.tokens for found in batch.completions] == expected
    assert set(caches) <= kept(generator)
    assert not generator.draft._idle._things
    assert error.__traceback__ is None


def test_a_target_that_fails_ends_the_request_and_no_other(monkeypatch, generator, caches):
    expected = generator.complete([PROMPT], stop=Stop(20))
    with monkeypatch.context() as patched:
        fail_in(patched, generator.target, RuntimeError("the device is gone"))
        with pytest.raises(RuntimeError, match="the device is gone"):
            generator.complete([PROMPT], stop=Stop(20))
    assert set(caches) <= kept(generator)
    assert generator.complete([PROMPT], stop=Stop(20)) == expected


def test_an_output_that_failed_holds_nothing_of_its_round(monkeypatch, tmp_path, caches):
    rounds, init = weakref.WeakSet(), Rounds.__init__
    monkeypatch.setattr(Rounds, "__init__", lambda self, *arguments: init(self, *arguments) or rounds.add(self))
    with opened(write_folder(tmp_path / "target", broken(43)), speculate="off") as generator:
        found = generator.complete([[43], PROMPT], stop=Stop(4, eos=False))
        assert [one.reason for one in found] == ["failed", "length"]
        assert (len(rounds), set(caches)) == (0, kept(generator))
    assert len(caches) == 0
