"""Judge a decoder by itself, without torch: what ``qexport eval`` does."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from qexport.calibration.reading.tasks import MOST_NATS, token_losses
from qexport.errors import BuildFailed, DataInvalid, UsageError
from qexport.exporter.evaluation.running_text import Window, cut, read_tokens
from qexport.exporter.evaluation.scorers import Scorer, open_scorer
from qexport.exporter.load import ONNX_FILE
from qexport.exporter.options import Progress, Silent
from qexport.runtime.session import SessionOptions

DEFAULT_WINDOW = 1024  # tokens, where the model has that many positions
MOST_THREADS = 1024  # onnxruntime starts as many as it is told to
NUMBERS = 1 << 22  # logits that are turned into float64 at a time


@dataclass(frozen=True)
class EvalOptions:
    """The small choices of an evaluation.

    Attributes:
        window: Tokens that the model sees at most; 1024, or the model's positions where those are fewer.
        stride: Tokens between the starts of two windows; as many as a window has when not given.
        batch: Windows that are read together.
        chunk: Tokens of a window that are read at a time where the graph keeps a cache; bounds the memory of logits.
        max_tokens: Take so many tokens of the text, from the front.
        threads: Threads inside one operator; 0 lets onnxruntime choose.
        progress: Who hears about stages.
    """

    window: int | None = None
    stride: int | None = None
    batch: int = 1
    chunk: int = 256
    max_tokens: int | None = None
    threads: int = 0
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        for name, least in (
            ("window", 2),
            ("stride", 1),
            ("batch", 1),
            ("chunk", 1),
            ("max_tokens", 2),
            ("threads", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name.replace('_', '-')} is {value}, expected {least} or more")
        if self.threads > MOST_THREADS:
            raise UsageError(f"threads is {self.threads}, expected {MOST_THREADS} or fewer")


class Evaluated(BaseModel):
    """What an evaluation found.

    Attributes:
        task: Name of the task.
        model: The model file.
        layout: ``cached`` or ``scoring``.
        text: The text file.
        perplexity: Exponential of ``nats_per_token``.
        nats_per_token: Mean loss of the judged tokens.
        bits_per_byte: Their whole loss over the bytes of text that they stand for; tokenizers compare by this one.
        tokens: How many were judged.
        bytes: Bytes of UTF-8 they stand for.
        read: Tokens that the model read, those that were context alone among them.
        windows: How many.
        window: Tokens of a window.
        stride: Tokens between the starts of two windows.
        seconds: Time to run the model and to sum the losses, without loading.
        tokens_per_second: ``read`` over ``seconds``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal["qexport.eval/1"] = Field("qexport.eval/1", alias="schema")
    task: str
    model: str
    layout: str
    text: str
    perplexity: float
    nats_per_token: float
    bits_per_byte: float | None
    tokens: int
    bytes: int
    read: int
    windows: int
    window: int
    stride: int
    seconds: float
    tokens_per_second: float


def evaluate(
    model: str | Path, *, task: str = "ppl", text: str | Path, options: EvalOptions | None = None
) -> Evaluated:
    """Judge a model.

    Args:
        model: A folder with ``model.onnx`` and ``tokenizer.json``, or the .onnx file in it.
        task: One of ``TASKS``.
        text: Plain text in UTF-8.
        options: Windows, batches, threads.

    Raises:
        UsageError: There is no such task or file, or an option is out of range.
        ModelInvalid: The model is no decoder.
        DataInvalid: No tokenizer, or one with more tokens than the model has; no text, or none in UTF-8.
    """
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}", hint=f"known: {', '.join(TASKS)}")
    return TASKS[task](find_model(Path(model)), Path(text), options or EvalOptions())


def find_model(path: Path) -> Path:
    """The .onnx file that ``path`` is or holds.

    Raises:
        UsageError: There is none.
    """
    if os.path.isdir(path):
        file = path / ONNX_FILE
        if not os.path.isfile(file):
            raise UsageError(f"no {ONNX_FILE} in it", where=str(path), hint="make one with qexport export or build")
        return file
    if not os.path.isfile(path):
        raise UsageError("no such file or folder", where=str(path), hint="give an .onnx file or a folder with one")
    return path


