"""``qexport build``: a model in, a folder with the result and its proof out."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, Unpack

import click

from qexport.cli import flags
from qexport.cli.common import default_cache, make_console, print_json, shared_flags
from qexport.errors import UsageError


class Asked(TypedDict):
    """The options of ``build`` as click hands them over."""

    int8: bool
    recipe: str | None
    calib: str | None
    evaluation: str | None
    target: str | None
    settings: tuple[str, ...]
    max_drop: float | None
    output: Path | None
    cache: Path | None
    no_cache: bool
    cache_limit: int | None
    strict_cache: bool
    lock_timeout: float
    allow_nonfinite: bool
    as_json: bool


@click.command()
@click.argument("model", type=click.Path())
@click.option("--int8", is_flag=True, help="The same as --recipe int8, which is what happens without either.")
@flags.recipe(help="A recipe file, or the name of a shipped one (qexport recipe list).")
@flags.calib(help="Calibration data: npz, npy, safetensors, jsonl, csv, txt, folder of images.")
@flags.evaluation()
@flags.target()
@click.option("--set", "settings", multiple=True, metavar="STEP.OPTION=VALUE", help="Override one option; repeatable.")
@click.option("--max-drop", type=float, metavar="POINTS", help="Fail when the task metric loses more than this.")
@flags.output(metavar="DIR", help="Folder of the result; MODEL-RECIPE here when not given.")
@click.option("--cache", type=flags.PATH, metavar="DIR", help="Keep there what took long to find out.")
@click.option("--no-cache", is_flag=True, help="Neither read nor keep what took long to find out.")
@flags.cache_limit()
@click.option("--strict-cache", is_flag=True, help="Fail where the cache is damaged, instead of computing it again.")
@click.option(
    "--lock-timeout",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=3600.0,
    show_default=True,
    help="Fail, with exit code 10, after waiting so long for an equal build.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Let in weights that hold NaN or infinity.")
@shared_flags
def build(model: str, **asked: Unpack[Asked]) -> None:
    """Make MODEL small and fast, with the proof.

    MODEL is an .onnx file or a Hugging Face folder; it is never changed. The result is a folder with the model, the
    engine where the target has one, a manifest, and a report that compares float and result.
    """
    if asked["int8"] and asked["recipe"] is not None:
        raise UsageError("--int8 and --recipe exclude each other", hint="--int8 is --recipe int8")

    from qexport.cli.progress import RichProgress
    from qexport.exporter.build import build as run_build
    from qexport.exporter.options import BuildOptions
    from qexport.exporter.outcome.summary import summary_lines

    options = BuildOptions(
        target=asked["target"],
        set=asked["settings"],
        max_drop=asked["max_drop"],
        output=asked["output"],
        cache=None if asked["no_cache"] else asked["cache"] or default_cache(),
        cache_limit=asked["cache_limit"],
        strict_cache=asked["strict_cache"],
        lock_timeout=asked["lock_timeout"],
        allow_nonfinite=asked["allow_nonfinite"],
        progress=RichProgress(),
    )
    recipe = asked["recipe"] or "int8"
    result = run_build(model, recipe=recipe, calib=asked["calib"], eval=asked["evaluation"], options=options)
    if asked["as_json"]:
        print_json(result)
        return
    console = make_console()
    for line in summary_lines(result):
        console.print(line)
