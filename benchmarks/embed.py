"""Embedding the STS-B test set, one thread: the runtime beside onnxruntime called by hand; and many callers at once.

``embed.py [--rounds N] [--every K] [--budgets] [TABLE ...]``: ``--every`` takes each K-th pair, ``--budgets`` tries
other batches of ours, and tables are ``embed`` and ``embed_service``, both by default.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import measure
import methods
import numpy as np
import sentences
from numpy.typing import NDArray

from qexport.runtime import Batcher, EmbedOptions, open_embedder
from qexport.runtime.embedding.batcher import WAIT
from qexport.runtime.session import SessionOptions

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread means one thread

Vectors: TypeAlias = NDArray[np.float32]
Call: TypeAlias = Callable[[Sequence[str]], Vectors]

MODELS = {"fp32": "qexport-float32-ort-cpu", "int8": "qexport-ort-cpu"}
OUTPUT = "sentence_embedding"
BATCH = 32
BUDGETS = (128, 256, 512, 1024, 2048)  # tokens
CLIENTS = (1, 8, 32)
WAITS = {0.0: "`Batcher`, waits for nobody", WAIT: "**`Batcher`**", 0.01: "`Batcher`, waits up to 10 ms"}  # by seconds
REQUESTS = 320
ROUNDS = 3
NOTE = (
    "all-MiniLM-L6-v2, all 2758 sentences of STS-B test from text to vectors, onnxruntime, one thread. By hand: "
    "a session with its default settings, `sentence_embedding` alone is asked for, rows padded to the longest of the "
    "batch. Speed: median over the rounds of the first row's time divided by the row's in the same round (smallest and "
    "largest ratio); seconds are medians. Padding: share of the tokens that the model computed on."
)
SERVICE_NOTE = (
    "The same int8 model, one thread: clients that each send one sentence, wait for its vector and send the next; "
    f"{REQUESTS} sentences of STS-B test in all, in random order. Each alone: every client calls the same embedder."
)


class ByHand:
    """onnxruntime as its users call it: a session, a tokenizer, batches of so many rows."""

    def __init__(self, folder: Path, batch: int, *, by_length: bool = False) -> None:
        import onnxruntime as ort
        from tokenizers import Tokenizer

        settings = ort.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        self._session = ort.InferenceSession(folder / "model.onnx", settings, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(sentences.MAX_LENGTH)
        self._names = [value.name for value in self._session.get_inputs()]
        self._batch, self._by_length = batch, by_length
        self.tokens = self.cells = 0

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors of all texts, in their order; sentence-transformers sorts by characters, the longest first."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]) if self._by_length else i)
        found: Vectors = np.zeros((len(texts), 384), np.float32)
        self.tokens = self.cells = 0
        for start in range(0, len(order), self._batch):
            chosen = order[start : start + self._batch]
            feeds = sentences.pad([row.ids for row in self._tokenizer.encode_batch([texts[i] for i in chosen])])
            self.tokens += int(feeds["attention_mask"].sum())
            self.cells += feeds["attention_mask"].size
            found[chosen] = self._session.run([OUTPUT], {name: feeds[name] for name in self._names})[0]
        return found


class Ours:
    """``Embedder``."""

    def __init__(self, folder: Path, budget: int | None = None) -> None:
        self.embedder = opened(folder, budget)
        self.tokens = self.cells = 0

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors of all texts, in their order."""
        found, stats = self.embedder.measure(texts)
        self.tokens, self.cells = stats.tokens, stats.cells
        return np.asarray(found)


def opened(folder: Path, budget: int | None = None) -> Any:
    """Our embedder on one thread."""
    return open_embedder(folder, EmbedOptions(batch_tokens=budget, session=SessionOptions(threads=1)))


def rows(folder: Path, *, budgets: bool) -> dict[str, ByHand | Ours]:
    """What takes turns; the first row is what the others are compared with."""
    found: dict[str, ByHand | Ours] = {
        "batches of 32 in order": ByHand(folder, BATCH),
        "one by one, no padding": ByHand(folder, 1),
        "batches of 32 by length, as sentence-transformers": ByHand(folder, BATCH, by_length=True),
        "**`qexport.runtime.embed`**": Ours(folder),
    }
    return found | {f"{size} tokens a batch": Ours(folder, size) for size in BUDGETS if budgets}


