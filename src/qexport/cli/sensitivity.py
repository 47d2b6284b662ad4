"""``qexport sensitivity``: which activations and layers cannot bear 8 bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Unpack

import click

from qexport.cli import flags
from qexport.cli.common import make_console, make_table, print_json, shared_flags
from qexport.cli.questions import Asked, question_about

if TYPE_CHECKING:
    from rich.console import Console

    from qexport.exporter.precision.sensitivity import Measured, Sensitivity


@click.command()
@click.argument("model", type=click.Path())
@flags.calib(required=True)
@flags.evaluation()
@flags.recipe(default="int8", show_default=True, help="A recipe that quantizes.")
@flags.target()
@click.option("--samples", type=int, default=64, show_default=True, help="How many samples to measure on.")
@flags.output(metavar="DIR", help="Folder for plots and JSON.")
@flags.cache_limit()
@shared_flags
def sensitivity(model: str, **asked: Unpack[Asked]) -> None:
    """Tell which parts of MODEL lose what in 8 bits.

    First every activation is quantized but one group at a time, as in Bondarenko et al. 2021; then every layer alone
    is, measured and estimated. With -o, plots (PNG, SVG) and the numbers go to a folder.
    """
    from qexport.exporter.precision.publish import publish_sensitivity
    from qexport.exporter.precision.sensitivity import analyse

    question = question_about(model, asked)
    output = asked["output"]
    found = analyse(question) if output is None else publish_sensitivity(question, output)
    if asked["as_json"]:
        print_json(found)
        return
    _print(make_console(), found)


def _print(console: Console, found: Sensitivity) -> None:
    lost = ("lost",) if found.task else ()
    if found.activations:
        console.print(f"all activations in 8 bits but one group ({found.samples} samples of {found.data})")
        groups = [(row.left_out, row.tensors, *_numbers(row)) for row in found.activations]
        console.print(make_table(("left in float", "tensors", "dB", "cosine", "worst", *lost), groups))
    console.print(
        "one layer in 8 bits, the most sensitive first: SQNR of the output, measured and estimated, and its own"
    )
    layers = [
        (
            *_numbers(row),
            _decibel(row.estimate),
            _fixed(row.layer_sqnr),
            round(row.bytes / 1e3),
            f"{row.share:.1%}",
            row.node,
        )
        for row in found.layers
    ]
    console.print(make_table(("dB", "cosine", "worst", *lost, "est.", "own", "kB", "time", "layer"), layers))
    if found.task:
        console.print(f"lost: of {found.task}")
    if found.correlation is not None:
        console.print(f"rank correlation of estimate and measurement: {found.correlation:.2f}")
    for warning in found.warnings:
        console.print(f"warning: {warning}")


def _numbers(row: Measured) -> tuple[str, ...]:
    lost = () if row.drop is None else (f"{row.drop:+.2f}",)
    return (f"{row.sqnr:.1f}", f"{row.cosine_mean:.4f}", f"{row.cosine_worst:.4f}", *lost)


def _decibel(error: float | None) -> str:
    return "" if error is None else _fixed(-10 * math.log10(max(error, 1e-20)))


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
