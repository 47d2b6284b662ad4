"""Progress on stderr: bars with the time that is left on a terminal, one plain line per stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qexport.cli.common import make_console
from qexport.cli.supervise import tell_stage
from qexport.exporter.options import Advance


class RichProgress:
    """Tells stages on a console; stdout is never touched.

    Args:
        console: Where to draw; stderr when not given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or make_console(stderr=True)
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._start = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,
        )
        self._depth = 0

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Show one stage until the block ends; stages may nest."""
        tell_stage(name)
        if not self._live:
            amount = "" if total is None else f" ({total})"
            line = f"[{time.monotonic() - self._start:7.1f} s] {name}{amount}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            yield _nothing
            return
        self._depth += 1
        self._bars.start()
        task = self._bars.add_task(name, total=total)

        def advance(n: int = 1) -> None:
            self._bars.advance(task, n)

        try:
            yield advance
        finally:
            self._bars.remove_task(task)
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()


def _nothing(n: int = 1) -> None:
    """A line was printed when the stage began; nothing to add."""
