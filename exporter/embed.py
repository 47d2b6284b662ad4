"""Embed the texts of a file, and write their vectors to one: what ``qexport embed`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qexport.errors import DataInvalid, UsageError
from qexport.exporter.embedding_files import Rows, numbers, writer
from qexport.exporter.options import Advance, Progress, Silent
from qexport.runtime.embedding.embedder import Embedder, open_embedder
from qexport.runtime.embedding.options import EmbedOptions, EmbedStats
from qexport.safe_io import replace_file


@dataclass(frozen=True)
class Asked:
    """The small choices of embedding a file.

    Attributes:
        output: File for the vectors, .npy or .jsonl; they are in the result where there is none.
        options: How to embed.
        progress: Who hears about stages.
    """

    output: Path | None = None
    options: EmbedOptions = field(default_factory=EmbedOptions)
    progress: Progress = field(default_factory=Silent)


class Embedded(BaseModel):
    """What embedding gave and took.

    Attributes:
        model: What was opened.
        backend: What ran it.
        output: The output of the model that was read.
        pooling: How its hidden states became one vector; ``None`` where the graph does that.
        normalized: Whether vectors have length one.
        width: Numbers of a vector.
        file: Where the vectors are.
        embeddings: The vectors, where there is no file; of models with one for every token, a list of them.
        texts: How many there were.
        distinct: How many were computed; others have the same tokens.
        cut: How many were longer than the model reads.
        max_tokens: Where they were cut.
        tokens: Tokens that the model read.
        padding: Share of what it computed on that was padding.
        batches: Runs of the model.
        batch_tokens: Most tokens of one, padding counted.
        seconds: Without loading; of these the next two.
        tokenizing: Seconds.
        running: Seconds.
        texts_per_second: Of all seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal["qexport.embed/1"] = Field("qexport.embed/1", alias="schema")
    model: str
    backend: str
    output: str
    pooling: str | None
    normalized: bool
    width: int
    file: str | None
    embeddings: list[Any] | None
    texts: int
    distinct: int
    cut: int
    max_tokens: int | None
    tokens: int
    padding: float
    batches: int
    batch_tokens: int
    seconds: float
    tokenizing: float
    running: float
    texts_per_second: float


def embed_texts(model: str | Path, texts: Sequence[str], asked: Asked | None = None) -> Embedded:
    """Embed texts in their order.

    Args:
        model: A folder that export or build wrote, or an .onnx file beside its tokenizer.
        texts: At least one.
        asked: Output and options.

    Raises:
        UsageError: An ending of the output that is not known, or one that cannot hold such vectors.
        DataInvalid: There are no texts, or one cannot be embedded.
        As ``open_embedder`` and ``Embedder.embed``.
    """
    asked = asked or Asked()
    if not texts:
        raise DataInvalid("there are no texts")
    file = asked.output
    kind = None if file is None else writer(file)
    with asked.progress.stage("load"):
        embedder = open_embedder(model, asked.options)
    stats, kept = EmbedStats(), None
    with embedder, asked.progress.stage("embed", len(texts)) as advance:
        rows = _rows(embedder, texts, stats, advance)
        if file is None or kind is None:
            kept = [numbers(vector) for _, vector in rows]
        elif embedder.form.many and not kind.ragged:
            hint = "choose a .jsonl file"
            raise UsageError("a model with a vector for every token makes no array", where=str(file), hint=hint)
        else:
            with replace_file(file) as opened:
                kind.write(opened, rows, (len(texts), embedder.width))
        return _result(str(model), embedder, stats, file, kept)


def _rows(embedder: Embedder, texts: Sequence[str], stats: EmbedStats, advance: Advance) -> Rows:
    """Texts with their vectors, window by window."""
    done = 0
    for part in embedder.stream(texts, stats):
        yield from zip(texts[done : done + len(part)], part, strict=True)
        done += len(part)
        advance(len(part))


def _result(model: str, embedder: Embedder, stats: EmbedStats, file: Path | None, kept: list[Any] | None) -> Embedded:
    form = embedder.form
    return Embedded(
        schema="qexport.embed/1",
        model=model,
        backend=embedder.backend,
        output=form.output,
        pooling=form.pooling,
        normalized=embedder.options.normalize,
        width=embedder.width,
        file=None if file is None else str(file),
        embeddings=kept,
        texts=stats.texts,
        distinct=stats.distinct,
        cut=stats.cut,
        max_tokens=form.longest,
        tokens=stats.tokens,
        padding=stats.padding,
        batches=stats.batches,
        batch_tokens=embedder.budget,
        seconds=stats.seconds,
        tokenizing=stats.tokenizing,
        running=stats.running,
        texts_per_second=stats.texts_per_second,
    )
