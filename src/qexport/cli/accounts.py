"""Accounts of a run as lines and tables, for ``generate --stats`` and ``bench``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qexport.cli.common import make_table
from qexport.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from qexport.runtime.accounting.stats import Quantiles, Stats
    from qexport.runtime.accounting.utilization import Use


def print_stats(console: Console, found: Stats) -> None:
    """Print everything that is known of a run."""
    for name, told in _lines(found):
        console.print(printable(f"{name:<22} {told}"))
    if found.proposers:
        header = ("position", *(f"{entry.proposer}, {kind}" for entry in found.proposers for kind in ("next", "all")))
        console.print("share of proposed tokens that was taken: once all before are taken, and of all that were there")
        console.print(make_table(header, _positions(found)))


def shares(found: Stats) -> tuple[str, str, str, str]:
    """Of the time of rounds: proposals, calls of the target, accepting, everything else."""
    split = found.split
    parts = (split.draft, split.verify, split.accept, split.transfer + split.other)
    whole = sum(parts) or 1.0
    one, two, three, four = (f"{part / whole:.1%}" for part in parts)
    return one, two, three, four


def _lines(found: Stats) -> Iterator[tuple[str, str]]:
    yield "tokens", f"{found.tokens} of {found.rows} prompts with {found.prompt_tokens}"
    yield "first token", _quantiles(found.ttft)
    if found.tpot is not None and found.round is not None:
        yield "next tokens", _quantiles(found.tpot)
        yield "rounds", _quantiles(found.round)
        faster = f", {found.speedup:.2f}x plain" if found.speedup else ""
        yield "speed", f"{found.tokens_per_second:.0f} tokens/s{faster}"
        yield "calls of the target", f"{found.target_calls}, {found.tokens_per_call:.2f} tokens each"
        names = ("draft", "verify", "accept", "other")
        told = ", ".join(f"{name} {share}" for name, share in zip(names, shares(found), strict=True))
        yield "time of rounds", f"{told}; outside of backends {found.overhead:.1%}"
    for entry in found.proposers:
        yield f"proposed by {entry.proposer}", f"{entry.proposed} tokens, {entry.accepted} taken ({entry.rate:.1%})"
    if found.hardware is not None:
        yield from _hardware(found)


def _hardware(found: Stats) -> Iterator[tuple[str, str]]:
    known = found.hardware
    assert known is not None, "asked for where there is one"
    uses: tuple[tuple[str, Use | None], ...] = (
        ("prompts", known.prefill),
        ("target", known.target),
        ("draft", known.draft),
    )
    for name, use in uses:
        if use is not None and use.calls:
            told = f"{use.intensity:.2g} operations per byte"
            if use.mbu is not None and use.mfu is not None:
                told = f"MBU {use.mbu:.1%}, MFU {use.mfu:.1%}, {told}: bound by {use.bound}"
            yield f"machine, {name}", told
    if known.bytes_per_token:
        yield "bytes per token", f"{known.bytes_per_token / 1e6:.1f} MB"
        yield "predicted speed", f"{known.predicted_speedup:.2f}x plain"


def _positions(found: Stats) -> list[tuple[str, ...]]:
    longest = max(len(entry.taken) for entry in found.proposers)
    columns = [(entry.conditional, entry.cumulative) for entry in found.proposers]
    return [
        (str(place + 1), *(share for next_, all_ in columns for share in _at(next_, all_, place)))
        for place in range(longest)
    ]


def _at(conditional: tuple[float, ...], cumulative: tuple[float, ...], place: int) -> tuple[str, str]:
    if place >= len(conditional):
        return "", ""
    return f"{conditional[place]:.1%}", f"{cumulative[place]:.1%}"


def _quantiles(found: Quantiles) -> str:
    return f"{found.p50:.2f} ms, 95 of 100 within {found.p95:.2f} ms"
