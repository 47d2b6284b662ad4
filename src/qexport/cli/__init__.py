"""The command line: parse, call, print. Subcommands are imported when they are named."""

from __future__ import annotations

import errno
import importlib
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from qexport import __version__
from qexport.cli.bundle import write_bundle
from qexport.cli.supervise import Death, outcome_at, read_limits, supervise, tell_end, told_stage
from qexport.errors import NativeCrash, QexportError, ResourceExhausted, UsageError, printable
from qexport.runtime.memory import return_freed_blocks

COMMANDS = (
    "fetch",
    "build",
    "export",
    "eval",
    "generate",
    "embed",
    "bench",
    "certify",
    "sensitivity",
    "plan",
    "check",
    "inspect",
    "diff",
    "verify",
    "recipe",
    "cache",
    "doctor",
    "completion",
)
"""Each is a module of this package with a click command of the same name."""

INTERRUPTED, CLOSED, TERMINATED = 130, 141, 143  # as of programs that SIGINT, SIGPIPE and SIGTERM ended
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPENT = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
_WORDS = {130: "interrupted", 143: "terminated", 129: "hung up"}
_RAISE = "end other programs, or raise the limits of this one (ulimit -a)"
ERROR_SCHEMA = "qexport.error/1"
_COMPLETE = "_QEXPORT_COMPLETE"  # set by a shell that wants to know what may follow


class _TerminatedError(BaseException):
    """Raised by SIGTERM and SIGHUP, so that what was staged is removed on the way out."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.code = 128 + number


class _ClosedError(BaseException):
    """Raised where nobody reads any more, as head does after some lines, where click and rich would exit by 1."""


class LazyGroup(click.Group):
    """A group that knows the names of its commands and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, or ``None`` when there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"qexport.cli.{cmd_name}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, SystemExit) as error:
            if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
                raise
            raise _ClosedError from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Take a trained model to the smallest, fastest engine that is proven to be as good."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line in a process of its own and leave with its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    flags = _flags(given)
    found = supervise(lambda: run(given), read_limits(flags))
    sys.exit(found if isinstance(found, int) else _report_death(found, given, flags))


