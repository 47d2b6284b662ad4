"""Optimum's ONNX exporters, where they are installed: in a process of their own, offline, without code or pickles.

They need an older transformers than this package works with otherwise, so they may live in another environment, whose
interpreter is named. What they write is an ONNX file of another exporter, and goes through the door for those.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.errors import BuildFailed, EnvironmentMismatch, NativeCrash, QexportError, ResourceExhausted, UsageError
from qexport.exporter.doors.safe_folder import demand_safe
from qexport.exporter.families.folder import architecture

TIMEOUT = 3600.0
_MODULE = "optimum.exporters.onnx"
_SECRET = re.compile("AUTH|CREDENTIAL|KEY|PASSW|PROXY|SECRET|TOKEN", re.IGNORECASE)
_TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_RAISED = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b.*")
_MISSING = re.compile(r"No module named '?optimum")
_MAIN = "model.onnx"
TASKS = {
    "ForCausalLM": "text-generation-with-past",
    "LMHeadModel": "text-generation-with-past",
    "ForConditionalGeneration": "text2text-generation-with-past",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "": "feature-extraction",
}
"""Optimum's name of what a class of models was saved for, by the end of its name."""


@dataclass(frozen=True, slots=True)
class OptimumOptions:
    """What a caller may say to optimum's exporter.

    Attributes:
        task: A task as optimum calls it, such as ``text-generation-with-past``; the one that the folder was saved for
            when ``None``.
        opset: Version of the ONNX operators; what it takes to be best for the model when ``None``.
        python: The interpreter that has optimum; this one when ``None``.
        timeout: Seconds after which the exporter is stopped.
    """

    task: str | None = None
    opset: int | None = None
    python: Path | None = None
    timeout: float = TIMEOUT


def export_optimum(folder: str | Path, into: Path, asked: OptimumOptions | None = None) -> tuple[Path, ...]:
    """Have optimum export a Hugging Face folder in float32; return the ONNX files, ``model.onnx`` first.

    Args:
        folder: ``config.json`` and safetensors.
        into: An empty folder for what optimum writes: models, their data, tokenizer files.
        asked: The caller's options.

    Raises:
        UsageError: No such folder, interpreter or task.
        UnsafeInput: See ``demand_safe``.
        EnvironmentMismatch: The interpreter has no optimum.
        BuildFailed: Optimum does not know the model or cannot export it.
        ResourceExhausted: It took too long, or was killed for memory.
        NativeCrash: It died by another signal.
    """
    options, path = asked or OptimumOptions(), Path(folder)
    task = options.task or infer_task(demand_safe(path))
    status, said = _run(command(path, into, task, options), into, options)
    if status:
        raise _cause(status, said, str(path))
    found = sorted(into.glob("*.onnx"), key=lambda file: (file.name != _MAIN, file.name))
    if not found:
        raise BuildFailed("optimum wrote no ONNX file", where=str(path))
    return tuple(found)


def infer_task(config: dict[str, Any]) -> str:
    """What a folder was saved for; optimum itself does not tell that of a folder."""
    named = architecture(config)
    return next(task for ending, task in TASKS.items() if named.endswith(ending))


def command(folder: Path, into: Path, task: str, options: OptimumOptions) -> list[str]:
    """The command line of the child; raise ``UsageError`` where the task cannot be one."""
    if not _TASK.fullmatch(task):
        raise UsageError(f"{task!r} is no task", hint="optimum's are called like 'text-generation-with-past'")
    python = sys.executable if options.python is None else os.path.abspath(options.python)  # a link is not followed
    line = [python, "-P", "-m", _MODULE, f"--model={folder.resolve()}", f"--task={task}", "--framework=pt"]
    line += ["--library-name=transformers", "--dtype=fp32"]
    return [*line, *([f"--opset={options.opset}"] if options.opset else []), str(into.resolve())]


def environment(into: Path) -> dict[str, str]:
    """This environment, less what is called like a secret; no network, and caches below ``into``."""
    public = {name: value for name, value in os.environ.items() if not _SECRET.search(name) and name != "PYTHONPATH"}
    off = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1")
    return {**public, **off, "HF_HOME": str(into.resolve() / ".cache")}


def _run(line: list[str], into: Path, options: OptimumOptions) -> tuple[int, str]:
    """Run the child and all it starts to the end; its status and what it said."""
    try:
        child = subprocess.Popen(
            line,
            cwd=into,
            env=environment(into),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise UsageError(f"no interpreter: {error.strerror}", where=line[0], hint="name a python") from error
    with child:
        try:
            said = child.communicate(timeout=options.timeout)[0]
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            what = f"optimum did not end within {options.timeout:g} s and was stopped"
            raise ResourceExhausted(what, hint="allow it more time") from error
    return child.returncode, said.decode("utf-8", "replace")


def _cause(status: int, said: str, where: str) -> QexportError:
    """What the child died of."""
    if _MISSING.search(said):
        hint = (
            "pip install 'qexport[optimum]' in an environment of its own, since it pins transformers below 4.58, "
            "and name that environment's python"
        )
        return EnvironmentMismatch("the interpreter has no optimum.exporters.onnx", hint=hint)
    if status == -signal.SIGKILL or "MemoryError" in said or "bad_alloc" in said:
        return ResourceExhausted("optimum was killed, most likely because memory ran out", where=where)
    if status < 0:
        return NativeCrash(f"optimum died by {signal.Signals(-status).name}", where=where)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    what = (raised or lines or [f"status {status}"])[-1]
    return BuildFailed(f"optimum cannot export it: {what}", where=where, hint="another task, or the way of torch")
