"""How to embed, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from qexport.errors import UsageError
from qexport.runtime.demands import demand_integer
from qexport.runtime.embedding.pooling import POOLINGS
from qexport.runtime.session import SessionOptions

WINDOW = 4096  # texts
MOST = 1 << 31  # of any number
CUT, REFUSE = "cut", "refuse"


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """How to embed.

    Attributes:
        batch_tokens: Most tokens of a batch, padding counted; chosen by where the model runs when not given.
        max_tokens: Tokens after which a text is cut; when not given, what its tokenizer says, and no more than the
            model has positions for.
        too_long: What becomes of a longer text: ``cut`` or ``refuse``.
        output: The output to read, where the model has several; vectors of sentences before hidden states if not given.
        pooling: How hidden states become one vector, by the names of sentence-transformers; when not given, what the
            folder says, and the mean where it does not.
        normalize: Whether vectors are scaled to length one.
        window: Texts that are sorted together, which bounds the memory of streams.
        session: How to run.
    """

    batch_tokens: int | None = None
    max_tokens: int | None = None
    too_long: str = CUT
    output: str | None = None
    pooling: str | None = None
    normalize: bool = True
    window: int = WINDOW
    session: SessionOptions = field(default_factory=SessionOptions)

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_tokens", "window"):
            value = getattr(self, name)
            if value is not None or name == "window":
                demand_integer(name, value, 1, MOST)
        if not isinstance(self.session, SessionOptions):
            raise UsageError(f"session is {self.session!r}, expected SessionOptions")
        if self.too_long not in (CUT, REFUSE):
            raise UsageError(f"too_long is {self.too_long!r}, expected {CUT!r} or {REFUSE!r}")
        if self.pooling is not None and self.pooling not in tuple(POOLINGS):
            raise UsageError(f"unknown pooling {self.pooling!r}", hint=f"known: {', '.join(POOLINGS)}")


@dataclass(slots=True)
class EmbedStats:
    """What embedding took so far.

    Attributes:
        texts: How many were asked for.
        distinct: How many were computed; others have the same tokens as one of them.
        cut: How many were longer than the model reads.
        tokens: What was read, without padding.
        cells: The same with padding: what the model computed on.
        batches: Runs of the model.
        tokenizing: Seconds.
        running: Seconds.
        seconds: From the texts to the vectors.
    """

    texts: int = 0
    distinct: int = 0
    cut: int = 0
    tokens: int = 0
    cells: int = 0
    batches: int = 0
    tokenizing: float = 0.0
    running: float = 0.0
    seconds: float = 0.0

    @property
    def padding(self) -> float:
        """Share of the cells that is padding."""
        return 1 - self.tokens / self.cells if self.cells else 0.0

    @property
    def texts_per_second(self) -> float:
        """Of all seconds."""
        return self.texts / self.seconds if self.seconds else 0.0

    def add(self, other: EmbedStats) -> None:
        """Count what another one counted."""
        for entry in fields(other):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