def run(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    _survive_encodings()
    return_freed_blocks()
    for name in ("onnxscript", "onnx_ir"):  # their notes are for their own developers, and unescaped
        logging.getLogger(name).addHandler(logging.NullHandler())
    _end_by_exception(signal.SIGTERM, signal.SIGHUP)
    if _COMPLETE in os.environ:
        importlib.import_module("qexport.cli.shells")
    try:
        return _run(arguments, _flags(arguments))
    except _ClosedError:
        _forget_stdout()
        return CLOSED


def _run(arguments: list[str], flags: list[str]) -> int:
    try:
        code: int | None = cli.main(arguments, prog_name="qexport", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        return _report_end("interrupted", INTERRUPTED, as_json="--json" in flags)
    except _TerminatedError as error:
        return _report_end(_WORDS[error.code], error.code, as_json="--json" in flags)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except (click.ClickException, QexportError) as error:
        if "--debug" in flags:
            traceback.print_exc()
        failure = _as_ours(error)
        _report(failure, type(failure).__name__, as_json="--json" in flags)
        return failure.exit_code
    except Exception as error:  # noqa: BLE001 - the last line: whatever is left becomes one line and exit code 1
        ended = _signal_behind(error)  # as where a terminal is gone, and a bar of progress cannot be taken away
        if ended is not None:
            return _report_end(_WORDS[ended], ended, as_json="--json" in flags)
        return _report_crash(error, arguments, flags)
    return code or 0


def _signal_behind(error: BaseException | None) -> int | None:
    """The exit code of the signal while whose way out was cleaned up something failed; ``None`` without one."""
    while error is not None and not isinstance(error, KeyboardInterrupt | _TerminatedError):
        error = error.__context__
    if error is None:
        return None
    return error.code if isinstance(error, _TerminatedError) else INTERRUPTED


def _flags(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _end_by_exception(*numbers: signal.Signals) -> None:
    """Let the first of these signals unwind the stack, undisturbed by a second; those that are ignored stay so.

    Outside the main thread they are somebody else's business.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]

    def end(number: int, _: object) -> None:
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise _TerminatedError(number)

    for number in heard:
        signal.signal(number, end)


def _as_ours(error: click.ClickException | QexportError) -> QexportError:
    if isinstance(error, QexportError):
        return error
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "qexport"
    message = error.format_message().rstrip(".")
    return UsageError(message[:1].lower() + message[1:], where=path, hint=f"see {path} --help")


def _report_crash(error: Exception, arguments: list[str], flags: list[str]) -> int:
    """Tell a failure that has no class of ours; running out of something is not a bug."""
    if "--debug" in flags:
        traceback.print_exc()
    if isinstance(error, MemoryError):
        failure: QexportError = ResourceExhausted("out of memory", hint="give it less at once, or a larger machine")
    elif isinstance(error, OSError) and error.errno in _FULL:
        failure = ResourceExhausted(f"cannot be written: {error.strerror}", where=str(error.filename or "stdout"))
    elif isinstance(error, OSError) and error.errno in _SPENT:
        failure = ResourceExhausted(f"the system gives no more: {error.strerror}", hint=_RAISE)
    elif isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        failure = ResourceExhausted("the system gives no more threads", hint=_RAISE)
    else:
        what = f"a bug in qexport, nothing was published: {type(error).__name__}: {error}"
        bundle = write_bundle(arguments, told_stage(), what, "".join(traceback.format_exception(error)))
        failure = QexportError(what, hint=f"run again with --debug and report what it prints{_and(bundle)}")
    _report(failure, type(error).__name__, as_json="--json" in flags)
    return failure.exit_code


def _report_death(death: Death, arguments: list[str], flags: list[str]) -> int:
    """Tell what a signal did to the process that did the work."""
    failure = death.failure
    if failure is None and death.told:
        return death.code
    if failure is None:
        return _report_end(_WORDS[death.code], death.code, outcome_at(death.stage), as_json="--json" in flags)
    if isinstance(failure, NativeCrash):
        bundle = write_bundle(arguments, death.stage, failure.what, death.stack)
        failure = NativeCrash(failure.what, where=failure.where, hint=f"report it{_and(bundle)}")
    _report(failure, type(failure).__name__, as_json="--json" in flags)
    return failure.exit_code


def _and(bundle: Path | None) -> str:
    return "" if bundle is None else f", with {bundle}"


def _report_end(word: str, code: int, outcome: str = outcome_at(""), *, as_json: bool) -> int:
    """Tell that a signal ended it, and return the exit code."""
    what = word + outcome
    if not (as_json and _told_as_json(word.capitalize(), code, {"what": what, "where": None, "hint": None})):
        _tell(what)
    tell_end()
    return code


def _report(failure: QexportError, name: str, *, as_json: bool) -> None:
    """Tell a failure: one object on stdout, or one line and a hint on stderr."""
    told = {"what": failure.what, "where": failure.where, "hint": failure.hint}
    if as_json and _told_as_json(name, failure.exit_code, told):
        return
    place = f"{printable(failure.where, limit=1000)}: " if failure.where else ""
    _tell(f"error: {_one_line(place + failure.what)}")
    if failure.hint:
        _tell(f"hint: {_one_line(failure.hint)}")


def _tell(line: str) -> None:
    """Write to stderr, if that can be written to: the exit code says it as well."""
    with suppress(OSError):
        click.echo(line, err=True)


def _told_as_json(name: str, code: int, told: dict[str, str | None]) -> bool:
    """Write the one object; whether that was possible, where the disk is full or nobody reads."""
    try:
        click.echo(json.dumps({"schema": ERROR_SCHEMA, "error": name, "exit_code": code, **told}))
    except OSError:
        _forget_stdout()
        return False
    return True


def _forget_stdout() -> None:
    """Let what is still buffered, and would be written at exit, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, AttributeError):
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _one_line(text: str) -> str:
    return printable("; ".join(part.strip() for part in text.splitlines() if part.strip()), limit=2000)


def _survive_encodings() -> None:
    """Print what the terminal's encoding lacks as escapes, whatever names a model or a file system holds."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
