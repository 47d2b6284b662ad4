"""``qexport check``: would this model be let in."""

from __future__ import annotations

from pathlib import Path

import click

from qexport.cli.common import make_console, print_json, shared_flags


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@shared_flags
def check(model: Path, *, as_json: bool) -> None:
    """Check whether MODEL would be let in.

    MODEL is an .onnx file or a Hugging Face folder. Structure, sizes, external data and quantizers are checked;
    nothing is run.
    """
    from qexport.errors import printable
    from qexport.exporter.load import load_source
    from qexport.exporter.looking.inspect import facts_of

    source = load_source(model)
    facts = facts_of(source.model)
    if as_json:
        told = {name: getattr(facts, name) for name in ("opsets", "nodes", "parameters", "quantized")}
        print_json(
            {"schema": "qexport.check/1", "ok": True, "path": str(model), **told, "warnings": list(source.notes)}
        )
        return
    opset = facts.opsets.get("", 0)
    quantized = ", quantized" if facts.quantized else ""
    line = f"ok: {model}: opset {opset}, {facts.nodes} nodes, {facts.parameters} parameters{quantized}"
    make_console().print(printable(line))
    for note in source.notes:
        make_console().print(printable(f"warning: {note}"))
