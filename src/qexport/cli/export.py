"""``qexport export``: a trained model in, one portable graph out, proven to compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, Unpack

import click

from qexport.cli import flags
from qexport.cli.common import make_console, print_json, shared_flags


class Asked(TypedDict):
    """The options of ``export`` that become its options in Python."""

    dtype: str | None
    task: str | None
    via: str
    inputs: tuple[str, ...]
    data: Path | None
    text: Path | None
    layout: str
    python: Path | None
    allow_pickle: bool


@click.command()
@click.argument("source", type=click.Path())
@flags.output(metavar="DIR", required=True, help="Folder of the result.")
@click.option("--dtype", metavar="TYPE", help="float32, float16 or bfloat16; float32 for folders when not given.")
@click.option(
    "--task", metavar="NAME", help="The head, such as embedding or classification; the saved one if not given."
)
@click.option("--via", metavar="WHO", default="auto", show_default=True, help="Who writes it: qexport, torch, optimum.")
@click.option(
    "--input", "inputs", multiple=True, metavar="SPEC", help="An input of a torch module: x:float32[batch,3,32,32]."
)
@click.option("--data", type=flags.PATH, metavar="FILE", help="Real inputs to verify on.")
@click.option("--text", type=flags.PATH, metavar="FILE", help="Real text to verify on.")
@click.option("--layout", metavar="NAME", default="cached", show_default=True, help="Of decoders: cached, scoring.")
@click.option("--python", type=flags.PATH, metavar="FILE", help="For --via optimum: the interpreter that has it.")
@click.option("--allow-pickle", is_flag=True, help="Read checkpoints that are pickles, as numbers alone.")
@shared_flags
def export(source: str, *, output: Path, as_json: bool, **asked: Unpack[Asked]) -> None:
    """Write SOURCE as one portable graph, with the proof.

    SOURCE is a Hugging Face folder (config.json and safetensors), an .onnx file of another exporter, or
    module:callable that returns a torch module. The result is a folder with model.onnx, tokenizer and settings, and a
    manifest. What was written is run beside the source first; where they differ, nothing is published.
    """
    from qexport.cli.progress import RichProgress
    from qexport.exporter.export import export as run_export
    from qexport.exporter.options import ExportOptions
    from qexport.exporter.outcome.export_summary import export_lines

    result = run_export(source, output=output, options=ExportOptions(**asked, progress=RichProgress()))
    if as_json:
        print_json(result)
        return
    console = make_console()
    for line in export_lines(result):
        console.print(line)
