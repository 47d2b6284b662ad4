"""Train a target and a draft for speculative decoding, on this Python's own library and on text files.

Both are Llamas with one tokenizer, and neither learns from the other. Examples:

    python samples/train_pair.py train --out build/pair --text stories.txt --minutes 90
    python samples/train_pair.py judge build/pair/target build/pair/draft --text stories.txt

``train`` leaves the Hugging Face folders ``target`` and ``draft``, float16; given again, it goes on where it stopped.
Needs ``pip install 'qexport[export]'``.
"""

from __future__ import annotations

import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from pair.corpus import Corpus, read_text, tokenize, train_tokenizer
from pair.evaluation import agreement, loss, windows
from pair.growth import grow
from pair.models import DRAFT, TARGET, Shape, build, load, parameters, save
from pair.training import Plan, State, Trainer, Windows
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

CONTEXTS = (128, 512, 1024)
JUDGED = 16384
GLANCE = 4096
"""Tokens of each kind: for the last word, and for a look on the way."""

existing = click.Path(exists=True, path_type=Path)
texts_option = click.option(
    "--text",
    "texts",
    multiple=True,
    type=existing,
    metavar="FILE",
    help="Text to learn from besides the library; its tail is held out. Given twice it counts twice.",
)


library_option = click.option(
    "--library",
    type=existing,
    default=sysconfig.get_paths()["stdlib"],
    metavar="FOLDER",
    help="Python sources to learn from [those of this Python].",
)


class ShapeType(click.ParamType):
    """A shape on the command line."""

    name = "shape"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Shape:
        """The shape, or a usage error."""
        try:
            return value if isinstance(value, Shape) else Shape.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True)
class Options:
    """What the command line of ``train`` says; see its help."""

    out: Path
    library: Path
    texts: tuple[Path, ...]
    tokenizer: Path | None
    vocabulary: int
    target: Shape
    draft: Shape
    grow_target: Path | None
    grow_draft: Path | None
    minutes: float | None
    tokens: int | None
    draft_minutes: float | None
    rate: float
    every: float
    seed: int


@click.group(help=__doc__)
def main() -> None:
    """The commands."""
    disable_progress_bar()


@main.command("train")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for all results.")
@library_option
@texts_option
@click.option("--tokenizer", type=existing, metavar="FILE", help="A tokenizer.json to use instead of training one.")
@click.option("--vocabulary", default=2048, show_default=True, help="Tokens of the tokenizer that is trained.")
@click.option("--target", type=ShapeType(), default=TARGET, show_default=True)
@click.option("--draft", type=ShapeType(), default=DRAFT, show_default=True)
@click.option("--grow-target", type=existing, metavar="FOLDER", help="A smaller model for the target to start from.")
@click.option("--grow-draft", type=existing, metavar="FOLDER", help="A smaller model for the draft to start from.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Budget of the target, by the clock.")
@click.option("--draft-minutes", type=click.FloatRange(0, min_open=True), help="Budget of the draft [an 8th of that].")
@click.option("--tokens", type=click.IntRange(1), help="Budget of either model in tokens instead of minutes.")
@click.option("--rate", default=3e-3, show_default=True, help="Highest learning rate; less for models that grew.")
@click.option("--every", default=300.0, show_default=True, help="Seconds between checkpoints.")
@click.option("--seed", default=0, show_default=True)
def train_command(**arguments: object) -> None:
    """Train both models, the draft first, then judge them."""
    options = Options(**arguments)  # type: ignore[arg-type]  # click has converted them
    if (options.minutes is None) == (options.tokens is None):
        raise click.UsageError("give either --minutes or --tokens")
    options.out.mkdir(parents=True, exist_ok=True)
    text = read_text(options.library, options.texts)
    tokenizer_file = options.out / "tokenizer.json"
    if not tokenizer_file.exists():
        given = options.tokenizer
        made = Tokenizer.from_file(str(given)) if given else train_tokenizer(text.train, options.vocabulary)
        made.save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    corpus = tokenize(text, tokenizer)
    held_out = ", ".join(f"{kind} {len(ids):,}" for kind, ids in corpus.held_out.items())
    click.echo(f"{sum(map(len, corpus.train)):,} tokens to learn from; held out: {held_out}")
    for name in ("draft", "target"):
        train_one(name, options, tokenizer, corpus)
    judge(load(options.out / "target"), load(options.out / "draft"), corpus)


def train_one(name: str, options: Options, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """Train the model of this name from its checkpoint, or from the start, and save its folder."""
    minutes = options.minutes
    if name == "draft" and minutes is not None:
        minutes = options.draft_minutes or minutes / 8
    plan = Plan(minutes=minutes, tokens=options.tokens, rate=options.rate, seed=options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = start(name, options, tokenizer).to(device)
    trainer = Trainer(model, Windows(corpus.train, plan.batch, options.seed), plan)
    checkpoint = options.out / f"{name}.safetensors"
    if checkpoint.exists():
        trainer.load(checkpoint)
    click.echo(f"{name}: {parameters(model):,} parameters on {device}, {trainer.state.tokens:,} tokens so far")
    saved = time.monotonic()
    for state in trainer.steps():
        if time.monotonic() - saved >= options.every:
            trainer.save(checkpoint)
            report(name, state, model, corpus)
            saved = time.monotonic()
    trainer.save(checkpoint)
    report(name, trainer.state, model, corpus)
    save(model, tokenizer, options.out / name)


def start(name: str, options: Options, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A fresh model of the shape that is asked for, or one that grew out of a smaller one."""
    shape, folder = getattr(options, name), getattr(options, f"grow_{name}")
    if folder is None:
        return build(shape, tokenizer, options.seed)
    return grow(load(folder), shape, tokenizer, options.seed)


def report(name: str, state: State, model: torch.nn.Module, corpus: Corpus) -> None:
    """A line on how a training goes, with losses on a little of what is held out."""
    losses = ", ".join(f"{kind} {loss(model, windows(ids, 256, GLANCE)):.3f}" for kind, ids in corpus.held_out.items())
    click.echo(f"{name}: step {state.step}, {state.tokens:,} tokens, {state.seconds:.0f} s, {state.loss:.3f}; {losses}")


@main.command("judge")
@click.argument("target", type=existing)
@click.argument("draft", type=existing)
@library_option
@texts_option
def judge_command(target: Path, draft: Path, library: Path, texts: tuple[Path, ...]) -> None:
    """Losses and agreement of two folders on the text that ``train`` holds out."""
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    judge(load(target), load(draft), tokenize(read_text(library, texts), tokenizer))


def judge(target: LlamaForCausalLM, draft: LlamaForCausalLM, corpus: Corpus) -> None:
    """A row for each kind of held-out text and each context: every position of every window counts."""
    click.echo("held out         context  tokens  target   draft  acceptance  greedy   (losses in nats per token)")
    for kind, ids in corpus.held_out.items():
        for context in CONTEXTS:
            row = agreement(target, draft, windows(ids, context, JUDGED))
            figures = f"{row.target:6.3f}  {row.draft:6.3f}  {row.acceptance:10.3f}  {row.greedy:6.3f}"
            click.echo(f"{kind:16} {context:7d} {row.tokens:7d}  {figures}")


if __name__ == "__main__":
    main()
