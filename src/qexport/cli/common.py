"""What every command shares: four flags, the one object on stdout, the cache, console and tables."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import click

from qexport.cli.supervise import MEMORY, TIME, parse_bytes
from qexport.errors import printable
from qexport.safe_io import finite

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console
    from rich.table import Table

FILE_WIDTH = 200  # characters

F = TypeVar("F", bound=Callable[..., Any])


def shared_flags(command: F) -> F:
    """Add ``--json``, ``--debug`` and limits, which ``main`` reads from the command line itself."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Print the traceback of a failure.")(
        command
    )
    command = click.option(
        TIME,
        metavar="SECONDS",
        type=click.FloatRange(0, min_open=True),
        expose_value=False,
        help="End it, with exit code 9, when it takes longer.",
    )(command)
    command = click.option(
        MEMORY,
        metavar="SIZE",
        callback=demand_size,
        expose_value=False,
        help="The same when it takes more memory, such as 800M or 4G.  [default: nine tenths of what there is]",
    )(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")(
        command
    )


def demand_size(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """The callback of options that take a size; ``None`` where none was given."""
    found = None if text is None else parse_bytes(text)
    if text is not None and found is None:
        raise click.BadParameter(f"{text!r} is no size, expected such as 800M or 4G", context, option)
    return found


def default_cache() -> Path | None:
    """Where builds keep things: ``$XDG_CACHE_HOME/qexport``, ``~/.cache/qexport`` where that is no absolute path.

    ``None`` for somebody who has no home.
    """
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if told.is_absolute():
        return told / "qexport"
    home = Path(os.path.expanduser("~"))
    return home / ".cache" / "qexport" if home.is_absolute() else None


def print_json(value: BaseModel | dict[str, Any]) -> None:
    """Print one object as one line of plain ASCII, so that any file name and any terminal will do."""
    plain = value if isinstance(value, dict) else value.model_dump(mode="json", by_alias=True)
    click.echo(json.dumps(finite(plain), allow_nan=False))


def make_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is; rich minds NO_COLOR, TERM and whether it is a terminal.

    Where it is none, lines end with their last letter, and tables may be as wide as the names in them if nobody says
    how wide it is.
    """
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.file = cast("IO[str]", _Trimmed(console.file))
        if "COLUMNS" not in os.environ:
            console.width = FILE_WIDTH
    return console


class _Trimmed:
    """A stream without the spaces that tables are filled up with."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the lines."""
        return self._stream.write(re.sub(r" +(?=\n)", "", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> Table:
    """Return a table of plain cells; names that come from a model or a file system are escaped."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(str(cell)), overflow="fold") for cell in row))
    return table
