"""``qexport inspect``: what a model is made of, and in which precision it computes."""

from __future__ import annotations

from pathlib import Path

import click

from qexport.cli.common import make_console, make_table, print_json, shared_flags
from qexport.errors import printable


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="List every layer that multiplies, with its types.")
@shared_flags
def inspect(model: Path, *, layers: bool, as_json: bool) -> None:
    """Summarize what MODEL is made of.

    MODEL is an .onnx file or a Hugging Face folder. Shows inputs and outputs, operators, parameters, and in which
    precision its layers multiply.
    """
    from qexport.exporter.inspect import inspect_model
    from qexport.exporter.load import load_model
    from qexport.exporter.summary import human_bytes

    found = inspect_model(load_model(model))
    if as_json:
        print_json({"schema": "qexport.inspect/1", **found.model_dump(mode="json")})
        return
    opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in found.opsets.items())
    console = make_console()
    console.print(printable(f"{model}: opset {opsets}; {found.nodes} nodes, {found.parameters} parameters"))
    ports = [("input", port) for port in found.inputs] + [("output", port) for port in found.outputs]
    rows = [(kind, port.name, port.dtype, _shape(port.shape)) for kind, port in ports]
    console.print(make_table(("", "name", "type", "shape"), rows))
    console.print(make_table(("operator", "count"), found.ops.items()))
    console.print(make_table(("stored as", "bytes"), ((k, human_bytes(v)) for k, v in found.weight_bytes.items())))
    console.print(make_table(("activation x weight", "layers"), found.precision.items()))
    if layers:
        rows = [(layer.node, layer.op, layer.activation, layer.weight) for layer in found.layers]
        console.print(make_table(("layer", "operator", "activation", "weight"), rows))


def _shape(shape: tuple[int | str, ...] | None) -> str:
    return "unknown" if shape is None else f"[{', '.join(map(str, shape))}]"
