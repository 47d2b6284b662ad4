"""Text in, text out: models that are loaded once, and requests to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from qexport.errors import UsageError
from qexport.runtime.demands import demand_integer
from qexport.runtime.generation.batches import Batch, Stream
from qexport.runtime.generation.detokenizing import Alphabet, Detokenizer, Sort
from qexport.runtime.generation.models import Model, demand_pair
from qexport.runtime.generation.prompts import Prompt, Text, demand_settings, read_row
from qexport.runtime.generation.replies import Completion, Reply
from qexport.runtime.generation.speculator import Speculator
from qexport.runtime.generation.stops import Cutter, Stop
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.session import SessionOptions
from qexport.runtime.speculation.proposal import Reference
from qexport.runtime.speculation.rounds import Fixed, Rounds
from qexport.runtime.speculation.soundness import demand_sound

Speculate: TypeAlias = int | Literal["auto", "off"]
Rule: TypeAlias = Literal["rejection", "equality"]

BATCH = 8
MOST_AHEAD = 64
PLAIN = Fixed(1)  # asks nobody, where there is nobody


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How a generator works; what a greedy request gets changes at near ties alone, where rounding decides.

    Attributes:
        session: How the target runs.
        draft_session: How the draft runs; as the target does if not given.
        speculate: How many tokens to look ahead; ``auto`` for what pays, ``off`` for plain decoding.
        lookup: Whether to propose copies from the prompt, the output, and references.
        rule: What becomes of tokens that a draft has drawn. By ``rejection`` as many as possible are taken; by
            ``equality`` those that plain decoding with the same seed has, so that the output is the same token for
            token with and without a draft.
        batch: Rows that are decoded together.
    """

    session: SessionOptions | None = None
    draft_session: SessionOptions | None = None
    speculate: Speculate = "auto"
    lookup: bool = True
    rule: Rule = "rejection"
    batch: int = BATCH

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` on what is out of range."""
        ahead = self.speculate
        if ahead not in ("auto", "off") and not (type(ahead) is int and 1 <= ahead <= MOST_AHEAD):
            what = f"speculate is {ahead!r}, expected auto, off, or 1 to {MOST_AHEAD} tokens"
            raise UsageError(what, hint="off decodes plainly")
        if self.rule not in ("rejection", "equality"):
            raise UsageError(f"unknown rule {self.rule!r}", hint="known: rejection, equality")
        demand_integer("batch", self.batch, 1)


class Generator:
    """A target, and a draft if there is one, that answer requests; several threads may ask at once.

    Weights are shared by all requests. Caches belong to a request, and are freed when it ends.

    Attributes:
        options: How it works.
        target: The model that decides.
        draft: The one that looks ahead.
    """

    def __init__(self, target: Model, draft: Model | None, options: GenerateOptions) -> None:
        """Answer with models that are loaded; :func:`open_generator` loads them.

        Raises:
            DataInvalid: The draft's tokenizer is not that of the target.
            ModelInvalid: The target says something else when it is asked for several tokens at once.
        """
        if draft is not None:
            demand_pair(target, draft)
        self.target, self.draft, self.options = target, draft, options
        self.tokenizer = target.folder.tokenizer
        self._alphabet = Alphabet(self.tokenizer)
        self._idle: list[Speculator] = []
        ahead = options.speculate
        if isinstance(ahead, int) and draft is None and not options.lookup:
            what = f"{ahead} tokens ahead are asked for, and there is neither a draft nor lookup"
            raise UsageError(what, hint="give a draft, or switch off")
        if self.plain:
            return
        if draft is not None or ahead != "auto":
            demand_sound(target.soundness, str(target.folder.path))
        elif not target.soundness.sound:  # nobody has asked for anything
            self.options = replace(options, speculate="off")

    @property
    def plain(self) -> bool:
        """Whether nothing ever looks ahead."""
        return self.options.speculate == "off" or not (self.draft or self.options.lookup)

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompt: Text,
        sampling: Sampling | None = None,
        stop: Stop | None = None,
        references: Sequence[str | Reference] = (),
    ) -> Stream:
        """Continue a prompt.

        Args:
            prompt: Text or tokens.
            sampling: How tokens are chosen; greedily if not given.
            stop: Where the output ends.
            references: What it may copy from.

        Returns:
            Its tokens, each computed when it is asked for.

        Raises:
            DataInvalid: The prompt has no tokens, or more than the model has positions for. While it is read: the
                model gave no numbers.
            UsageError: A setting names a token that does not exist.
        """
        return Stream(self.batch([Prompt(prompt, references)], sampling, stop))

    def batch(
        self, prompts: Sequence[Text | Prompt], sampling: Sampling | None = None, stop: Stop | None = None
    ) -> Batch:
        """Continue several prompts; what one gets does not depend on which others are there.

        A prompt that fails while it is answered ends with the reason ``failed``, and the others go on.

        Args:
            prompts: Texts, tokens, or either with references.
            sampling: How tokens are chosen; prompts with different numbers are independent of each other.
            stop: Where each output ends.

        Raises:
            DataInvalid: A prompt has no tokens, or more than the model has positions for.
            UsageError: A setting names a token that does not exist.
        """
        asked, ends = sampling or Sampling(), stop or Stop()
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            kind = "one text" if isinstance(prompts, str) else f"a {type(prompts).__name__}"
            raise UsageError(f"prompts are {kind}, expected several", hint="give a list, or ask generate")
        demand_settings(asked, ends, self.target.signature.vocabulary)
        replies = [
            self._reply(one if isinstance(one, Prompt) else Prompt(one), number, ends)
            for number, one in enumerate(prompts)
        ]
        sampler = Sampler(asked, coupled=self.options.rule == "equality")

        @contextmanager
        def open_rounds() -> Iterator[Rounds]:
            with ExitStack() as stack:
                yield self._rounds(stack, sampler)

        return Batch(open_rounds, replies, self.options.batch)

    def complete(
        self, prompts: Sequence[Text | Prompt], sampling: Sampling | None = None, stop: Stop | None = None
    ) -> list[Completion]:
        """All outputs of :meth:`batch`, once they are there."""
        with self.batch(prompts, sampling, stop) as batch:
            for _ in batch:
                pass
            return [found for found in batch.completions if found is not None]

    def close(self) -> None:
        """Free the models: a request that is under way fails. A second time does nothing."""
        self.target.close()
        if self.draft is not None:
            self.draft.close()

    def _reply(self, prompt: Prompt, number: int, stop: Stop) -> Reply:
        row, positions = read_row(prompt, number, self.target), self.target.positions
        return Reply(
            number=number,
            row=row,
            room=stop.tokens if positions is None else min(stop.tokens, positions - row.prompt),
            ends=self._ends(stop),
            text=Detokenizer(self._alphabet, row.ids),
            cutter=Cutter(stop.strings),
        )

    def _ends(self, stop: Stop) -> frozenset[int]:
        """Tokens that end an output; of special ones no text is ever seen, so strings are their names."""
        named = (self.tokenizer.token(text) for text in stop.strings)
        special = (token for token in named if token is not None and self._alphabet[token].sort is Sort.SILENT)
        own = self.target.folder.ends if stop.eos else ()
        return frozenset((*stop.ids, *own, *special))

    def _rounds(self, stack: ExitStack, sampler: Sampler) -> Rounds:
        """Decoders of a group of rows, closed by the stack, and the loop over them."""
        target = self.target.take()
        stack.push(lambda kind, *_: self.target.give_back(target, sound=kind is None))
        if self.plain:
            return Rounds(target, sampler, None, PLAIN)
        speculator = self._speculator()

        def give_back(kind: type[BaseException] | None, *_: object) -> None:
            if kind is None or kind is GeneratorExit:  # all else may have come in the middle of something
                speculator.rest()
                self._idle.append(speculator)

        stack.push(give_back)
        return Rounds(target, sampler, speculator.proposer(stack, sampler), speculator.policy)

    def _speculator(self) -> Speculator:
        """One that nobody uses now."""
        try:
            return self._idle.pop()
        except IndexError:
            ahead = self.options.speculate
            fixed = ahead if isinstance(ahead, int) else None
            return Speculator(self.target, self.draft, ahead=fixed, lookup=self.options.lookup)


def open_generator(
    target: str | Path, *, draft: str | Path | None = None, options: GenerateOptions | None = None
) -> Generator:
    """Load a decoder, and a smaller one that looks ahead for it.

    Args:
        target: A folder that ``export`` or ``build`` wrote.
        draft: Another with the same tokenizer.
        options: How to work.

    Raises:
        UsageError: A folder is missing, or holds no export.
        ModelInvalid: A graph is not in the portable layout, or a target says something else when it is asked for
            several tokens at once.
        IntegrityError: A file is not the one that was published.
        DataInvalid: Tokenizers are missing, or not the same.
    """
    asked = options or GenerateOptions()
    alone = draft is None or asked.speculate == "off"
    session = asked.session or SessionOptions(spin=alone)
    first = Model(Path(target), session)
    second = None if draft is None else Model(Path(draft), asked.draft_session or session)
    if asked.speculate == "auto":
        for model in (first, second):
            if model is not None and (second is not None or asked.lookup):
                model.profile()  # measured now, if it must be, and not while somebody waits for tokens
    return Generator(first, second, replace(asked, session=session))
