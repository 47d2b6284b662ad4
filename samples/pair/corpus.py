"""Text that any machine has, cut into what is learned from and what is held out.

The Python standard library's sources, a file a document: whole files are held out by a hash of their name, so the cut
is the same on every machine and in every run. Test suites are left out, since not every installation has them, and so
are tables that hold more numbers than code. Of every other text file the tail is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Ids = NDArray[np.int64]  # [tokens]

END = "<|endoftext|>"
SKIPPED = {"test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
SKIPPED |= {"__pycache__", "ensurepip"}
HELD_OUT = 0.1
"""Share of library files and of each text that is never trained on."""


@dataclass(frozen=True)
class Text:
    """Documents to learn from, and held-out text by kind: ``library`` and the stem of each text file."""

    train: tuple[str, ...]
    held_out: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Corpus:
    """The same in tokens. Each document of ``train`` ends with the end token; a kind held out is one stream."""

    train: tuple[Ids, ...]
    held_out: dict[str, Ids]


def is_held_out(name: str) -> bool:
    """Whether the library file of this name, with forward slashes, is kept away from training."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def library_files(root: Path) -> Iterator[tuple[str, str]]:
    """Name below ``root`` and text of every source file, in order of names, without nearly empty ones."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if len(text) >= 200:
                yield name.as_posix(), text


def read_text(library: Path, texts: Sequence[Path]) -> Text:
    """The sources below ``library``, and ``texts``; a text named twice counts twice."""
    files = list(library_files(library))
    train = [text for name, text in files if not is_held_out(name)]
    held_out = {"library": tuple(text for name, text in files if is_held_out(name))}
    for path in texts:
        text = path.read_text(encoding="utf-8")
        start = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1
        train.append(text[:start])
        held_out[path.stem] = (text[start:],)
    return Text(tuple(train), held_out)


def train_tokenizer(documents: Sequence[str], size: int) -> Tokenizer:
    """Byte-level BPE: every text is read and written back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenize(text: Text, tokenizer: Tokenizer) -> Corpus:
    """All of ``text`` in tokens of ``tokenizer``, which must have the end token."""
    end = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"the tokenizer has no {END!r} token")
    return Corpus(
        tuple(_ids(tokenizer, document, end) for document in text.train),
        {
            kind: np.concatenate([_ids(tokenizer, document, end) for document in documents])
            for kind, documents in text.held_out.items()
            if documents
        },
    )


def _ids(tokenizer: Tokenizer, document: str, end: int) -> Ids:
    return np.array([*tokenizer.encode(document).ids, end], dtype=np.int64)
