"""Commands run in a child that a parent watches: whatever happens to the child, the parent says what, and lives."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qexport.cli import bundle
from qexport.cli.supervise import Limits, parse_bytes, read_limits

HEAD = """
import os, signal, sys, time
import qexport.cli.supervise
from qexport.cli.supervise import Death, Limits, supervise, tell_stage
def tell(found):
    if isinstance(found, Death):
        words = "" if found.failure is None else f"{type(found.failure).__name__}: {found.failure}"
        print(f"code {found.code} stage {found.stage!r} {words}")
        print("stack:", found.stack)
        sys.exit(found.code)
    sys.exit(found)
def work():
    tell_stage("calibrate")
    print("ready", flush=True)
"""


@pytest.fixture(autouse=True)
def signals_are_heard():
    """A shell that starts tests in the background has them ignore some, and whatever they start too."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def script(work, limits="Limits(8 << 30)", before=""):
    body = "".join(f"    {line}\n" for line in work.splitlines())
    return [sys.executable, "-c", f"{HEAD}{body}    return 0\n{before}\ntell(supervise(work, {limits}))"]


def ended(work, limits="Limits(8 << 30)"):
    return subprocess.run(script(work, limits), capture_output=True, text=True, timeout=60, check=False)


def started(work, limits="Limits(8 << 30)", before=""):
    process = subprocess.Popen(script(work, limits, before), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def gone(pid):
    """Whether a process has ended, waited for or not."""
    for _ in range(50):
        with suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


def ends(process, within):
    began = time.monotonic()
    out, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < within
    return process.returncode, out


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize("code", [0, 7, 141])
def test_the_exit_code_of_the_work_is_that_of_the_command(code):
    assert ended(f"return {code}").returncode == code


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL"])
def test_a_signal_that_kills_the_child_is_told_with_what_it_did(name):
    found = ended(f"os.kill(os.getpid(), signal.{name})")
    assert found.returncode == 12
    assert f"code 12 stage 'calibrate' NativeCrash: stage 'calibrate': native code died by {name}" in found.stdout
    assert "in work" in found.stdout.split("stack:")[1]


def test_what_dies_when_all_was_done_is_not_said_to_have_published_nothing():
    found = ended("import atexit\natexit.register(os.abort)")
    assert found.returncode == 12
    assert "NativeCrash" in found.stdout
    assert "died by SIGABRT, when all was done" in found.stdout
    assert "nothing was published" not in found.stdout


def test_what_dies_leaves_no_core_of_the_model_and_the_data():
    told = "import resource; resource.setrlimit = lambda *given: print(given, flush=True)"
    found = subprocess.run(script("return 0", before=told), capture_output=True, text=True, timeout=60, check=True)
    assert str((resource.RLIMIT_CORE, (0, 0))) in found.stdout


def test_a_child_that_is_killed_from_outside_ran_out_of_memory_most_likely():
    found = ended("os.kill(os.getpid(), signal.SIGKILL)")
    assert found.returncode == 9
    assert "ResourceExhausted: stage 'calibrate': killed, most likely because memory ran out: it took" in found.stdout


def test_a_command_may_take_so_much_memory_and_no_more():
    found = ended("held = bytearray(600 << 20)\ntime.sleep(30)", "Limits(300 << 20)")
    assert found.returncode == 9
    assert "and may take 300 MiB" in found.stdout
    assert "--limit-memory" in found.stdout


def test_memory_of_what_the_child_starts_counts_and_ends_with_it():
    work = (
        "import ctypes, subprocess\n"
        "code = 'import ctypes,time; ctypes.CDLL(None).prctl(1, 9); held = bytearray(600 << 20); time.sleep(60)'\n"
        "started = subprocess.Popen([sys.executable, '-c', code])\n"
        "print(started.pid, flush=True)\n"
        "started.wait()"
    )
    found = ended(work, "Limits(300 << 20)")
    assert found.returncode == 9
    pid = int(found.stdout.splitlines()[1])
    assert gone(pid)


def test_a_mapped_file_is_no_memory_taken(tmp_path):
    file = tmp_path / "weights"
    with file.open("wb") as made:
        made.truncate(600 << 20)
    work = f"import mmap\nheld = mmap.mmap(os.open({str(file)!r}, os.O_RDONLY), 0, prot=mmap.PROT_READ)\n"
    work += "total = sum(held[at] for at in range(0, len(held), 4096))\ntime.sleep(0.6)"
    assert ended(work, "Limits(200 << 20)").returncode == 0


def test_a_command_may_take_so_long_and_no_longer():
    began = time.monotonic()
    found = ended("time.sleep(60)", "Limits(8 << 30, 0.5)")
    assert time.monotonic() - began < 10
    assert found.returncode == 9
    assert "it did not end within 0.5 s" in found.stdout


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_reach_the_child_which_cleans_up(name, code, tmp_path):
    mark = tmp_path / "cleaned"
    work = (
        "class Told(BaseException): pass\n"
        "def end(*_): raise Told\n"
        f"signal.signal(signal.{name}, end)\n"
        "try:\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(60)\n"
        "except Told:\n"
        f"    open({str(mark)!r}, 'w').close()\n"
        f"    return {code}"
    )
    process = started(work, "Limits(8 << 30)", "qexport.cli.supervise.GRACE = 20.0")  # however slow the machine is
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(getattr(signal, name))
    assert ends(process, 15.0) == (code, "")
    assert mark.exists()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_child_that_does_not_end_when_it_is_told_to_is_killed(name, code):
    process = started(f"signal.signal(signal.{name}, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)")
    assert process.stdout.readline() == "deaf\n"
    process.send_signal(getattr(signal, name))
    found, told = ends(process, 4.0)
    assert found == code
    assert f"code {code} stage 'calibrate' \n" in told


def test_a_second_signal_does_not_wait():
    process = started("signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)")
    assert process.stdout.readline() == "deaf\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert ends(process, 1.2)[0] == 130


def test_a_terminal_interrupts_the_child_once():
    work = (
        "heard = []\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        "print('waiting', flush=True)\n"
        "until = time.monotonic() + 1\n"
        "while time.monotonic() < until: time.sleep(0.05)\n"
        "print('heard', len(heard), flush=True)"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, script(work))
    told = b""
    while b"waiting" not in told:
        told += os.read(terminal, 1024)
    os.write(terminal, b"\x03")
    while not re.search(rb"heard \d+\r", told):
        told += os.read(terminal, 1024)
    os.waitpid(child, 0)
    os.close(terminal)
    assert b"heard 1\r" in told


def test_what_is_ignored_stays_ignored():
    work = "time.sleep(0.5)\nreturn 5"
    command = script(work)
    command[2] = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + command[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert ends(process, 5.0)[0] == 5


def test_a_child_ends_with_its_parent():
    process = started("print(os.getpid(), flush=True)\ntime.sleep(60)")
    child = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=30)  # until nobody writes any more
    assert gone(child)


def test_without_a_process_to_spare_the_work_is_done_here():
    found = ended("return 3", "Limits(8 << 30)")
    assert found.returncode == 3
    command = script("print(os.getpid() == int(os.environ['ME']))\nreturn 3")
    command[2] = (
        "import os\ndef none(): raise BlockingIOError(11, 'no more processes')\n"
        "os.fork = none\nos.environ['ME'] = str(os.getpid())\n" + command[2]
    )
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (3, "ready\nTrue\n")


# ---------------------------------------------------------------- the command line


def command(body, *arguments, **environment):
    code = f"import os, signal, sys\nimport qexport.cli as c\ndef run(arguments):\n    {body}\nc.run = run\nc.main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


def test_a_crash_leaves_a_bundle_that_names_no_contents(tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(b"weights")
    found = command(
        "os.kill(os.getpid(), signal.SIGSEGV)", "check", str(model), XDG_CACHE_HOME=str(tmp_path), MY_SECRET="hush"
    )
    assert found.returncode == 12
    assert found.stderr.startswith("error: native code died by SIGSEGV; nothing was published\nhint: report it, with ")
    (file,) = (tmp_path / "qexport" / "crashes").iterdir()
    assert str(file) in found.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    told = json.loads(file.read_text())
    assert told["arguments"] == ["check", str(model)]
    assert told["inputs"][0]["bytes"] == 7
    assert any("run" in line for line in told["stack"])
    assert "hush" not in file.read_text()
    assert "weights" not in file.read_text()


def test_a_crash_is_one_object_with_json(tmp_path):
    found = command("os.kill(os.getpid(), signal.SIGBUS)", "check", "m", "--json", XDG_CACHE_HOME=str(tmp_path))
    told = json.loads(found.stdout)
    assert (told["error"], told["exit_code"], found.stderr) == ("NativeCrash", 12, "")


def test_a_bug_leaves_a_bundle_with_its_traceback(tmp_path):
    code = (
        "import qexport.cli as c\n"
        "def bug(*_, **__): raise KeyError('nobody thought of this')\n"
        "c.cli.main = bug\nc.main(['check', 'm'])"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 1
    (file,) = (tmp_path / "qexport" / "crashes").iterdir()
    assert str(file) in found.stderr
    assert any("nobody thought of this" in line for line in json.loads(file.read_text())["stack"])


def test_a_cache_that_cannot_be_written_hides_no_crash(tmp_path):
    (tmp_path / "qexport").write_text("a file in the way")
    found = command("os.kill(os.getpid(), signal.SIGSEGV)", "check", "m", XDG_CACHE_HOME=str(tmp_path))
    assert (found.returncode, found.stderr.splitlines()[-1]) == (12, "hint: report it")


def test_bundles_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for number in range(bundle.KEPT + 5):
        monkeypatch.setattr(os, "getpid", lambda number=number: 10_000 + number)
        path = bundle.write_bundle(["check"], "load", "died", "stack")
    assert path.exists()
    assert len(list(path.parent.iterdir())) == bundle.KEPT


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('import threading; raise RuntimeError("can\'t start new thread")', "no more threads"),
        ("raise OSError(24, 'Too many open files')", "the system gives no more: Too many open files"),
        ("raise MemoryError", "out of memory"),
    ],
)
def test_what_the_system_does_not_give_is_no_bug(body, words):
    code = f"import qexport.cli as c\ndef work(*_, **__):\n    {body}\nc.cli.main = work\nc.main(['check', 'm'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 9
    assert words in found.stderr


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1500000", 1_500_000),
        ("800M", 800 << 20),
        ("2G", 2 << 30),
        ("1.5GB", 3 << 29),
        ("4GiB", 4 << 30),
        (" 64k ", 64 << 10),
        ("1t", 1 << 40),
        ("0", None),
        ("-1G", None),
        ("much", None),
        ("", None),
        ("nan", None),
        ("inf", None),
        ("1e400", None),
        ("G", None),
    ],
)
def test_sizes_are_read(text, found):
    assert parse_bytes(text) == found


def test_limits_are_read_from_the_command_line():
    assert read_limits(["build", "--limit-memory", "2G", "--limit-time=90"]) == Limits(2 << 30, 90.0)
    usual = read_limits(["build", "--limit-time", "soon", "--limit-memory"])
    assert usual.seconds is None
    assert 0 < usual.memory < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_limit_that_cannot_be_read_is_refused():
    found = subprocess.run(
        [sys.executable, "-m", "qexport", "check", "m.onnx", "--limit-memory", "much"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert "'much' is no size, expected such as 800M or 4G" in found.stderr
