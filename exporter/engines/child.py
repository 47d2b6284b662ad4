"""Build an engine in a process of its own, because builders are native code: they crash, hang and run out of memory.

The parent writes one request to the child's stdin and closes it. The child answers on stdout, one JSON object in a
line: ``{"progress": [phase, fraction]}`` any number of times, then ``{"info": EngineInfo}`` or ``{"error": ...}`` with
the class and fields of one of ``qexport.errors``. A child that ends without either died, and its exit status says of
what. The engine itself goes to a file. What native code prints goes to the child's stderr, of which the last is kept.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread, Timer
from typing import IO, Any

from pydantic import TypeAdapter

from qexport.errors import BuildFailed, NativeCrash, QexportError, ResourceExhausted
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.exporter.engines.messages import listed
from qexport.exporter.outcome.result import EngineInfo
from qexport.runtime.backends.artefact import load_module
from qexport.safe_io import digest_file, write_bytes

_COMMAND = (sys.executable, "-P", "-m", "qexport.exporter.engines.child")
_SECRET = re.compile("AUTH|CREDENTIAL|KEY|PASSW|PROXY|SECRET|TOKEN", re.IGNORECASE)
_ERRORS = {kind.__name__: kind for kind in list[type[QexportError]]([QexportError, *QexportError.__subclasses__()])}
_SIGNALS = {number.value: number.name for number in signal.Signals}
_OPTIONS = TypeAdapter(EngineOptions)
_KEPT = 10  # pieces of the child's stderr
_PIECE = 4096  # most bytes of a piece
_TOLD = 3  # lines of stderr in an error
_SET_PARENT_DEATH_SIGNAL = 1

Answer = Callable[[str, object], None]
"""Called in the child with the kind of an answer and its value."""


def build_in_child(model: Path, name: str, options: EngineOptions, plan: Path) -> EngineInfo:
    """Build an engine as ``build_engine`` does, in a child process that is gone when this returns or raises.

    Args:
        model: The model; weights may lie beside it. It must have been admitted.
        name: ``tensorrt`` or ``tensorrt_rtx``; only the child imports it.
        options: How to build. ``progress`` is called here, in the calling thread.
        plan: Where the child writes the engine, in one step; it exists only when this returns.

    Raises:
        NativeCrash: The child died by a signal.
        ResourceExhausted: It was killed for memory, or took longer than ``options.timeout`` seconds.
        QexportError: Whatever ``build_engine`` and ``load_module`` raise, with the same fields.
    """
    said: deque[bytes] = deque(maxlen=_KEPT)
    start = time.monotonic()
    with _started(model.parent, said, options.timeout) as child:
        for kind, value in _converse(child, _request(model, name, options, plan)):
            if kind == "info":
                return EngineInfo.model_validate(value)
            if kind == "error":
                raise _ERRORS[value.pop("class")](**value)
            if options.progress is not None and options.progress(*value) is False:
                raise BuildFailed("the engine build was cancelled")
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if time.monotonic() - start >= options.timeout:
        what = f"{name} did not end within {options.timeout:g} s and was stopped"
        raise ResourceExhausted(what, hint="give smaller profiles, or allow it more time")
    raise _cause(name, model, child.returncode, b"".join(said).decode("utf-8", "replace"))


@contextmanager
def _started(folder: Path, said: deque[bytes], timeout: float) -> Iterator[subprocess.Popen[bytes]]:
    """Run the child for the time of the block and at most ``timeout`` seconds, then end it and all it started.

    It has a session of its own, so Ctrl-C in a terminal reaches the parent alone. It works in the model's folder,
    whose name may be no text, which the parsers do not open.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        _COMMAND, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, env=_environment(), start_new_session=True
    ) as child:
        reader = Thread(target=_keep, args=(child.stderr, said), daemon=True)
        timer = Timer(timeout, _kill, [child])
        reader.start()
        timer.start()
        try:
            yield child
        finally:
            timer.cancel()
            timer.join()
            _kill(child)
            child.wait()
            reader.join()


def _environment() -> dict[str, str]:
    """Return this environment and module path, less what is called like a secret: native code reads the model."""
    public = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    return {**public, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}


def _keep(stream: IO[bytes], said: deque[bytes]) -> None:
    said.extend(iter(lambda: stream.readline(_PIECE), b""))


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the group of a child that nobody has waited for, so that the number is still its own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _request(model: Path, name: str, options: EngineOptions, plan: Path) -> dict[str, object]:
    plain = _OPTIONS.dump_python(replace(options, progress=None), mode="json")
    return {"model": model.name, "name": name, "options": plain, "plan": os.path.abspath(plan), "parent": os.getpid()}


def _converse(child: subprocess.Popen[bytes], request: dict[str, object]) -> Iterator[tuple[str, Any]]:
    """Send the request and yield the answers; a child that died early sends none."""
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):
        child.stdin.write(json.dumps(request).encode())
        child.stdin.close()
    for line in child.stdout:
        yield from json.loads(line).items()


def _cause(name: str, model: Path, status: int, said: str) -> QexportError:
    """Say what a child died of, from its exit status and its last words."""
    where = f"model {digest_file(model)}"
    words = [line for line in said.splitlines() if line.strip()][-_TOLD:]
    if status == -signal.SIGKILL or "bad_alloc" in said:
        what = f"{name} was killed while it built the engine, most likely because memory ran out"
        return ResourceExhausted(what, where=where, hint="free memory, or give smaller profiles")
    hint = "set export.engine=false for the same model without an engine"
    if status < 0:
        head = f"{name} died by {_SIGNALS.get(-status, f'signal {-status}')} while it built the engine"
        return NativeCrash(listed(head, words) if words else head, where=where, hint=hint)
    return QexportError(listed(f"{name} ended with status {status} and no answer", words), where=where, hint=hint)


def main() -> None:
    """Be the child: read a request, answer it."""
    answer = _claim_stdout()
    request = json.loads(sys.stdin.buffer.read())
    _end_with(request["parent"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        info = _work(request, answer)
    except MemoryError:
        _answer_error(answer, ResourceExhausted("out of memory while the engine was built"))
    except QexportError as error:
        _answer_error(answer, error)
    else:
        answer("info", info.model_dump(mode="json"))


def _claim_stdout() -> Answer:
    """Keep stdout for answers; what native code prints there joins what it prints to stderr."""
    out = os.dup(1)
    os.dup2(2, 1)

    def answer(kind: str, value: object) -> None:
        os.write(out, json.dumps({kind: value}).encode() + b"\n")  # a pipe takes a short line in one piece

    return answer


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, and leave at once if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def _work(request: dict[str, Any], answer: Answer) -> EngineInfo:
    options = replace(
        _OPTIONS.validate_python(request["options"]),
        progress=lambda phase, fraction: answer("progress", [phase, fraction]),
    )
    engine = build_engine(Path(request["model"]), load_module(request["name"]), options)
    write_bytes(request["plan"], engine.plan)
    return engine.info


def _answer_error(answer: Answer, error: QexportError) -> None:
    kind = type(error).__name__
    answer("error", {"class": kind, "what": error.what, "where": error.where, "hint": error.hint})


if __name__ == "__main__":
    main()
