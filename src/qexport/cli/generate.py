"""``qexport generate``: text in, text out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from qexport.cli import flags
from qexport.cli.common import make_console, print_json, shared_flags
from qexport.errors import UsageError

if TYPE_CHECKING:
    from qexport.runtime.generation.generator import GenerateOptions
    from qexport.runtime.generation.prompts import Prompt
    from qexport.runtime.generation.stops import Stop
    from qexport.runtime.sampling.settings import Sampling
    from qexport.runtime.tokenizing import Tokenizer

STDIN = "-"


class Asked(TypedDict):
    """The options of ``generate`` as click hands them over."""

    draft: Path | None
    prompt: tuple[str, ...]
    prompts: str | None
    reference: tuple[Path, ...]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    logit_bias: tuple[str, ...]
    seed: int
    stop: tuple[str, ...]
    speculate: str
    lookup: bool
    rule: str
    batch: int
    threads: int
    backend: str | None
    draft_backend: str | None
    stats: bool
    as_json: bool


@click.command()
@click.argument("target", type=flags.PATH)
@click.option(
    "--draft", type=flags.PATH, metavar="DIR", help="A smaller decoder with the same tokenizer, to look ahead."
)
@click.option("--prompt", multiple=True, metavar="TEXT", help="What to continue; may be given several times.")
@click.option(
    "--prompts", type=click.Path(), metavar="FILE", help="One prompt per line, or .jsonl; - reads lines from stdin."
)
@click.option(
    "--reference",
    type=flags.PATH,
    multiple=True,
    metavar="FILE",
    help="A text that outputs may copy from; also several.",
)
@flags.max_tokens()
@flags.temperature()
@click.option("--top-k", type=int, default=0, metavar="K", help="Draw from the K likeliest tokens.  [default: all]")
@click.option(
    "--top-p", type=float, default=1.0, metavar="P", help="Draw from the likeliest with P together.  [default: 1.0]"
)
@click.option(
    "--min-p", type=float, default=0.0, metavar="P", help="Draw from those with P of the best's chance.  [default: 0.0]"
)
@click.option(
    "--repetition-penalty", type=float, default=1.0, metavar="X", help="Above 1: repeat less.  [default: 1.0]"
)
@click.option("--logit-bias", multiple=True, metavar="ID=X", help="Add X to the logit of a token; also several.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of all randomness.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End an output where this begins; also several.")
@click.option("--speculate", default="auto", show_default=True, metavar="auto|off|K", help="Tokens to look ahead.")
@click.option("--lookup/--no-lookup", default=True, help="Copy from prompt, output, references.  [default: lookup]")
@click.option("--rule", default="rejection", show_default=True, metavar="NAME", help="equality: draw as without draft.")
@click.option("--batch", type=int, default=8, show_default=True, metavar="N", help="Prompts that are decoded together.")
@flags.threads()
@flags.backend()
@flags.draft_backend()
@click.option("--stats", is_flag=True, help="Tell what it took, and what plain decoding takes.")
@shared_flags
def generate(target: Path, **asked: Unpack[Asked]) -> None:
    """Continue prompts with TARGET.

    TARGET is a folder that export or build wrote. One output is written as it comes, several are written in order.
    With --draft a smaller model looks ahead and TARGET verifies several tokens at once; greedy outputs are the same as
    without it, drawn ones have the same distribution. A line of a .jsonl file is an object with "prompt", text or
    tokens, and "references", texts that its output may copy from.
    """
    from qexport.cli import outputs
    from qexport.cli.accounts import print_stats
    from qexport.runtime.accounting.stats import account
    from qexport.runtime.benchmarking.baseline import account_with_baseline
    from qexport.runtime.generation.generator import open_generator

    sampling, stop, options, prompts = _sampling(asked), _stop(asked), _options(asked), _prompts(asked)
    with open_generator(target, draft=asked["draft"], options=options) as generator:
        prompts = _with_references(prompts, asked["reference"], generator.tokenizer)
        with generator.batch(prompts, sampling, stop) as batch:
            (outputs.collect if asked["as_json"] else outputs.show)(batch, len(prompts))
            if asked["stats"]:
                stats = account_with_baseline(generator, batch, prompts, sampling, stop)
            else:
                stats = account(batch.runs)
            if asked["as_json"]:
                print_json(outputs.as_json(prompts, batch, stats))
            elif asked["stats"]:
                print_stats(make_console(stderr=True), stats)
            outputs.leave(batch, quiet=asked["as_json"])


def _options(asked: Asked) -> GenerateOptions:
    from qexport.runtime.generation.generator import GenerateOptions
    from qexport.runtime.session import SessionOptions

    if asked["threads"] < 0:
        raise UsageError(f"--threads is {asked['threads']}, expected 0 for all, or more")
    session = SessionOptions(backend=asked["backend"], threads=asked["threads"], spin=asked["draft"] is None)
    return GenerateOptions(
        session=session,
        draft_session=replace(session, backend=asked["draft_backend"]),
        speculate=_ahead(asked["speculate"]),  # type: ignore[arg-type]  # it refuses
        lookup=asked["lookup"],
        rule=asked["rule"],  # type: ignore[arg-type]  # it refuses all but two
        batch=asked["batch"],
    )


def _ahead(told: str) -> int | str:
    try:
        return int(told)
    except ValueError:
        return told


def _sampling(asked: Asked) -> Sampling:
    from qexport.runtime.sampling.settings import Sampling

    return Sampling(
        temperature=asked["temperature"],
        top_k=asked["top_k"],
        top_p=asked["top_p"],
        min_p=asked["min_p"],
        repetition_penalty=asked["repetition_penalty"],
        logit_bias=dict(map(_bias, asked["logit_bias"])),
        seed=asked["seed"],
    )


def _bias(told: str) -> tuple[int, float]:
    token, _, bias = told.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise UsageError(f"--logit-bias is {told!r}", hint="expected ID=X, such as 42=-1.5") from error


def _stop(asked: Asked) -> Stop:
    from qexport.runtime.generation.stops import Stop

    return Stop(tokens=asked["max_tokens"], strings=asked["stop"])


def _prompts(asked: Asked) -> list[Prompt]:
    from qexport.runtime.generation.prompt_files import read_prompts_file
    from qexport.runtime.generation.prompts import Prompt

    found = [Prompt(text) for text in asked["prompt"]]
    source = asked["prompts"]
    if source is not None:
        found += _read_stdin() if source == STDIN else read_prompts_file(Path(source))
    if not found:
        raise UsageError("there is no prompt", hint="give --prompt TEXT or --prompts FILE")
    return found


def _read_stdin() -> list[Prompt]:
    """A prompt for every line; none where stdin is closed."""
    from qexport.runtime.generation.prompt_files import read_lines

    if sys.stdin is None:
        return []
    with click.open_file(STDIN, encoding="utf-8-sig") as lines:
        try:
            return list(read_lines(lines))
        except UnicodeDecodeError as error:
            raise UsageError(f"not UTF-8 text: bad byte at offset {error.start}", where="stdin") from error


def _with_references(prompts: list[Prompt], files: tuple[Path, ...], tokenizer: Tokenizer) -> list[Prompt]:
    """The same prompts, with files that all of them may copy from."""
    from qexport.runtime.generation.prompts import MOST_CHARACTERS
    from qexport.runtime.speculation.proposal import Reference
    from qexport.safe_io import read_text

    shared = tuple(
        Reference(str(file), tuple(tokenizer.encode(read_text(file, limit=MOST_CHARACTERS), special=False)))
        for file in files
    )
    return [replace(prompt, references=(*prompt.references, *shared)) for prompt in prompts]
