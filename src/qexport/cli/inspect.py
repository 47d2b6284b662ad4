"""``qexport inspect``: what a model is made of, and in which precision it computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from qexport.cli.common import make_console, make_table, print_json, shared_flags
from qexport.errors import UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from qexport.exporter.looking.inspect import Summary
    from qexport.exporter.looking.sparsity import Zeros


class Asked(TypedDict):
    """The options of ``inspect`` as click hands them over."""

    layers: bool
    sparsity: bool
    tree: bool
    depth: int | None
    as_json: bool


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="List every layer that multiplies, with its types.")
@click.option("--sparsity", is_flag=True, help="List the zeros of every weight as stored, and whether they are 2:4.")
@click.option(
    "--tree", is_flag=True, help="Show the blocks that the names of nodes tell of, in place of the operators."
)
@click.option("--depth", type=click.IntRange(min=1), metavar="N", help="Levels of the tree; 3 when not given.")
@shared_flags
def inspect(model: Path, **asked: Unpack[Asked]) -> None:
    """Summarize what MODEL is made of.

    MODEL is an .onnx file or a Hugging Face folder. Shows inputs and outputs, operators, parameters, and in which
    precision its layers multiply.
    """
    from qexport.exporter.load import load_model
    from qexport.exporter.looking.inspect import inspect_model
    from qexport.exporter.looking.sparsity import zeros_of
    from qexport.exporter.looking.tree import DEPTH, lines, name_tree

    if asked["depth"] is not None and not asked["tree"]:
        raise UsageError("--depth goes with --tree")
    loaded = load_model(model)
    found, zeros = inspect_model(loaded), zeros_of(loaded) if asked["sparsity"] else []
    tree = name_tree(loaded, found.layers, asked["depth"] or DEPTH) if asked["tree"] else ()
    if asked["as_json"]:
        more = {"sparsity": [{**row.model_dump(mode="json"), "two_of_four": row.two_of_four} for row in zeros]}
        blocks = {"tree": [branch.model_dump(mode="json") for branch in tree]}
        extra = (more if asked["sparsity"] else {}) | (blocks if asked["tree"] else {})
        print_json({"schema": "qexport.inspect/1", **found.model_dump(mode="json"), **extra})
        return
    opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in found.opsets.items())
    console = make_console()
    console.print(printable(f"{model}: opset {opsets}; {found.nodes} nodes, {found.parameters} parameters"))
    if asked["tree"]:
        click.echo("\n".join(lines(tree)))
    else:
        _print(console, found)
    if asked["layers"]:
        rows = [(layer.node, layer.op, layer.activation, layer.weight) for layer in found.layers]
        console.print(make_table(("layer", "operator", "activation", "weight"), rows))
    if asked["sparsity"]:
        header = ("tensor", "layer", "operator", "stored as", "shape", "zeros", "groups of 4 with 2", "2:4")
        console.print(make_table(header, map(_row, zeros)))
        console.print(f"{sum(row.two_of_four for row in zeros)} of {len(zeros)} weights are 2:4")


def _print(console: Console, found: Summary) -> None:
    from qexport.exporter.outcome.summary import human_bytes

    ports = [("input", port) for port in found.inputs] + [("output", port) for port in found.outputs]
    rows = [(kind, port.name, port.dtype, _shape(port.shape)) for kind, port in ports]
    console.print(make_table(("", "name", "type", "shape"), rows))
    console.print(make_table(("operator", "count"), found.ops.items()))
    console.print(make_table(("stored as", "bytes"), ((k, human_bytes(v)) for k, v in found.weight_bytes.items())))
    console.print(make_table(("activation x weight", "layers"), found.precision.items()))


def _row(row: Zeros) -> tuple[str, ...]:
    groups = "4 does not divide" if row.groups is None else _percent(row.groups)
    where = (row.tensor, row.node, row.op, row.stored, _shape(row.shape))
    return (*where, _percent(row.zeros), groups, "yes" if row.two_of_four else "no")


def _percent(share: float) -> str:
    """A share in percent, cut and not rounded, so that 100 % is all."""
    return f"{int(1000 * share) / 10:.1f} %"


def _shape(shape: tuple[int | str, ...] | None) -> str:
    return "unknown" if shape is None else f"[{', '.join(map(str, shape))}]"
