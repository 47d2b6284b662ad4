from __future__ import annotations

import io

import pytest
from rich.console import Console

from qexport.cli.progress import RichProgress


def progress_on(*, terminal: bool, term: str = "xterm") -> str:
    stream = io.StringIO()
    environment = {"TERM": term}
    console = Console(file=stream, force_terminal=terminal, width=80, _environ=environment)
    progress = RichProgress(console)
    with progress.stage("calibrate", 3) as advance:
        advance()
        advance(2)
        with progress.stage("[bold]histograms"):
            pass
    with progress.stage("engine") as advance:
        advance()
    return stream.getvalue()


@pytest.mark.parametrize(("terminal", "term"), [(False, "xterm"), (True, "dumb")])
def test_progress_is_one_plain_line_per_stage_where_there_is_no_terminal(terminal: bool, term: str) -> None:
    lines = progress_on(terminal=terminal, term=term).splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["calibrate (3)", "[bold]histograms", "engine"]
    assert all("\x1b" not in line for line in lines)


def test_progress_draws_bars_on_a_terminal() -> None:
    drawn = progress_on(terminal=True)
    assert "calibrate" in drawn
    assert "3/3" in drawn
    assert "[bold]histograms" in drawn
    assert drawn.rstrip("\r").endswith("\x1b[2K\x1b[?25h")


def test_a_stage_that_fails_takes_its_bar_down() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=80, _environ={"TERM": "xterm"}))
    with pytest.raises(ZeroDivisionError), progress.stage("calibrate", 3):
        raise ZeroDivisionError
    before = stream.getvalue()
    with progress.stage("again"):
        pass
    assert "calibrate" not in stream.getvalue()[len(before) :]
