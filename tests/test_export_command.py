"""The flags of ``qexport export``."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from qexport.cli.export import export as command
from qexport.exporter.outcome.export_summary import same_share

FLAGS = {
    "-o": "out",
    "--dtype": "float16",
    "--task": "embedding",
    "--via": "torch",
    "--input": "x:float32[batch,3]",
    "--data": "samples.npz",
    "--text": "prose.txt",
    "--layout": "scoring",
    "--python": "python",
    "--allow-pickle": None,
    "--limit-memory": "4G",
    "--limit-time": "900",
    "--json": None,
    "--debug": None,
}


def test_the_documented_flags_are_the_flags_of_export():
    known = {name for option in command.params for name in option.opts if name.startswith("-")}
    assert known - {"--output"} == set(FLAGS)


@pytest.mark.parametrize("one", FLAGS)
@pytest.mark.parametrize("other", FLAGS)
def test_every_pair_of_flags_parses(one, other):
    given = [word for flag in {"-o": 0, one: 0, other: 0} for word in (flag, FLAGS[flag]) if word is not None]
    with click.Context(command) as context:
        command.parse_args(context, ["SOURCE", *given])
    assert context.params["output"] == Path("out")


def test_all_rows_are_told_as_all_and_less_is_never_rounded_up_to_it():
    assert same_share(1.0) == "the same at all rows"
    assert same_share(0.99999) == "the same at 99.9% of the rows or more"
