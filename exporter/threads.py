"""How many threads matrix products take: one, wherever samples or layers run side by side already.

Threads times threads is worse than either: with another process on the machine, the ranges of a sentence encoder took
18 s instead of 3.
"""

from __future__ import annotations

from types import TracebackType

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from qexport.passes.base import Pass
from qexport.passes.pipeline import Step


class OneThread:
    """A pipeline observer, and a context that gives the threads back when it ends."""

    def __init__(self) -> None:
        self._limits: threadpool_limits | None = None

    def __enter__(self) -> OneThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def before(self, name: str, step: Pass, model: ir.Model) -> None:
        """Limit what numpy multiplies with, but for passes that work through layers in turn."""
        if not step.one_at_a_time:
            self._limits = threadpool_limits(limits=1, user_api="blas")

    def after(self, step: Step, model: ir.Model) -> None:
        """Give the threads back."""
        self._release()

    def _release(self) -> None:
        if self._limits is not None:
            self._limits.restore_original_limits()
        self._limits = None
