"""The exception tree: one class per exit code, every message says where, what, and what to do."""

from __future__ import annotations


class QexportError(Exception):
    """A failure a person can act on.

    Args:
        what: What is wrong; lower case, no full stop, values in ``repr``.
        where: The file, node, tensor or step it concerns.
        hint: What to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" ({self.hint})" if self.hint else ""
        return printable(f"{place}{self.what}{advice}")


class UsageError(QexportError):
    """The command line, the recipe or a Python argument is wrong."""

    exit_code = 2


class ModelInvalid(QexportError):
    """The model breaks the ONNX rules or this tool's."""

    exit_code = 3


class UnsafeInput(QexportError):
    """The input tries to reach outside its folder, or to run code."""

    exit_code = 4


class DataInvalid(QexportError):
    """Calibration or evaluation data does not fit the model."""

    exit_code = 5


class BuildFailed(QexportError):
    """A pass, a proof of equality or the engine builder refused the model."""

    exit_code = 6


class GateFailed(QexportError):
    """The result is worse than the gates allow; nothing was published."""

    exit_code = 7


class EnvironmentMismatch(QexportError):
    """A package, driver or device is missing or of the wrong version."""

    exit_code = 8


class ResourceExhausted(QexportError):
    """Disk, memory, time or a size limit ran out."""

    exit_code = 9


class Busy(QexportError):
    """Another process holds the lock."""

    exit_code = 10


class IntegrityError(QexportError):
    """A digest does not match what was recorded."""

    exit_code = 11


class NativeCrash(QexportError):
    """A child process running native code died by a signal."""

    exit_code = 12


def printable(text: str, limit: int = 500) -> str:
    """Escape control and direction characters of names that come from a model; cut after ``limit``."""
    safe = "".join(
        c if c == "\n" or (c.isprintable() and not "\u202a" <= c <= "\u2069") else f"\\u{ord(c):04x}" for c in text
    )
    return safe if len(safe) <= limit else f"{safe[:limit]}…"
