"""Write the prompts beside this file: ``python samples/prompts/make.py FOLDER``, with the export of a target in it.

``copy.jsonl``: pieces of tables in the Python library's sources, which go on as they began. ``free.jsonl``: pieces of
its other sources, and stories. ``edit-NAME.jsonl``, for the target in the folder NAME: prompts in which one name was
replaced by another, and as their reference what the target said before that.

The files were written with Python 3.11; other versions have other sources.
"""

from __future__ import annotations

import json
import keyword
import random
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from tokenizers import Tokenizer

from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pair.corpus import library_files  # noqa: E402 (lies beside this folder)

STORIES = HERE.parent / "decoder" / "heldout.txt"
PROMPT, ANSWER = 96, 128  # tokens
EACH = 16  # prompts of a kind
LINES = 6  # that a table has at least
ALIKE = 0.6  # how much of a line a table's next line has too


def pieces(text: str, tokenizer: Tokenizer) -> Iterator[list[str]]:
    """Runs of whole lines, one behind the other, each of as many as fit into a prompt."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if lines and len(tokenizer.encode("".join([*lines, line])).ids) > PROMPT:
            yield lines
            lines = []
        lines.append(line)


def likeness(lines: Sequence[str]) -> float:
    """How much of a line the next one has too: the median of the neighbours."""
    if len(lines) < LINES or not all(line.strip() for line in lines):
        return 0.0
    return median(
        SequenceMatcher(None, one.strip(), other.strip(), autojunk=False).ratio() for one, other in pairwise(lines)
    )


def library(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Tables, the one of each file whose lines are most alike; and other pieces, one of each file."""
    tables: list[tuple[float, str]] = []
    others: list[str] = []
    for name, text in library_files(Path(sysconfig.get_paths()["stdlib"])):
        if name.startswith("_sysconfigdata"):
            continue  # is of the machine, not of the library
        found = [(likeness(lines), "".join(lines)) for lines in pieces(text, tokenizer)][1:-1]  # no heads, no tails
        if found:
            tables.append(max(found))
            others.append(random.Random(name).choice([piece for alike, piece in found if alike < ALIKE / 2] or [""]))
    tables = sorted((each for each in tables if each[0] >= ALIKE), reverse=True)
    return [piece for _, piece in tables[:EACH]], random.Random(0).sample(
        [other for other in others if other], 2 * EACH
    )


def stories() -> list[str]:
    """Beginnings of sentences in stories and what follows, evenly spaced."""
    text = STORIES.read_text(encoding="utf-8")
    starts = [text.index(". ", at) + 2 for at in range(0, len(text) - 2000, len(text) // (3 * EACH))]
    return [text[start : text.index(" ", start + 300)] for start in starts]


def edited(text: str, name: str, other: str) -> str:
    """The text with the most frequent of its names replaced by another."""
    names = [found for found in re.findall(name, text) if not keyword.iskeyword(found)]
    often = max(sorted(set(names)), key=names.count, default=None)
    return text if often is None else re.sub(rf"\b{often}\b", other, text)


def answer(decoder: Decoder, tokenizer: Tokenizer, prompt: str) -> str:
    """What the target says, greedily."""
    decoder.reset()
    ids, said = np.array([tokenizer.encode(prompt).ids]), list[int]()
    while len(said) < ANSWER:
        said.append(int(decoder.extend(ids)[0, -1].argmax()))
        ids = np.array([said[-1:]])
    return str(tokenizer.decode(said))


def write(name: str, prompts: Sequence[dict[str, object]]) -> None:
    """A JSON object on each line."""
    text = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main(folder: Path) -> None:
    """Write all files."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tables, others = library(tokenizer)
    write("copy", [{"prompt": prompt} for prompt in tables])
    write("free", [{"prompt": prompt} for prompt in [*others[:EACH], *stories()[::2][:EACH]]])
    code = [(prompt, edited(prompt, r"\b[A-Za-z_]{4,}\b", "value")) for prompt in others[EACH:]]
    told = [(story, edited(story, r"(?<=[a-z,] )[A-Z][a-z]+\b", "Ben")) for story in stories()[1::2]]
    changed = [pair for kind in (code, told) for pair in [each for each in kind if each[0] != each[1]][:EACH]]
    with Decoder(folder / "model.onnx", SessionOptions(threads=1)) as decoder:
        said = [answer(decoder, tokenizer, before) for before, _ in changed]
    edits = [{"prompt": after, "references": [text]} for (_, after), text in zip(changed, said, strict=True)]
    write(f"edit-{folder.name}", edits)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
