"""``qexport embed``: vectors of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from qexport.cli import flags
from qexport.cli.common import make_console, print_json, shared_flags
from qexport.errors import UsageError, printable

if TYPE_CHECKING:
    from qexport.exporter.embed import Embedded
    from qexport.runtime.embedding.options import EmbedOptions


class Asked(TypedDict):
    """The options of ``embed`` as click hands them over."""

    given: tuple[str, ...]
    texts: Path | None
    column: str | None
    output: Path | None
    pooling: str | None
    batch_tokens: int | None
    max_tokens: int | None
    too_long: str
    normalize: bool
    threads: int
    backend: str | None
    stats: bool
    as_json: bool


@click.command()
@click.argument("target", type=flags.PATH)
@click.option("--text", "given", multiple=True, metavar="TEXT", help="A text; may be given several times.")
@click.option(
    "--texts", type=flags.PATH, metavar="FILE", help="One text per line, or a column of .csv, .jsonl; - reads stdin."
)
@click.option("--column", metavar="NAME", help="Of a table.  [default: text, sentence, or both of a pair]")
@flags.output(metavar="FILE", help="Where vectors go: .npy or .jsonl.  [default: stdout]")
@click.option("--pooling", metavar="NAME", help="Of hidden states: mean, cls, max ...  [default: what the folder says]")
@click.option("--max-tokens", type=int, metavar="N", help="Cut texts after so many.  [default: what the folder says]")
@click.option("--too-long", metavar="WHAT", default="cut", show_default=True, help="Of longer texts: cut or refuse.")
@click.option("--normalize/--no-normalize", default=True, show_default=True, help="Scale vectors to length one.")
@click.option("--batch-tokens", type=int, metavar="N", help="Tokens of a batch at most.  [default: 512 a thread]")
@flags.threads()
@flags.backend()
@click.option("--stats", is_flag=True, help="Tell on stderr what it took.")
@shared_flags
def embed(target: Path, **asked: Unpack[Asked]) -> None:
    """Embed texts with the encoder TARGET.

    TARGET is a folder that export or build wrote. Texts are sorted by length and run in batches that waste little on
    padding; vectors come in the order of the texts, as lines of JSON unless -o names a file.
    """
    from qexport.cli.progress import RichProgress
    from qexport.exporter.embed import Asked as Choices
    from qexport.exporter.embed import embed_texts
    from qexport.exporter.embedding_files import read_texts

    if bool(asked["given"]) == (asked["texts"] is not None):
        raise UsageError("give texts either by --text or by --texts", hint="--texts - reads stdin")
    texts = list(asked["given"]) if asked["texts"] is None else read_texts(asked["texts"], asked["column"])
    choices = Choices(output=asked["output"], options=_options(asked), progress=RichProgress())
    found = embed_texts(target, texts, choices)
    if asked["as_json"]:
        print_json(found)
        return
    for text, vector in zip(texts, found.embeddings or (), strict=False):
        click.echo(json.dumps({"text": text, "embedding": vector}))
    if asked["stats"]:
        make_console(stderr=True).print(printable(_told(found)))


def _options(asked: Asked) -> EmbedOptions:
    from qexport.runtime.embedding.options import EmbedOptions
    from qexport.runtime.session import SessionOptions

    return EmbedOptions(
        batch_tokens=asked["batch_tokens"],
        max_tokens=asked["max_tokens"],
        too_long=asked["too_long"],
        pooling=asked["pooling"],
        normalize=asked["normalize"],
        session=SessionOptions(threads=asked["threads"], backend=asked["backend"]),
    )


def _told(found: Embedded) -> str:
    pooled = f"{found.output}, {found.pooling} pooling" if found.pooling else found.output
    lines = [
        f"{found.texts} texts to {found.width} numbers each by {found.backend}: {pooled}",
        f"{found.distinct} distinct texts, {found.tokens} tokens in {found.batches} batches, "
        f"{found.padding:.1%} padding; {found.cut} texts cut at {found.max_tokens} tokens",
        f"{found.seconds:.2f} s, {found.texts_per_second:.0f} texts/s; "
        f"{found.tokenizing:.2f} s to tokenize, {found.running:.2f} s in the model",
    ]
    return "\n".join(lines if found.cut else [line.partition("; 0 texts cut")[0] for line in lines])
