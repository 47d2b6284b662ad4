"""``qexport cache``: what builds keep for the next one, whether it is sound, and how to be rid of it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qexport.cli import flags
from qexport.cli.common import default_cache, demand_size, make_console, make_table, print_json, shared_flags
from qexport.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from qexport.safe_io import Cache, Kept

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_FOLDER = click.option(
    "--cache", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Another folder than the usual one."
)


@click.group()
def cache() -> None:
    """List, check or remove what builds keep for the next one.

    It may go at any time: a build then measures again. Files that are none of qexport's are never touched.
    """


@cache.command()
@_FOLDER
@shared_flags
def ls(*, folder: Path | None, as_json: bool) -> None:
    """List what is kept, the last used first."""
    _tell(_open(folder).entries(), as_json=as_json)


@cache.command()
@_FOLDER
@shared_flags
def verify(*, folder: Path | None, as_json: bool) -> None:
    """Read everything that is kept; what is not as it was written is exit code 11."""
    found = _open(folder).verify()
    bad = [entry for entry in found if entry.problem]
    if bad:
        named = "; ".join(f"{entry.path.name}: {entry.problem}" for entry in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        hint = "a build passes over them; to remove them: qexport cache prune"
        what = f"{len(bad)} of {len(found)} are of no use: {named}{more}"
        raise IntegrityError(what, where=str(bad[0].path.parent), hint=hint)
    _tell(found, as_json=as_json)


@cache.command()
@_FOLDER
@click.option("--older-than", metavar="AGE", help="What was not used for so long, such as 30d or 12h.")
@click.option(
    "--max-bytes",
    metavar="SIZE",
    envvar=flags.CACHE_LIMIT,
    callback=demand_size,
    help="The least recently used until so much is left, such as 1G.  [default: what builds keep to]",
)
@click.option("--all", "everything", is_flag=True, help="All of it.")
@shared_flags
@click.pass_context
def prune(
    context: click.Context,
    *,
    folder: Path | None,
    older_than: str | None,
    max_bytes: int | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Remove what is of no use, and more where that is asked for; what a build uses at this moment stays."""
    typed = context.get_parameter_source("max_bytes") is ParameterSource.COMMANDLINE
    if everything and (older_than or typed):
        raise UsageError("--all excludes --older-than and --max-bytes")
    age = None if older_than is None else _parse_age(older_than)
    opened = _open(folder)
    if not everything:
        removed = opened.prune(max_bytes, age)
    else:
        removed = tuple(entry for entry in opened.entries() if opened.remove(entry))
    _tell(removed, as_json=as_json, word="removed")


def _open(folder: Path | None) -> Cache:
    from qexport.safe_io import Cache

    return Cache(folder or default_cache())


def _parse_age(text: str) -> float:
    """Seconds of an age such as 30d; ``UsageError`` where it is none."""
    told = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if told is None:
        raise UsageError(f"--older-than {text!r} is no age", hint="write it as 90s, 45m, 12h, 30d or 4w")
    return float(told[1]) * _SECONDS[told[2]]


def _tell(found: Sequence[Kept], *, as_json: bool, word: str = "in all") -> None:
    from qexport.exporter.outcome.summary import human_bytes

    total = sum(entry.bytes for entry in found)
    if as_json:
        print_json({"schema": "qexport.cache/1", "entries": [_plain(entry) for entry in found], "bytes": total})
        return
    console, now = make_console(), time.time()
    rows = [
        (entry.kind or "former", entry.key, human_bytes(entry.bytes), _age(now - entry.used), entry.problem)
        for entry in sorted(found, key=lambda entry: -entry.used)
    ]
    if rows:
        console.print(make_table(("kind", "key", "size", "unused for", ""), rows))
    console.print(f"{word}: {len(found)} files, {human_bytes(total)}")


def _plain(entry: Kept) -> dict[str, Any]:
    told = {name: getattr(entry, name) for name in ("kind", "key", "bytes", "used", "problem")}
    return {**told, "path": str(entry.path)}


def _age(seconds: float) -> str:
    """An age in the largest unit of which there is one."""
    whole = max(seconds, 0)
    unit = next((unit for unit in ("d", "h", "m") if whole >= _SECONDS[unit]), "s")
    return f"{whole / _SECONDS[unit]:.0f} {unit}"
