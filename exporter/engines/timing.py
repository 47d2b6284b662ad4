"""What a builder has measured of its kernels: given to the next build on the same GPU, which then measures less.

TensorRT calls it a timing cache. TensorRT-RTX chooses kernels where the engine runs; its functions of that name do
nothing.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from qexport.errors import QexportError
from qexport.safe_io import read_bytes, write_bytes

MEASURING = ("tensorrt",)
"""Builders that measure kernels."""

Timings = Literal["", "new", "used", "refused"]
"""What became of timings: not asked for, there were none, the builder took them, it did not."""

_LIBRARY = (RuntimeError, TypeError, ValueError, AttributeError)  # how bindings say that the library returned nothing


def open_timings(config: Any, path: Path | None) -> Timings:
    """Give a builder's configuration the timings in a file, or empty ones; it never fails.

    Args:
        config: An ``IBuilderConfig``.
        path: The file, which need not exist; ``None`` for none.
    """
    if path is None or not hasattr(config, "create_timing_cache"):
        return ""
    content = b""
    if path.exists():
        with suppress(QexportError):
            content = read_bytes(path)
    if content and _take(config, content):
        return "used"
    _take(config, b"")
    return "refused" if content else "new"


def keep_timings(config: Any, path: Path | None) -> None:
    """Write what the builder knows now to the file, if it tells; it never fails."""
    if path is None or not hasattr(config, "get_timing_cache"):
        return
    with suppress(*_LIBRARY, QexportError):
        content = bytes(config.get_timing_cache().serialize())
        if content:
            write_bytes(path, content)


def _take(config: Any, content: bytes) -> bool:
    """Whether the library takes timings, those of this version and GPU alone."""
    with suppress(*_LIBRARY):
        timings = config.create_timing_cache(content)
        return timings is not None and bool(config.set_timing_cache(timings, False))
    return False
