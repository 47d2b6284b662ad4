"""Commands whose stdin, stdout or stderr is closed, full, or read by nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from generating import write_folder
from helpers import call

from qexport import cli

FULL = "/dev/full"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("models") / "target"))


def words(folder, *more):
    return ("generate", folder, "--prompt", "ab", "--max-tokens", "4", "--threads", "1", "--speculate", "off", *more)


def ran(arguments, redirect=""):
    """Exit code, stdout and stderr of a command behind a redirection of the shell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "qexport", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [("recipe", "list"), ("recipe", "list", "--json"), "text", "object"], ids=str)
def test_a_reader_that_leaves_ends_a_command_without_a_word(folder, arguments):
    if isinstance(arguments, str):
        arguments = words(folder, *(["--json"] if arguments == "object" else []))
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qexport", *arguments]
    with open(writing, "wb") as nobody:
        done = subprocess.run(command, env=environment, stdout=nobody, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"needs {FULL}")
@pytest.mark.parametrize("flag", [(), ("--json",)], ids=str)
def test_a_full_disk_is_told_on_stderr(folder, flag):
    code, _, err = ran(words(folder, *flag), f">{FULL}")
    assert (code, err) == (9, "error: stdout: cannot be written: No space left on device\n")
    code, _, err = ran(("generate", "nowhere", "--prompt", "a", *flag), f">{FULL}")
    assert code == 2
    assert err.startswith("error: nowhere: no such folder")
    assert ran(("generate", "nowhere", "--prompt", "a"), f"2>{FULL}")[0] == 2


@pytest.mark.parametrize("flag", [(), ("--json",)], ids=str)
def test_a_closed_stdout_is_nobodys_loss(folder, flag):
    assert ran(words(folder, *flag), ">&-") == (0, "", "")


def test_a_closed_stdin_has_no_prompts(folder, tmp_path):
    code, _, err = ran(("generate", folder, "--prompts", "-"), "<&-")
    assert (code, err.partition("\n")[0]) == (2, "error: there is no prompt")
    assert ran(("embed", str(tmp_path), "--texts", "-"), "<&-")[0] == 5


@pytest.mark.parametrize(
    ("error", "name", "code"),
    [(KeyboardInterrupt(), "Interrupted", 130), (cli._TerminatedError(), "Terminated", 143)],
    ids=["interrupt", "terminate"],
)
def test_a_signal_is_told_as_one_object_too(monkeypatch, capsys, error, name, code):
    def ended(*_, **__):
        raise error

    monkeypatch.setattr(cli.cli, "main", ended)
    what = f"{name.lower()}; nothing was published"
    assert call(capsys, "generate", "target") == (code, "", f"{what}\n")
    found, out, err = call(capsys, "generate", "target", "--json")
    told = {"error": name, "exit_code": code, "what": what, "where": None, "hint": None}
    assert (found, json.loads(out), err) == (code, {"schema": "qexport.error/1", **told}, "")
