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
from qexport.exporter.recipe_files import list_recipes
from qexport.passes.target import TARGETS as KNOWN

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "rich")


def told(shell: str, line: str) -> str:
    """What a shell is told for a line whose last word is begun."""
    words = line.split(" ")
    asked = {"_QEXPORT_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-m", "qexport"]
    ended = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return ended.stdout


def complete(line: str) -> list[str]:
    """What bash may put in the place of the last word."""
    return [entry.partition(",")[2] for entry in told("bash", line).split()]


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


DATA = ["--calib", "--eval"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((command, option) for command in ("build m", "plan m", "sensitivity m", "verify d") for option in DATA),
        ("verify d", "--model"),
        ("generate t", "--prompts"),
    ],
)
def test_files_are_completed_where_options_take_them(command, option):
    assert complete(f"qexport {command} {option} sam") == ["sam"]
    assert told("bash", f"qexport {command} {option} sam").startswith("file,")


@pytest.mark.parametrize("begun", ["build m --target = ort", "build --recipe = int8 m --target = ort"])
def test_values_behind_a_sign_are_completed_as_bash_breaks_them(begun):
    assert complete(f"qexport {begun}") == ["ort-cpu", "ort-cuda"]


def test_a_sign_stays_in_the_word_where_the_shell_leaves_it_there(capsys):
    assert told("zsh", "qexport build m --target=ort-cu") == "plain\nort-cuda\n_\n"
    script = call(capsys, "completion", "zsh")[1]
    assert "compset -P 1 '*='" in script
    assert script.count('compadd -U -i "$IPREFIX"') == 1


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish_completes_whole_words_and_shows_whole_help(capsys, tmp_path):
    (tmp_path / "script").write_text(call(capsys, "completion", "fish")[1])
    (tmp_path / "qexport").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qexport "$@"\n')
    (tmp_path / "qexport").chmod(0o755)
    (tmp_path / "data.npz").touch()

    def lines(line):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        command = ["fish", "--no-config", "-c", "source script; complete -C $argv[1]", line]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert lines("qexport build m --target=ort") == ["--target=ort-cpu", "--target=ort-cuda"]
    assert lines("qexport build m --calib=da") == ["--calib=data.npz"]
    assert lines("qexport build m --reci") == [
        "--recipe\tA recipe file, or the name of a shipped one (qexport recipe list)."
    ]


def test_the_script_of_fish_has_what_is_changed_in_it(capsys):
    script = call(capsys, "completion", "fish")[1]
    assert "string split -m 1" in script
    assert script.count("$option") == 2


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
