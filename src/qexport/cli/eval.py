"""``qexport eval``: what a decoder is worth on text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from qexport.cli import flags
from qexport.cli.common import make_console, print_json, shared_flags
from qexport.errors import printable

if TYPE_CHECKING:
    from qexport.exporter.evaluate import Evaluated


class Asked(TypedDict):
    """The options of ``eval`` that become its options in Python."""

    window: int | None
    stride: int | None
    batch: int
    chunk: int
    max_tokens: int | None
    threads: int


@click.command("eval")
@click.argument("model", type=flags.PATH)
@click.option("--task", metavar="NAME", default="ppl", show_default=True, help="What to judge: ppl, the perplexity.")
@click.option("--text", type=flags.PATH, metavar="FILE", required=True, help="Plain text in UTF-8.")
@click.option("--window", type=int, metavar="N", help="Tokens that the model sees at most.  [default: 1024 or fewer]")
@click.option("--stride", type=int, metavar="N", help="Tokens between two windows.  [default: a window]")
@click.option("--batch", type=int, metavar="N", default=1, show_default=True, help="Windows that are read together.")
@click.option("--chunk", type=int, metavar="N", default=256, show_default=True, help="Tokens that are read at a time.")
@click.option("--max-tokens", type=int, metavar="N", help="Take so many tokens from the front of the text.")
@flags.threads()
@shared_flags
def eval(model: Path, *, task: str, text: Path, as_json: bool, **asked: Unpack[Asked]) -> None:
    """Judge the decoder MODEL by a text.

    MODEL is a folder with model.onnx and tokenizer.json, as export and build publish it, or the .onnx file in it. The
    text is cut into windows that are read from their start. With a stride below the window, what two windows share is
    context in the second one and judged once.
    """
    from qexport.cli.progress import RichProgress
    from qexport.exporter.evaluate import EvalOptions, evaluate

    found = evaluate(model, task=task, text=text, options=EvalOptions(**asked, progress=RichProgress()))
    if as_json:
        print_json(found)
        return
    make_console().print(printable(_told(found)))


def _told(found: Evaluated) -> str:
    lines = [
        f"{found.model} ({found.layout}) on {found.text}",
        f"perplexity {found.perplexity:.4f}: {found.nats_per_token:.4f} nats per token",
        f"{found.tokens} tokens judged in {found.windows} windows of {found.window}, stride {found.stride}",
        f"{found.seconds:.1f} s, {found.tokens_per_second:.0f} tokens/s",
    ]
    if found.bits_per_byte is not None:
        lines[1] += f", {found.bits_per_byte:.4f} bits per byte"
    return "\n".join(lines)
