"""``qexport doctor``: what this machine can do."""

from __future__ import annotations

import click

from qexport.cli.common import default_cache, make_console, make_table, print_json, shared_flags
from qexport.errors import EnvironmentMismatch


@click.command()
@shared_flags
@click.pass_context
def doctor(context: click.Context, *, as_json: bool) -> None:
    """Tell what this machine can build.

    Checks Python, packages, GPU, driver, CPU, memory and folders, which of them go together, and says what to do about
    what is missing. A problem is exit code 8; a missing GPU is none.
    """
    from qexport.exporter.doctor.doctor import diagnose

    found = diagnose(default_cache())
    if as_json:
        print_json({"schema": "qexport.doctor/1", **found.model_dump(mode="json")})
        context.exit(EnvironmentMismatch.exit_code if found.problems else 0)
    console = make_console()
    console.print(f"qexport {found.version}")
    rows = [(check.name, check.status, check.found, check.advice) for check in found.checks]
    console.print(make_table(("check", "", "found", "advice"), rows))
    targets = [(target.name, "ready" if target.ready else "not ready", target.note) for target in found.targets]
    console.print(make_table(("target", "", "note"), targets))
    if found.problems:
        first = found.problems[0]
        what = "; ".join(f"{check.name}: {check.found}" for check in found.problems)
        raise EnvironmentMismatch(what, where="doctor", hint=first.advice)
    console.print("ok")
