"""The replay log: everything that was decided in a run, one JSON object a line, for anybody who recomputes it.

A header says of what model files, settings, seed and prompts the run is; then there is a line for each round and row,
the prompts' own round included; a last line says how many these are. Several runs may follow each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qexport.errors import GateFailed
from qexport.runtime.certifying.subject import Subject, Way
from qexport.runtime.speculation.proposal import Row
from qexport.runtime.speculation.rounds import Outcome

SCHEMA = "qexport.replay/1"


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one row in one round.

    Attributes:
        round: 0 for the one that reads the prompts.
        row: Place in the batch.
        position: Tokens of the row before.
        proposed: What was proposed.
        spare: The token drawn for the position behind.
        drawn: Whether these were drawn from a distribution, or are certain.
        proposer: Who proposed.
        accepted: How many were taken.
        tokens: What the row got.
    """

    round: int
    row: int
    position: int
    proposed: tuple[int, ...]
    spare: int | None
    drawn: bool
    proposer: str
    accepted: int
    tokens: tuple[int, ...]


@dataclass(slots=True)
class Run:
    """One batch from its prompts to its end.

    Attributes:
        way: How it was decoded.
        prompts: Of each row.
        streams: Of each row.
        lines: In the order in which they were decided.
    """

    way: Way
    prompts: list[tuple[int, ...]]
    streams: list[int]
    lines: list[Line] = field(default_factory=list)

    def tokens(self, row: int) -> list[int]:
        """What a row got, in order."""
        return [token for line in self.lines if line.row == row for token in line.tokens]

    def outputs(self) -> list[list[int]]:
        """What all rows got."""
        found: list[list[int]] = [[] for _ in self.prompts]
        for line in self.lines:
            found[line.row].extend(line.tokens)
        return found


def record(subject: Subject, way: Way, rows: Sequence[Row], length: int, *, exact: bool = True) -> Run:
    """Decode until every row has ``length`` tokens.

    Args:
        subject: Whose loop runs.
        way: How.
        rows: A batch, nothing decided yet.
        length: Tokens of each row.
        exact: Whether no row may get more. If not, its last round looks as far ahead as one in the middle of a text.

    Raises:
        GateFailed: A round gave a row nothing.
        DataInvalid: The model has no positions for so many tokens, or no numbers.
    """
    run = Run(way, [tuple(row.ids) for row in rows], [row.stream for row in rows])
    rounds = subject.loop(way)
    emitted = [0] * len(rows)
    going = list(range(len(rows)))
    outcomes, number = rounds.begin(rows).outcomes, 0
    while True:
        _note(run, going, emitted, number, outcomes)
        left = [place for place, row in enumerate(going) if emitted[row] < length]
        if not left:
            return run
        if len(left) < len(going):
            going = [going[place] for place in left]
            rounds.keep(left)
        room = [length - emitted[row] if exact else way.ahead + 1 for row in going]
        outcomes, number = rounds.step(room).outcomes, number + 1


def _note(run: Run, going: Sequence[int], emitted: list[int], number: int, outcomes: Sequence[Outcome]) -> None:
    for row, found in zip(going, outcomes, strict=True):
        if found.failure is not None:
            raise found.failure
        if not found.tokens:
            raise GateFailed(f"round {number} gave row {row} no token", where=f"{run.way.ahead} tokens ahead")
        proposal, position = found.proposal, len(run.prompts[row]) + emitted[row]
        drawn = proposal.chances is not None
        what = (proposal.ids, proposal.spare, drawn, proposal.proposer, found.accepted, found.tokens)
        run.lines.append(Line(number, row, position, *what))
        emitted[row] += len(found.tokens)


def to_jsonl(runs: Iterable[Run], files: Mapping[str, Mapping[str, str]]) -> str:
    """The log as text.

    Args:
        runs: One after the other.
        files: Digests by the name of the file, of ``target`` and ``draft``.
    """
    return "".join(_object(told) for run in runs for told in _told(run, files))


def _told(run: Run, files: Mapping[str, Mapping[str, str]]) -> Iterable[dict[str, Any]]:
    rows = [
        {"stream": stream, "prompt": prompt, "tokens": len(run.tokens(row))}
        for row, (stream, prompt) in enumerate(zip(run.streams, run.prompts, strict=True))
    ]
    sampling = asdict(run.way.sampling)
    sampling["logit_bias"] = {str(token): bias for token, bias in sampling["logit_bias"].items()}
    way = {"proposer": run.way.proposer, "ahead": run.way.ahead}
    yield {"schema": SCHEMA, "files": files, "sampling": sampling, **way, "rows": rows}
    for line in run.lines:
        yield asdict(line)
    yield {"lines": len(run.lines)}


def _object(told: Mapping[str, Any]) -> str:
    return json.dumps(told, separators=(",", ":")) + "\n"
