"""What ``qexport generate`` writes: text as it comes, or one object."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from qexport.errors import DataInvalid, printable

if TYPE_CHECKING:
    from qexport.runtime.accounting.stats import Stats
    from qexport.runtime.generation.batches import Batch
    from qexport.runtime.generation.prompts import Prompt
    from qexport.runtime.generation.replies import Completion

SCHEMA = "qexport.generate/1"
_LINES = "\n\t"


def collect(batch: Batch, count: int) -> None:
    """Write nothing yet."""
    for _ in batch:
        pass


def show(batch: Batch, count: int) -> None:
    """Write one output as it comes, of several each when it and all before it are there."""
    if count == 1:
        for _, token in batch:
            _write(token.text)
        _write("\n")
        return
    due = 0
    for _ in batch:
        while due < count and (found := batch.completion(due)) is not None:
            _write_output(due, found)
            due += 1
    for number in range(due, count):
        found = batch.completion(number)
        assert found is not None
        _write_output(number, found)


def _write_output(number: int, found: Completion) -> None:
    _write(f"{'' if number == 0 else chr(10)}--- {number}: {len(found.tokens)} tokens, {found.reason}\n{found.text}\n")


def _write(text: str) -> None:
    """Write text, if there is a stdout; on a terminal no output of a model can steer it."""
    if sys.stdout is None:
        return
    if sys.stdout.isatty():
        text = "".join(c if c in _LINES else printable(c) for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def leave(batch: Batch, *, quiet: bool) -> None:
    """Exit as for bad data where an output failed, with the reasons on stderr unless they were told."""
    failed = [(number, found.error) for number, found in enumerate(batch.completions) if found and found.error]
    for number, error in [] if quiet else failed:
        click.echo(f"error: prompt {number}: {error}", err=True)
    if failed:
        raise click.exceptions.Exit(DataInvalid.exit_code)


def as_json(prompts: Sequence[Prompt], batch: Batch, stats: Stats) -> dict[str, Any]:
    """Everything that came, and what it took."""
    from qexport.runtime.accounting.stats import account

    outputs = []
    for number, (prompt, found) in enumerate(zip(prompts, batch.completions, strict=True)):
        assert found is not None
        outputs.append(
            {
                "prompt": prompt.text,
                "tokens": found.tokens,
                "text": found.text,
                "reason": found.reason,
                "error": None if found.error is None else str(found.error),
                "copied": [
                    {"index": piece.index, "count": piece.count, "source": piece.span.source, "start": piece.span.start}
                    for piece in found.copied
                ],
                "stats": account([batch.run_of(number)]).as_json(),
            }
        )
    return {"schema": SCHEMA, "outputs": outputs, "stats": stats.as_json()}
