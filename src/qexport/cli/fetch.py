"""``qexport fetch``: a model from a hub, every byte held against its digest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import click

from qexport.cli import flags
from qexport.cli.common import default_cache, make_console, make_table, print_json, shared_flags
from qexport.errors import printable

if TYPE_CHECKING:
    from qexport.exporter.hub.fetch import Fetched

_FOLDER = click.Path(path_type=Path)


class Asked(TypedDict):
    """The options of ``fetch`` as click hands them over."""

    output: Path
    update: bool
    folder: Path | None
    no_cache: bool
    cache_limit: int | None
    as_json: bool


@click.command()
@click.argument("name", metavar="REPO[@REVISION]")
@click.option("-o", "--output", type=_FOLDER, metavar="DIR", required=True, help="Folder of the result.")
@click.option("--update", is_flag=True, help="Follow a branch that has moved since DIR was fetched.")
@click.option("--cache", "folder", type=_FOLDER, metavar="DIR", help="Where to keep what has arrived until all has.")
@click.option("--no-cache", is_flag=True, help="Keep nothing: what is interrupted begins again.")
@flags.cache_limit()
@shared_flags
def fetch(name: str, **asked: Unpack[Asked]) -> None:
    """Fetch a model from a hub, the only command that connects to anything.

    HF_ENDPOINT is the hub's address and HF_TOKEN, if it is set, what it knows you by. Settings, tokenizer and
    safetensors are taken, nothing else; models that bring code or have pickles alone are refused. Each file must have
    the digest that the hub lists. What is interrupted goes on where it was. DIR/qexport.lock.json says which commit
    it is, and a second fetch into DIR takes the same one.
    """
    from qexport.cli.progress import RichProgress
    from qexport.exporter.hub.connection import Hub
    from qexport.exporter.hub.fetch import fetch as run_fetch
    from qexport.safe_io.caches import LIMIT, Cache

    hub = Hub(os.environ.get("HF_ENDPOINT"), os.environ.get("HF_TOKEN"))
    cache = Cache(None if asked["no_cache"] else asked["folder"] or default_cache(), asked["cache_limit"] or LIMIT)
    found = run_fetch(name, asked["output"], hub, cache=cache, update=asked["update"], progress=RichProgress())
    if asked["as_json"]:
        print_json(_plain(found))
        return
    _print(found)


def _plain(found: Fetched) -> dict[str, Any]:
    told = {**found.pinned.as_dict(), "schema": "qexport.fetch/1"}
    return {**told, "folder": str(found.folder), "warnings": list(found.warnings)}


def _print(found: Fetched) -> None:
    from qexport.exporter.outcome.summary import human_bytes

    console, pinned = make_console(), found.pinned
    console.print(make_table(("file", "size"), [(file.name, human_bytes(file.bytes)) for file in pinned.files]))
    for warning in found.warnings:
        console.print(printable(f"warning: {warning}"))
    total = human_bytes(sum(file.bytes for file in pinned.files))
    console.print(printable(f"{pinned.repo}@{pinned.commit}: {len(pinned.files)} files, {total}, in {found.folder}"))
