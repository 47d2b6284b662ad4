"""``qexport certify``: is what comes out when a draft looks ahead what would have come out anyway."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, Unpack

import click

from qexport.cli import flags
from qexport.cli.common import make_console, print_json, shared_flags
from qexport.errors import GateFailed, UsageError, printable

_MOST = 1 << 20  # bytes of prompts


class Asked(TypedDict):
    """The options of ``certify`` that become its options in Python."""

    samples: int
    seeds: int
    seed: int
    rows: int
    length: int
    level: float
    threads: int
    backend: str | None
    draft_backend: str | None


@click.command()
@click.argument("target", type=flags.PATH)
@click.option("--draft", type=flags.PATH, metavar="DIR", help="The draft; without one, copies alone are certified.")
@click.option(
    "--samples", type=int, metavar="N", default=2000, show_default=True, help="Samples of each joint distribution."
)
@click.option("--seeds", type=int, metavar="S", default=50, show_default=True, help="Experiments they are split into.")
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="The first seed.")
@click.option("--rows", type=int, metavar="N", default=32, show_default=True, help="Long texts of each batch.")
@click.option("--length", type=int, metavar="N", default=48, show_default=True, help="Tokens of each long text.")
@click.option(
    "--level", type=float, metavar="P", default=1e-3, show_default=True, help="Chance of a false alarm, in all."
)
@click.option("--prompts", type=flags.PATH, metavar="FILE", help="One prompt per line.  [default: eight of its own]")
@flags.threads()
@flags.backend()
@flags.draft_backend()
@flags.output(metavar="DIR", help="Folder for the certificate and the replay log.")
@shared_flags
def certify(
    target: Path,
    *,
    draft: Path | None,
    prompts: Path | None,
    output: Path | None,
    as_json: bool,
    **asked: Unpack[Asked],
) -> None:
    """Prove that TARGET says with a draft what it says without.

    TARGET and the draft are folders that export or build wrote. Samples of the real loop are held against exact
    distributions, greedy output against plain decoding, and every decision of some long texts is recomputed. Where a
    check fails, the certificate says which, and the exit code is 7.
    """
    from qexport.cli.progress import RichProgress
    from qexport.runtime.certifying.certify import CertifyOptions
    from qexport.runtime.certifying.certify import certify as run_certify
    from qexport.runtime.certifying.prompts import TEXTS
    from qexport.runtime.certifying.publish import publish_certificate

    texts = TEXTS if prompts is None else _read(prompts)
    found = run_certify(target, draft, CertifyOptions(**asked), texts, RichProgress().stage)
    if output is not None:
        publish_certificate(found, output, [path for path in (target, draft) if path is not None])
    certificate = found.certificate
    if as_json:
        print_json(certificate.document())
    else:
        for line in certificate.lines():
            make_console().print(printable(line))
    if not certificate.passed:
        if as_json:
            raise click.exceptions.Exit(GateFailed.exit_code)
        names = ", ".join(check.name for check in certificate.failed)
        what = f"{len(certificate.failed)} of {len(certificate.checks)} checks fail: {names}"
        hint = None if output else "-o DIR writes every decision down"
        raise GateFailed(what, where=str(target), hint=hint)


def _read(path: Path) -> tuple[str, ...]:
    """The lines that are not empty."""
    from qexport.safe_io import read_text

    texts = tuple(line.rstrip("\r") for line in read_text(path, limit=_MOST).split("\n") if line.strip())
    if not texts:
        raise UsageError("there are no prompts in it", where=str(path), hint="write a text in each line")
    return texts
