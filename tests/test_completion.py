"""``qexport completion``: scripts that shells read, and names that come at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
from helpers import call

from qexport.cli.completion import TARGETS
from qexport.exporter.recipe import list_recipes
from qexport.passes.target import TARGETS as KNOWN

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "rich")


def complete(line: str) -> list[str]:
    """What the shell is told for a line whose last word is begun."""
    words = line.split(" ")
    told = {"_QEXPORT_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-m", "qexport"]
    ended = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return [entry.partition(",")[2] for entry in ended.stdout.split()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_a_script_that_it_can_read(capsys, tmp_path, shell):
    code, out, err = call(capsys, "completion", shell)
    assert (code, err) == (0, "")
    assert f"_QEXPORT_COMPLETE={shell}_complete" in out
    if shutil.which(shell):
        (tmp_path / "script").write_text(out)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_another_shell_is_refused_with_those_that_there_are(capsys):
    code, _, err = call(capsys, "completion", "tcsh")
    assert code == 2
    assert "bash" in err


@pytest.mark.parametrize(
    "command", ["build model.onnx --recipe", "plan m --recipe", "recipe show", "sensitivity m --recipe"]
)
def test_recipes_are_completed(command):
    names = complete(f"qexport {command} int8")
    assert names == sorted(name for name in list_recipes() if name.startswith("int8"))


@pytest.mark.parametrize("command", ["build m", "plan m", "sensitivity m"])
def test_targets_are_completed(command):
    assert complete(f"qexport {command} --target ort") == ["ort-cpu", "ort-cuda"]


def test_commands_and_options_are_completed():
    assert complete("qexport ver") == ["verify"]
    assert complete("qexport diff a b --fail") == ["--fail-if"]


def test_the_targets_that_are_told_are_those_that_there_are():
    assert tuple(KNOWN) == TARGETS


def test_nothing_heavy_is_loaded_for_a_name_and_it_comes_fast():
    script = (
        "import sys, click\n"
        "from qexport.cli import cli\n"
        "context = click.Context(cli)\n"
        "option = next(p for p in cli.get_command(context, 'build').params if p.name == 'recipe')\n"
        "assert [item.value for item in option.shell_complete(context, 'float1')] == ['float16']\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        complete("qexport build m --recipe int")
        taken.append(time.perf_counter() - started)
    bare = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import click"], check=True)
    bare = time.perf_counter() - bare
    assert min(taken) < max(0.5, 3 * bare)  # of which the interpreter and click are most
