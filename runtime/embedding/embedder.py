"""Vectors of texts: tokens, batches by length, one run for each, pooling, and back into the order of the texts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import BuildFailed, DataInvalid, UsageError
from qexport.runtime.backends.artefact import MANIFEST, MODEL, check_files, open_artefact
from qexport.runtime.backends.choose import open_session
from qexport.runtime.embedding.form import Form, read_form
from qexport.runtime.embedding.options import REFUSE, EmbedOptions, EmbedStats
from qexport.runtime.embedding.packing import pack
from qexport.runtime.embedding.pooling import unit
from qexport.runtime.session import Session
from qexport.runtime.tokenizing import FILE, Encoded, Tokenizer

Vector: TypeAlias = NDArray[np.float32]  # [width], or [tokens, width] where every token has one
Vectors: TypeAlias = NDArray[np.float32] | list[NDArray[np.float32]]  # [texts, width], or an array for each text

CPU = "ort-cpu"
CPU_TOKENS = 512  # for each thread: more make a token no cheaper, and what lies between operators stays in the cache
OTHER_TOKENS = 16384


class Embedder:
    """A loaded encoder with its tokenizer; may be called from several threads.

    An empty text is a text: its vector is what the model makes of the tokens that its tokenizer puts around it. Where
    it puts none, there is nothing to read, and the text is refused.

    Attributes:
        form: How the model is run.
        budget: Most tokens of a batch, padding counted.
        options: How to embed.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer, form: Form, options: EmbedOptions) -> None:
        """Take a session and what is known of it; ``open_embedder`` finds all of that for a folder."""
        self._session, self._tokenizer = session, tokenizer
        self._calls, self._closed, self._changed = 0, False, threading.Condition()
        self.form, self.options = form, options
        self.budget = options.batch_tokens or _budget(session.backend, options.session.threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def backend(self) -> str:
        """What runs the model."""
        return self._session.backend

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        if self.form.width is not None:
            return self.form.width
        return int(self._run([Encoded([self.form.pad], [0], cut=False)], EmbedStats())[0].shape[-1])

    def close(self) -> None:
        """Free the model when the runs that are under way in other threads have ended; a second time does nothing."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._calls)
            self._session.close()

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts in their order.

        Returns:
            float32 ``[texts, width]``; of a model with a vector for every token a list of ``[tokens, width]``.

        Raises:
            DataInvalid: A text is no Unicode, has no tokens, or is too long where that is refused.
            BuildFailed: The runtime failed, or vectors hold NaN or Inf.
            UsageError: The embedder is closed.
        """
        return self.measure(texts)[0]

    def measure(self, texts: Sequence[str]) -> tuple[Vectors, EmbedStats]:
        """``embed``, and what it took."""
        demand_list(texts)
        stats = EmbedStats()
        parts = list(self.stream(texts, stats))
        if self.form.many:
            return [vector for part in parts for vector in part], stats
        return np.concatenate(parts) if parts else np.zeros((0, self.width), np.float32), stats

    def stream(self, texts: Iterable[str], stats: EmbedStats | None = None) -> Iterator[Vectors]:
        """Vectors of any number of texts, read as they are needed: one part for every ``options.window`` of them.

        Args:
            texts: What to embed; not kept.
            stats: Where to count; a part is in it when it comes.

        Raises:
            As ``embed``; messages count texts from the first one.
        """
        counted, rest, first = stats if stats is not None else EmbedStats(), iter(texts), 0
        while window := list(islice(rest, self.options.window)):
            begin = time.perf_counter()
            rows = self.tokenize(window, first)
            counted.tokenizing += time.perf_counter() - begin
            found = self.compute(rows, counted)
            _demand_finite(found, first)
            counted.texts, counted.cut = counted.texts + len(rows), counted.cut + sum(row.cut for row in rows)
            counted.seconds += time.perf_counter() - begin
            first += len(rows)
            yield found if self.form.many else np.stack(found)

    def tokenize(self, texts: Sequence[str], first: int = 0) -> list[Encoded]:
        """What the model reads of each text; ``first`` is the number that messages give the first of them."""
        rows = self._tokenizer.encode_batch(texts, self.form.longest, first)
        for index, row in enumerate(rows, first):
            if not row.ids:
                raise DataInvalid(f"text {index} has no tokens: {texts[index - first][:60]!r}")
            if row.cut and self.options.too_long == REFUSE:
                what = f"text {index} has more than {self.form.longest} tokens"
                raise DataInvalid(what, hint="split it, or allow that it is cut")
        return rows

    def compute(self, rows: Sequence[Encoded], stats: EmbedStats | None = None) -> list[Vector]:
        """Vectors of rows in their order, which may hold NaN; those of equal tokens are computed once."""
        counted = stats if stats is not None else EmbedStats()
        keys = [(*row.ids, *(row.types if any(row.types) else ())) for row in rows]
        place = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        distinct = list(dict(zip(keys, rows, strict=True)).values())
        made: dict[int, Vector] = {}
        for chosen in self.pack(distinct):
            found = self._run([distinct[index] for index in chosen], counted)
            made.update(zip(chosen.tolist(), found, strict=True))
        counted.distinct += len(distinct)
        return [made[place[key]] for key in keys]

    def pack(self, rows: Sequence[Encoded]) -> list[NDArray[np.intp]]:
        """Which rows run together."""
        least = self.form.columns.least
        return pack([max(least, len(row.ids)) for row in rows], self.budget, self.form.rows.most)

    def _run(self, batch: Sequence[Encoded], stats: EmbedStats) -> Sequence[Vector]:
        """Vectors of one batch."""
        form, feeds = self.form, self.form.feeds(batch)
        begin = time.perf_counter()
        with self._call():
            found = self._session.run(feeds, [form.output])[form.output][: len(batch)]
        stats.running += time.perf_counter() - begin
        stats.batches, stats.cells = stats.batches + 1, stats.cells + next(iter(feeds.values())).size
        stats.tokens += sum(len(row.ids) for row in batch)
        vectors = form.read(found.astype(np.float32, copy=False), batch)
        return [unit(vector) for vector in vectors] if self.options.normalize else vectors

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Keep the model from being freed."""
        with self._changed:
            if self._closed:
                raise UsageError("the embedder is closed", hint="open another one")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()


def open_embedder(path: str | Path, options: EmbedOptions | None = None) -> Embedder:
    """Load an encoder.

    Args:
        path: A folder that export or build wrote, or an .onnx file that lies beside its ``tokenizer.json``.
        options: How to embed.

    Raises:
        UsageError: There is no such folder, or it lacks what the options name.
        DataInvalid: There is no tokenizer.
        ModelInvalid: The model is no encoder of text.
        IntegrityError: A file is not the one that the manifest lists.
        EnvironmentMismatch: What runs the model is missing, or another one than it was built for.
        BuildFailed: The model cannot be loaded.
    """
    chosen, place = options or EmbedOptions(), Path(path)
    folder = place if place.is_dir() else place.parent
    ours = (folder / MANIFEST).exists()
    if ours:
        check_files(open_artefact(folder), FILE)
    session = open_session(place if ours or place != folder else place / MODEL, chosen.session)
    try:
        tokenizer = Tokenizer.load(folder)
        return Embedder(session, tokenizer, read_form(session, tokenizer, folder, chosen), chosen)
    except BaseException:
        session.close()
        raise


def embed(path: str | Path, texts: Sequence[str], options: EmbedOptions | None = None) -> Vectors:
    """Load an encoder, embed some texts, and let it go; ``open_embedder`` is for services."""
    with open_embedder(path, options) as embedder:
        return embedder.embed(texts)


def demand_list(texts: object) -> None:
    """Raise :class:`UsageError` on one text, or on what is no list of texts at all."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        kind = "one text" if isinstance(texts, str) else f"a {type(texts).__name__}"
        raise UsageError(f"texts is {kind}, expected a list of them", hint="write [text]")


def _budget(backend: str, threads: int) -> int:
    """Tokens of a batch that suit the threads of the processor, or a GPU."""
    return CPU_TOKENS * (threads or os.cpu_count() or 1) if backend == CPU else OTHER_TOKENS


def _demand_finite(vectors: Sequence[Vector], first: int) -> None:
    wrong = [index for index, vector in enumerate(vectors, first) if not np.isfinite(vector).all()]
    if wrong:
        what = f"the vectors of {len(wrong)} texts hold NaN or Inf, the first is text {wrong[0]}"
        raise BuildFailed(what, hint="qexport check looks at the weights")
