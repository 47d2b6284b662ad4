"""What an engine builder says while it works, as values: its errors in readable words, its progress as a fraction."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from qexport.errors import printable

Progress = Callable[[str, float], bool | None]
"""Called with the name of a phase and the fraction of the whole build that is done; ``False`` stops the build."""

_LINE = 240
_NOISE = "catchCudaError"  # without a GPU the library's own error path adds this to every error
_REWORDED = (
    (re.compile(r"^Assertion failed: .+?: "), ""),
    (re.compile(r'^.* && "(.+)"$'), r"\1"),
    (re.compile(r"^(false$|Invalid Node - [^\n]*\n?)"), ""),
    (re.compile(r"^Plugin not found.*"), "there is no such operator, and no plugin of that name"),
    (re.compile(r"\bI\w+::\w+: Error Code \d+: "), ""),
    (re.compile(r"\s+In \S+ at \S+:\d+"), ""),
    (re.compile(r"\s+"), " "),
)


class Messages:
    """Keeps the last errors a builder logs."""

    def __init__(self, kept: int = 20) -> None:
        self._errors: deque[str] = deque(maxlen=kept)

    def add(self, severity: str, text: str) -> None:
        """Take one message; ``severity`` is the name of the module's severity."""
        if severity in ("ERROR", "INTERNAL_ERROR") and _NOISE not in text:
            self._errors.append(text)

    @property
    def errors(self) -> list[str]:
        """Errors in readable words, oldest first."""
        return [readable(text) for text in self._errors]


@dataclass
class _Phase:
    name: str
    steps: int
    done: int = 0


class Phases:
    """Follows the nested phases of a build; the library calls it from threads of its own.

    Attributes:
        cancelled: Whether the build is to stop at its next step.
        error: What the callback raised; native code cannot pass it on, so it is kept here.
    """

    def __init__(self, callback: Progress | None = None) -> None:
        self.cancelled = False
        self.error: BaseException | None = None
        self._callback = callback
        self._open: list[_Phase] = []
        self._fraction = 0.0
        self._lock = Lock()

    def cancel(self) -> None:
        """Stop the build at its next step."""
        self.cancelled = True

    def start(self, name: str, steps: int) -> None:
        """A phase of ``steps`` steps begins inside the ones that are open."""
        with self._lock:
            self._open.append(_Phase(name, max(steps, 1)))
        self._report(name)

    def step(self, name: str, step: int) -> bool:
        """Step number ``step`` of a phase is done; the answer says whether to go on."""
        with self._lock:
            for phase in self._open:
                if phase.name == name:
                    phase.done = step + 1
        self._report(name)
        return not self.cancelled

    def finish(self, name: str) -> None:
        """A phase is over, whether or not all its steps were done."""
        with self._lock:
            self._open = [phase for phase in self._open if phase.name != name]

    def _report(self, name: str) -> None:
        if self._callback is None or self.cancelled:
            return
        with self._lock:
            self._fraction = max(self._fraction, fraction((phase.done, phase.steps) for phase in self._open))
        try:
            self.cancelled = self._callback(name, self._fraction) is False
        except BaseException as error:  # noqa: BLE001  # raised again when the native code has returned
            self.error = error
            self.cancelled = True


def fraction(phases: Iterable[tuple[int, int]]) -> float:
    """Return how much is done of nested phases ``(steps done, steps)``, outermost first; steps count alike."""
    total, share = 0.0, 1.0
    for done, steps in phases:
        total += share * done / steps
        share /= steps
    return min(total, 1.0)


def readable(text: str) -> str:
    """Return a builder's message without conditions, addresses and places in its own source."""
    text = "\n".join(line for line in text.splitlines() if _NOISE not in line)
    for pattern, words in _REWORDED:
        text = pattern.sub(words, text)
    return text.strip()


def describe(error: Any, domain: str) -> str:
    """Return the node, its operator and what is wrong with it, from an error of the ONNX parser."""
    name = error.node_name() or (f"node {error.node()}" if error.node() >= 0 else "the model")
    operator = "::".join(part for part in (domain, error.node_operator()) if part)
    reason = readable(error.desc()) or error.code().name.replace("_", " ").lower()
    return f"{printable(name, 60)} ({printable(operator, 60)}): {reason}" if operator else f"{name}: {reason}"


def listed(head: str, lines: Sequence[str], most: int = 10) -> str:
    """Return a message with its details: one on the same line, more as a list that ends with a count."""
    shown = [printable(line, _LINE) for line in lines[:most]]
    if len(lines) == 1:
        return f"{head}: {shown[0]}"
    rest = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n- ".join([f"{head} ({len(lines)}):", *shown, *rest])