def test_set(every: int) -> tuple[list[str], list[float]]:
    """First sentences, then second ones, and the scores."""
    path = measure.SAMPLES / "data/stsb-test.csv"
    columns = [sentences.read_column(path, name)[::every] for name in ("sentence1", "sentence2", "score")]
    return columns[0] + columns[1], [float(score) for score in columns[2]]


def spearman(vectors: Vectors, gold: Sequence[float]) -> float:
    """Rank correlation of cosines and scores, x100."""
    from scipy.stats import spearmanr

    first, second = np.split(vectors, 2)
    return 100 * float(spearmanr((first * second).sum(1), gold).statistic)


def throughput(folders: dict[str, Path], rounds: int, every: int, *, budgets: bool) -> list[dict[str, object]]:
    """Rows of the table: all of a model's take turns, each round starts with another one."""
    texts, gold = test_set(every)
    table: list[dict[str, object]] = []
    for model, folder in folders.items():
        runners = rows(folder, budgets=budgets)
        scores = {title: spearman(run(texts), gold) for title, run in runners.items()}  # warms up as well
        times = np.zeros((rounds, len(runners)))
        for turn in range(rounds):
            for place in np.roll(np.arange(len(runners)), turn):
                begin = time.perf_counter()
                list(runners.values())[place](texts)
                times[turn, place] = time.perf_counter() - begin
        ratios = times[:, :1] / times
        for place, (title, run) in enumerate(runners.items()):
            low, middle, high = np.quantile(ratios[:, place], [0, 0.5, 1])
            table.append(
                {
                    "model": model,
                    "how": title,
                    "s": f"{np.median(times[:, place]):.2f}",
                    "speed": f"{middle:.2f}x ({low:.2f} .. {high:.2f})",
                    "padding": f"{1 - run.tokens / run.cells:.1%}",
                    "tokens computed": run.cells,
                    "Spearman x100": f"{scores[title]:.2f}",
                }
            )
    return table


def crowd(call: Call, texts: Sequence[str], clients: int) -> tuple[NDArray[np.float64], float]:
    """Milliseconds of every request, and requests a second."""
    seconds: list[float] = []
    rest, lock = iter(texts), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                text = next(rest, None)
            if text is None:
                return
            begin = time.perf_counter()
            call([text])
            seconds.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client) for _ in range(clients)]:
            done.result()
    return 1e3 * np.array(seconds), len(seconds) / (time.perf_counter() - begin)


def service(folder: Path, rounds: int) -> list[dict[str, object]]:
    """Rows of the table: ways to serve, which take turns for every number of clients."""
    texts, _ = test_set(1)
    chosen = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:REQUESTS]]
    embedder = opened(folder)
    batchers = {wait: Batcher(embedder, wait=wait) for wait in WAITS}
    ways: dict[str, Call] = {"each alone": embedder.embed}
    for wait, batcher in batchers.items():
        ways[WAITS[wait]] = batcher.embed
    table: list[dict[str, object]] = []
    for clients in CLIENTS:
        found: dict[str, list[tuple[NDArray[np.float64], float]]] = {title: [] for title in ways}
        for turn in range(rounds):
            for place in np.roll(np.arange(len(ways)), turn):
                title = list(ways)[place]
                found[title].append(crowd(ways[title], chosen, clients))
        for title, runs in found.items():
            p50, p95 = np.median([np.quantile(times, [0.5, 0.95]) for times, _ in runs], axis=0)
            table.append(
                {
                    "clients": clients,
                    "how": title,
                    "p50, ms": f"{p50:.1f}",
                    "p95, ms": f"{p95:.1f}",
                    "requests/s": f"{np.median([rate for _, rate in runs]):.0f}",
                }
            )
    for batcher in batchers.values():
        batcher.close()
    return table


def made(method: str) -> Path:
    """The folder of a build, which is made where no other benchmark has done it."""
    folder = measure.WORK / method
    return folder if (folder / "manifest.json").is_file() else methods.run(method)[0].parent


def main() -> None:
    """Measure what was named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=["embed", "embed_service"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--budgets", action="store_true")
    asked = parser.parse_args()
    folders = {title: made(method) for title, method in MODELS.items()}
    if "embed" in asked.tables:
        table = throughput(folders, asked.rounds, asked.every, budgets=asked.budgets)
        measure.report("embed", table, NOTE)
    if "embed_service" in asked.tables:
        measure.report("embed_service", service(folders["int8"], asked.rounds), SERVICE_NOTE)


if __name__ == "__main__":
    main()
