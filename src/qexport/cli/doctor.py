"""``qexport doctor``: what this machine can do."""

from __future__ import annotations

import click

from qexport.cli.common import make_console, print_json, shared_flags
from qexport.errors import EnvironmentMismatch


@click.command()
@shared_flags
def doctor(*, as_json: bool) -> None:
    """Tell what this machine can build.

    Shows versions, runtimes and targets, and what to install for the rest.
    """
    from qexport.exporter.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
        return
    console = make_console()
    console.print(f"qexport {found.version}, Python {found.python}, {found.system}, {found.cores} cores")
    console.print(f"CPU  {', '.join(found.cpu) or 'no int8 instructions known'}")
    console.print(f"GPU  {'; '.join(found.gpus) or 'none'}")
    for name, version in found.packages.items():
        console.print(f"  {name:<16} {version or '-'}")
    for target in found.targets:
        console.print(f"target {target.name:<14} {'ready' if target.ready else 'not ready'}: {target.note}")
    if found.problems:
        raise EnvironmentMismatch("; ".join(found.problems), where="doctor")
    console.print("ok")
