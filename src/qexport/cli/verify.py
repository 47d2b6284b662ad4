"""``qexport verify``: is an artefact what was written, and do the same inputs give it again."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from qexport.cli.common import make_console, make_table, print_json, shared_flags
from qexport.errors import IntegrityError, printable

if TYPE_CHECKING:
    from qexport.exporter.outcome.intact import FileCheck
    from qexport.exporter.replay import Replayed


DIGITS = 16  # of a digest, in a table


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option(
    "--model", type=click.Path(), metavar="PATH", help="Where the source is now; where it was, when not given."
)
@click.option("--calib", type=click.Path(), metavar="DATA", help="Where the calibration data is now, likewise.")
@click.option(
    "--eval", "evaluation", type=click.Path(), metavar="DATA", help="Where the evaluation data is now; not needed."
)
@click.option("--files", is_flag=True, help="Compare files with the manifest, and build nothing.")
@shared_flags
def verify(
    folder: str, *, model: str | None, calib: str | None, evaluation: str | None, files: bool, as_json: bool
) -> None:
    """Replay the receipt of DIR: same inputs, same bytes.

    DIR is a folder that build wrote. Its files are compared with the manifest, the inputs with what the build was
    given; then the model is built again, in a folder for that alone, and compared byte by byte. What differs is exit
    code 11. Reports and engines hold measured times and are not built again.
    """
    from qexport.cli.progress import RichProgress
    from qexport.exporter.replay import verify as run_verify

    found = run_verify(folder, model=model, calib=calib, eval=evaluation, files=files, progress=RichProgress())
    if as_json:
        print_json(found)
        if not found.same:
            raise click.exceptions.Exit(IntegrityError.exit_code)
        return
    _print(found)
    if not found.same:
        names = ", ".join(file.name for file in found.files if file.verdict not in ("intact", "same"))
        hint = "the notes say what is different here" if found.notes else "compare both builds with qexport diff"
        raise IntegrityError(f"built again, it is not the same: {names}", where=folder, hint=hint)


def _print(found: Replayed) -> None:
    console = make_console()
    rows = [(file.name, file.verdict, _short(file.digest), _instead(file)) for file in found.files]
    header = ("file", "", "manifest", "found instead")
    shown = len(header) if any(row[-1] for row in rows) else len(header) - 1
    console.print(make_table(header[:shown], [row[:shown] for row in rows]))
    for note in found.notes:
        console.print(printable(f"note: {note}"))
    counts = Counter(file.verdict for file in found.files)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    how = "built again" if found.replayed else "files alone"
    console.print(printable(f"{found.folder}: {told}; {how} in {found.seconds:.1f} s"))


def _instead(file: FileCheck) -> str:
    return "" if file.found == file.digest else _short(file.found)


def _short(digest: str) -> str:
    """Enough of a digest to tell it from others; --json has all of it."""
    kind, colon, number = digest.partition(":")
    return kind + colon + number[:DIGITS]
