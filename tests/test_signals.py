"""Commands that are told to end clean up, undisturbed, whoever tells them and how often."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

ENDING = """
import os, sys, time
import click, qexport.cli
@click.command()
def build():
    try:
        print("waiting", flush=True)
        time.sleep(60)
    finally:
        open(sys.argv[1] + "/cleaning", "w").close()
        time.sleep(0.5)
        open(sys.argv[1] + "/cleaned", "w").close()
        if sys.argv[2:] == ["fails"]:
            raise OSError(5, "Input/output error")
qexport.cli.LazyGroup.get_command = lambda *_: build
qexport.cli.supervise.__globals__["GRACE"] = 20.0
qexport.cli.main(["build"])
"""


def ending(folder, *more):
    return [sys.executable, "-c", ENDING, str(folder), *more]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("more", [(), ("fails",)], ids=str)
def test_a_command_cleans_up_undisturbed_when_a_whole_group_is_told_to_end(tmp_path, name, code, more):
    """The child hears it twice then, from the sender and from its parent; SIGINT of a terminal is told apart."""
    process = subprocess.Popen(
        ending(tmp_path, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "waiting\n"
    if name == "SIGINT":
        process.send_signal(signal.SIGINT)
    else:
        os.killpg(process.pid, getattr(signal, name))
    process.communicate(timeout=30)
    assert process.returncode == code
    assert (tmp_path / "cleaned").exists()


def test_a_command_cleans_up_when_its_terminal_is_closed(tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, ending(tmp_path))
    told = b""
    while b"waiting\r\n" not in told:
        told += os.read(terminal, 1024)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert (tmp_path / "cleaned").exists()