def perplexity(model: Path, text: Path, options: EvalOptions) -> Evaluated:
    """Perplexity of running text by windows (Jelinek et al. 1977), every token given those before it in its window.

    The text is tokenized as a whole and every window starts at position 0, as ``build --eval`` has it; its first token
    is not judged. With a stride below the window only tokens that no window before has judged are, with at least
    ``window - stride`` others before them. Such windows share tokens but no cache: a key knows its position and has
    seen what stood before it, both of which are others in the next window. So each is read from its start, once, in
    chunks that see each other through the cache.
    """
    with options.progress.stage("load"):
        tokens = read_tokens(model, text, options.max_tokens)
        scorer = open_scorer(model, SessionOptions(threads=options.threads), options.chunk)
        if tokens.vocabulary > scorer.vocabulary:
            what = f"the tokenizer knows {tokens.vocabulary} tokens, the model's logits are {scorer.vocabulary}"
            raise DataInvalid(what, where=str(model), hint="is it the tokenizer of this model?")
    size = _window(scorer, options)
    windows = cut(len(tokens.ids), size, options.stride or size, scorer.shortest)
    if not windows:
        what = f"{len(tokens.ids)} tokens make no window of {scorer.shortest}, the least that can be judged"
        raise DataInvalid(what, where=str(text))
    started = time.perf_counter()
    total = 0.0
    with options.progress.stage("perplexity", len(windows)) as advance:
        together = scorer.rows or options.batch
        for at in range(0, len(windows), together):
            group = windows[at : at + together]
            total += _losses(scorer, tokens.ids, group)
            advance(len(group))
    seconds = time.perf_counter() - started
    count = sum(window.end - window.first for window in windows)
    covered = sum(int(tokens.sizes[window.first : window.end].sum()) for window in windows)
    read = sum(window.end - window.start for window in windows)
    return Evaluated(
        schema="qexport.eval/1",
        task="ppl",
        model=str(model),
        layout=scorer.layout,
        text=str(text),
        perplexity=math.exp(min(total / count, MOST_NATS)),
        nats_per_token=total / count,
        bits_per_byte=total / math.log(2) / covered if covered else None,
        tokens=count,
        bytes=covered,
        read=read,
        windows=len(windows),
        window=size,
        stride=options.stride or size,
        seconds=seconds,
        tokens_per_second=read / seconds,
    )


TASKS: dict[str, Callable[[Path, Path, EvalOptions], Evaluated]] = {"ppl": perplexity}
"""By name."""


def _window(scorer: Scorer, options: EvalOptions) -> int:
    """Tokens of a window."""
    most = scorer.longest
    size = options.window or min(most or DEFAULT_WINDOW, DEFAULT_WINDOW)
    if most is not None and size > most:
        raise UsageError(f"a window is {size} tokens, the model has {most} positions", where="--window")
    if options.stride is not None and options.stride > size:
        what = f"the stride is {options.stride}, a window {size} tokens: those between would not be judged"
        raise UsageError(what, where="--stride")
    return size


def _losses(scorer: Scorer, ids: NDArray[np.int64], windows: list[Window]) -> float:
    """Sum of the losses of what is judged in a few windows that are read together."""
    lengths = np.array([window.end - window.start for window in windows])
    rows = np.zeros((len(windows), lengths.max()), np.int64)
    for row, window in zip(rows, windows, strict=True):
        row[: window.end - window.start] = ids[window.start : window.end]
    total = 0.0
    for begin, logits in scorer.pieces(rows, lengths):
        for row, window, found in zip(rows, windows, logits, strict=True):
            # the logits at a column score the token in the next one
            low = max(window.first - window.start - 1, begin)
            high = min(window.end - window.start - 1, begin + len(found))
            total += sum(_in_parts(found[low - begin : high - begin], row[low + 1 : high + 1]))
    if not math.isfinite(total):
        raise BuildFailed("the logits hold NaN or Inf", hint="qexport check looks at the weights")
    return total


def _in_parts(logits: NDArray[Any], tokens: NDArray[np.int64]) -> Iterator[float]:
    step = max(1, NUMBERS // logits.shape[-1])
    for at in range(0, len(tokens), step):
        part = logits[at : at + step].astype(np.float64)
        yield float(token_losses(part, tokens[at : at + step]).sum())
