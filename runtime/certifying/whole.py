"""The generator as users have it, with its batches, stops and paces, against the loop that was certified.

Randomness is looked up, so both say the same tokens for the same seeds, or differ first where a number lies so near an
edge that rounding decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from qexport.runtime.certifying import evidence, greedy
from qexport.runtime.certifying.certificate import Check
from qexport.runtime.certifying.log import Run
from qexport.runtime.certifying.subject import DRAFT, LOOKUP, Subject
from qexport.runtime.generation.generator import GenerateOptions, Generator
from qexport.runtime.generation.models import Model
from qexport.runtime.generation.stops import Stop


def compare(subject: Subject, target: Model, draft: Model | None, runs: Sequence[Run]) -> Check:
    """Let the generator say what some of the runs said.

    Args:
        subject: The pair, for what was near an edge.
        target: The same models, loaded.
        draft: The other; ``None`` where copies alone are certified.
        runs: Sampled ones. Those with the draft as it is are generated with as many tokens ahead, coupled ones with as
            many as seem to pay, and copies with copies.
    """
    rows = same = ties = 0
    first = ""
    for run in runs:
        options = _options(run)
        if options is None:
            continue
        with_draft = None if run.way.proposer == LOOKUP else draft
        said = _say(Generator(target, with_draft, options), run)
        for row, (mine, theirs) in enumerate(zip(said, run.outputs(), strict=True)):
            rows, same = rows + 1, same + (mine == theirs)
            if mine != theirs:
                place = next((at for at, pair in enumerate(zip(mine, theirs, strict=False)) if len({*pair}) > 1), -1)
                tie = place >= 0 and _near(subject, run, row, place)
                ties += tie
                first = first or ("" if tie else f"; {run.way.proposer} row {row} differs at token {place}")
    told = f"{same} of {rows} rows equal, {ties} differ in a tie{first}"
    return Check("generator", "the generator says the same", same + ties == rows, told, samples=rows)


def _options(run: Run) -> GenerateOptions | None:
    """How to ask for the same output; ``None`` where that depends on more than the seed."""
    way = run.way
    if way.coupled:
        return GenerateOptions(speculate="auto", rule="equality")
    if way.proposer == LOOKUP:
        return GenerateOptions(speculate=way.ahead)
    if way.proposer == DRAFT:
        return GenerateOptions(speculate=way.ahead, lookup=False)
    return None


def _say(generator: Generator, run: Run) -> list[list[int]]:
    """The tokens of every row; the models are not closed."""
    length = len(run.tokens(0))
    completions = generator.complete(run.prompts, run.way.sampling, Stop(tokens=length, eos=False))
    return [list(found.tokens) for found in completions]


def _near(subject: Subject, run: Run, row: int, place: int) -> bool:
    """Whether nothing but rounding tells which token comes there."""
    prompt = run.prompts[row]
    noise = greedy.noise_of(subject.truth, [(prompt, run.tokens(row))])
    found = evidence.gather([run], subject, noise)
    at = [one for one in found.readings if (one.row, one.position) == (row, len(prompt) + place)]
    return not at or any(min(abs(one.used - one.low), abs(one.used - one.high)) <= one.slack for one in at)
