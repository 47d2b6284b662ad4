"""Options that several commands have: what each is called, takes, completes and says, written once.

A command lists them among its own, and gives what is different there: ``@flags.recipe(default="int8")``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from qexport.cli.common import demand_size
from qexport.cli.completion import TARGETS, complete_recipe, complete_target

CACHE_LIMIT = "QEXPORT_CACHE_LIMIT"
"""The variable of the environment that says how large the cache may be."""

PATH = click.Path(path_type=Path)
"""A file or folder; whoever opens it says whether it is there."""

output = partial(click.option, "-o", "--output", type=PATH)

# of models that are to be built
calib = partial(click.option, "--calib", type=click.Path(), metavar="DATA", help="Calibration data, as for build.")
evaluation = partial(
    click.option,
    "--eval",
    "evaluation",
    type=click.Path(),
    metavar="DATA",
    help="Held-out data, with labels where there is a task.",
)
recipe = partial(click.option, "--recipe", metavar="FILE", shell_complete=complete_recipe)
target = partial(
    click.option,
    "--target",
    metavar="NAME",
    shell_complete=complete_target,
    help=f"Backend: {', '.join(TARGETS)}.",
)

# of what is kept
cache_limit = partial(
    click.option,
    "--cache-limit",
    metavar="SIZE",
    envvar=CACHE_LIMIT,
    callback=demand_size,
    help="How large the cache may be, such as 5G; $QEXPORT_CACHE_LIMIT without it.  [default: 20G]",
)

# of folders that are run
threads = partial(
    click.option, "--threads", type=int, default=0, metavar="N", help="Threads; all processors when not given."
)
backend = partial(
    click.option,
    "--backend",
    metavar="NAME",
    help="ort-cpu, ort-cuda, tensorrt-rtx, tensorrt.  [default: what fits]",
)
draft_backend = partial(
    click.option, "--draft-backend", metavar="NAME", help="The same for the draft.  [default: what fits]"
)
max_tokens = partial(
    click.option,
    "--max-tokens",
    type=int,
    default=128,
    show_default=True,
    metavar="N",
    help="Most tokens of an output.",
)
temperature = partial(
    click.option,
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    metavar="T",
    help="0 takes the likeliest token.",
)
