"""``qexport bench`` from folders to numbers: loads target and draft, measures machine and curves, decodes in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qexport.errors import UsageError
from qexport.runtime.accounting.curve import Plan, Setting, measure_profile
from qexport.runtime.accounting.profiles import Profile
from qexport.runtime.accounting.utilization import find_known
from qexport.runtime.benchmarking.interleaved import Way, generator_way, interleave
from qexport.runtime.benchmarking.plots import draw
from qexport.runtime.benchmarking.result import AUTO, PLAIN, BenchResult, Subject, summarize
from qexport.runtime.figures import demand_matplotlib
from qexport.runtime.generation.generator import GenerateOptions, Generator, open_generator
from qexport.runtime.generation.prompts import Prompt, Text
from qexport.runtime.generation.stops import Stop
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.session import SessionOptions
from qexport.safe_io import finite, publish

if TYPE_CHECKING:
    from qexport.runtime.generation.models import Model

AHEAD = (1, 2, 3, 4, 6, 8)  # tokens
SECONDS = 1.0  # for each curve
LOOKUP = "lookup"
NUMBERS = "bench.json"
Told = Callable[[], None]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to measure.

    Attributes:
        max_tokens: Most tokens of each prompt.
        rounds: How often each prompt is decoded in every way.
        ahead: Numbers of tokens that the draft proposes, each a way of its own; nothing without a draft.
        auto: Whether looking as far ahead as pays is one more way.
        lookup: Whether copying from prompt and output alone is one more.
        sampling: How tokens are chosen.
        session: How the target runs.
        draft_session: How the draft runs; as the target does if not given.
    """

    max_tokens: int = 128
    rounds: int = 1
    ahead: tuple[int, ...] = AHEAD
    auto: bool = True
    lookup: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    session: SessionOptions = field(default_factory=SessionOptions)
    draft_session: SessionOptions | None = None

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` on numbers that measure nothing."""
        if self.rounds < 1 or self.max_tokens < 2:
            what = f"{self.rounds} rounds of {self.max_tokens} tokens, expected 1 or more of 2 or more"
            raise UsageError(what, hint="the first token belongs to the prompt, all others are decoded")
        if any(ahead < 1 for ahead in self.ahead):
            raise UsageError(f"tokens ahead are {list(self.ahead)}, expected 1 or more")


def run_bench(
    folders: tuple[Path, Path | None],
    prompts: Sequence[Text | Prompt],
    options: BenchOptions | None = None,
    told: Told = lambda: None,
) -> BenchResult:
    """Measure plain decoding and every way to look ahead, in turn.

    Args:
        folders: Of the target, and of the draft if there is one.
        prompts: Texts, tokens, or either with references; each is a request of its own.
        options: How.
        told: Is called after each prompt and round.

    Raises:
        UsageError: No prompts, or folders that hold no export.
        DataInvalid: A prompt that the model cannot read, or tokenizers that are not the same.
    """
    asked = options or BenchOptions()
    if not prompts:
        raise UsageError("there are no prompts", hint="give some, one per line")
    target, draft = folders
    with open_generator(target, draft=draft, options=_loading(asked, draft)) as loaded:
        known = find_known(_profile(loaded.target), None if loaded.draft is None else _profile(loaded.draft))
        ways = [_way(name, generator, prompts, asked) for name, generator in _ways(loaded, asked)]
        timings = interleave(ways, len(prompts), asked.rounds, told)
    return summarize(Subject(str(target), None if draft is None else str(draft), asked.max_tokens, known), timings)


def publish_bench(output: Path, folders: tuple[Path, Path | None], measured: Callable[[], BenchResult]) -> BenchResult:
    """Measure, and put the numbers and the pictures into a folder.

    Raises:
        EnvironmentMismatch: There is no matplotlib; told before the work.
        UsageError: The folder holds something else.
    """
    demand_matplotlib()
    with publish(output, inputs=[folder for folder in folders if folder is not None]) as stage:
        found = measured()
        stage.write_json(NUMBERS, finite(found.as_json()))
        for name, picture in draw(found).items():
            stage.write_bytes(name, picture)
        stage.write_manifest()
    return found


def _loading(asked: BenchOptions, draft: Path | None) -> GenerateOptions:
    """Of two models that run in turn, neither waits in a loop for the other."""
    if draft is None:
        return GenerateOptions(session=asked.session)
    second = asked.draft_session or asked.session
    return GenerateOptions(session=replace(asked.session, spin=False), draft_session=replace(second, spin=False))


def _profile(model: Model) -> Profile:
    """Timing now, whatever is stored: it is held against times of this very run."""
    known = model.profile()
    if known is None:
        what, hint = "nothing says what a call of the decoder reads", "keep model.onnx beside its engine"
        raise UsageError(what, where=str(model.folder.path), hint=hint)
    with model.decoder() as decoder:
        return measure_profile(decoder, known.costs, Setting(known.fingerprint, known.threads), Plan(seconds=SECONDS))


def _ways(loaded: Generator, asked: BenchOptions) -> Iterator[tuple[str, Generator]]:
    """Plain decoding first. All share the models that are loaded."""
    target, draft, plain = loaded.target, loaded.draft, replace(loaded.options, speculate="off", lookup=False)
    yield PLAIN, Generator(target, None, plain)
    for ahead in asked.ahead if draft is not None else ():
        yield f"K = {ahead}", Generator(target, draft, replace(plain, speculate=ahead))
    if asked.auto and draft is not None:
        yield AUTO, Generator(target, draft, replace(plain, speculate="auto", lookup=asked.lookup))
    if asked.lookup:
        yield LOOKUP, Generator(target, None, replace(plain, speculate="auto", lookup=True))


def _way(name: str, generator: Generator, prompts: Sequence[Text | Prompt], asked: BenchOptions) -> Way:
    return generator_way(name, generator, prompts, asked.sampling, Stop(tokens=asked.max_tokens))
