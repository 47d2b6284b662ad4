"""``qexport bench``: what looking ahead is worth on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from qexport.cli import flags
from qexport.cli.accounts import shares
from qexport.cli.common import make_console, make_table, print_json, shared_flags
from qexport.errors import UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from qexport.runtime.benchmarking.bench import BenchOptions
    from qexport.runtime.benchmarking.result import BenchResult, Entry


class Asked(TypedDict):
    """The options of ``bench`` as click hands them over."""

    draft: Path | None
    prompts: Path
    limit: int | None
    max_tokens: int
    speculate: str | None
    rounds: int
    temperature: float
    threads: int
    backend: str | None
    draft_backend: str | None
    output: Path | None
    as_json: bool


@click.command()
@click.argument("target", type=flags.PATH)
@click.option("--draft", type=flags.PATH, metavar="DIR", help="A smaller decoder with the same tokenizer.")
@click.option("--prompts", type=flags.PATH, metavar="FILE", required=True, help="One prompt per line, or .jsonl.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Take the first N prompts.  [default: all]")
@flags.max_tokens()
@click.option("--speculate", metavar="WAYS", help="Tokens to look ahead.  [default: 1,2,3,4,6,8,auto]")
@click.option("--rounds", type=int, default=1, show_default=True, metavar="R", help="How often each prompt is decoded.")
@flags.temperature()
@flags.threads()
@flags.backend()
@flags.draft_backend()
@flags.output(metavar="DIR", help="Folder for plots and numbers.")
@shared_flags
def bench(target: Path, **asked: Unpack[Asked]) -> None:
    """Measure TARGET with and without looking ahead.

    TARGET is a folder that export or build wrote. Plain decoding, every number of tokens ahead, the automatic choice
    and copies from prompt and output take turns prompt by prompt; speeds are relative to plain decoding in the same
    run. With -o, plots (SVG) and the numbers go to a folder.
    """
    from qexport.cli.progress import RichProgress
    from qexport.runtime.benchmarking.bench import publish_bench, run_bench
    from qexport.runtime.generation.prompt_files import read_prompts_file

    prompts = read_prompts_file(asked["prompts"])[: asked["limit"]]
    options, folders, output = _options(asked), (target, asked["draft"]), asked["output"]

    def measured() -> BenchResult:
        with RichProgress().stage("bench", len(prompts) * options.rounds) as advance:
            return run_bench(folders, prompts, options, lambda: advance(1))

    found = measured() if output is None else publish_bench(output, folders, measured)
    if asked["as_json"]:
        print_json(found.as_json())
        return
    _print(make_console(), found)


def _options(asked: Asked) -> BenchOptions:
    from qexport.runtime.benchmarking.bench import AHEAD, BenchOptions
    from qexport.runtime.sampling.settings import Sampling
    from qexport.runtime.session import SessionOptions

    words = [word.strip() for word in (asked["speculate"] or "").split(",") if word.strip()]
    try:
        numbers = tuple(int(word) for word in words if word not in {"auto", "off"})
    except ValueError as error:
        what = f"--speculate is {asked['speculate']!r}"
        raise UsageError(what, hint="auto, off, or numbers such as 2,4,6,auto") from error
    if asked["threads"] < 0:
        raise UsageError(f"--threads is {asked['threads']}, expected 0 for all, or more")
    return BenchOptions(
        max_tokens=asked["max_tokens"],
        rounds=asked["rounds"],
        ahead=numbers if words else AHEAD,
        auto=not words or "auto" in words,
        lookup=not words or "auto" in words,
        sampling=Sampling(temperature=asked["temperature"]),
        session=SessionOptions(backend=asked["backend"], threads=asked["threads"]),
        draft_session=SessionOptions(backend=asked["draft_backend"], threads=asked["threads"]),
    )


def _print(console: Console, found: BenchResult) -> None:
    known, pair = found.known, f" with {found.draft}" if found.draft else ""
    console.print(printable(f"{found.target}{pair}: {found.prompts} prompts, {found.max_tokens} tokens, in turn"))
    if known.machine is not None:
        peaks = f"{known.machine.memory / 1e9:.1f} GB/s, {known.machine.flops / 1e9:.0f} GFLOP/s"
        console.print(f"{known.machine.threads} threads, at most {peaks}")
    draft = f", of the draft {known.draft.milliseconds(1):.2f} ms" if known.draft else ""
    console.print(f"a call with one token takes {known.target.milliseconds(1):.2f} ms{draft}")
    header = ("way", "tokens/s", "speed", "95 %", "formula", "per call", "taken", "same", "TTFT ms", "TPOT ms", "p95")
    console.print(make_table(header, [_speed(entry, found.prompts) for entry in found.entries]))
    console.print("where the time of rounds goes, and how much of the machine is used")
    used = ("way", "draft", "verify", "accept", "other", "Python", "MBU", "MFU", "draft MBU", "MB/token")
    console.print(make_table(used, [_shares(entry) for entry in found.entries]))
    if found.auto_over_best is not None and found.best is not None:
        console.print(f"auto has {found.auto_over_best:.1%} of the speed of {found.best.name}, the best fixed number")


def _speed(entry: Entry, prompts: int) -> tuple[object, ...]:
    stats, ratio = entry.stats, entry.speedup
    taken = " ".join(f"{found.proposer} {found.rate:.0%}" for found in stats.proposers)
    tpot = stats.tpot
    return (
        entry.name,
        f"{entry.tokens_per_second:.0f}",
        f"{ratio.value:.2f}x",
        f"{ratio.low:.2f} - {ratio.high:.2f}",
        "" if entry.predicted is None else f"{entry.predicted:.2f}x",
        f"{stats.tokens_per_call:.2f}",
        taken,
        f"{entry.same}/{prompts}",
        f"{stats.ttft.p50:.1f}",
        "" if tpot is None else f"{tpot.p50:.2f}",
        "" if tpot is None else f"{tpot.p95:.2f}",
    )


def _shares(entry: Entry) -> tuple[object, ...]:
    hardware = entry.stats.hardware
    target, draft = (None, None) if hardware is None else (hardware.target, hardware.draft)
    return (
        entry.name,
        *shares(entry.stats),
        f"{entry.stats.overhead:.1%}",
        _share(None if target is None else target.mbu),
        _share(None if target is None else target.mfu),
        _share(None if draft is None else draft.mbu),
        "" if hardware is None else f"{hardware.bytes_per_token / 1e6:.1f}",
    )


def _share(found: float | None) -> str:
    return "" if found is None else f"{found:.1%}"
