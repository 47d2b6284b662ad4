"""Inputs to compare an export with its source on: a person's data, text of this package, or, told as such, made up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.reading.data import DataSpec, ImageSpec, open_dataset
from qexport.calibration.reading.spec import InputSpec, Sample, input_specs, scores_tokens
from qexport.calibration.reading.text import MAKERS, encode, load_tokenizer
from qexport.errors import DataInvalid, UsageError
from qexport.exporter.doors.inputs import AskedInput, Feeds, generate, sizes_for
from qexport.passes.portable import IDS, MASK, TYPES, WANTED
from qexport.safe_io import read_text

PROSE = (
    "The ferry left at dawn.",
    "Nobody on the pier waved, because nobody had slept.",
    "Is the library open on Sundays, or only when it rains?",
    "She counted the coins twice, wrote the sum into a blue notebook, and closed the drawer without a sound.",
    "In 1987 the bridge carried 4,200 cars a day; today, after two repairs, it carries about three times as many.",
    "Bread needs four things: flour, water, salt and time.",
    "“You could have called,” he said, although he knew that the line had been dead since the storm.",
    "The committee agreed on the first point, argued about the second for an hour, and forgot the third.",
    "Most of the old maps show a lake here, and an island in the lake, and on the island a house with no door.",
    "When the temperature falls below zero the sensor reports an error, which is correct but not helpful.",
    "My neighbour's dog is afraid of balloons, cyclists and, for reasons that are not known, of the letter box.",
    "If the train is late again we shall walk along the river, past the mill, and be home before the lamps are lit.",
)
DECODED = (96, 61, 40)  # tokens of the rows that decoders are tried on
ENCODED = (17, 29, 8)  # of those that an encoder reads for them
LONGEST = 576  # tokens that a row is drawn out to, to see what lies behind a window
SENTENCES = 8
_MOST_TEXT = 1 << 20  # bytes that are looked at
_MADE_UP = "real ones tell more about the export: give them with --data or --text"
_BEHIND = 32  # tokens behind the end of a window
_COARSE = 7  # points of a made-up picture along an edge, before it is made smooth

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Material:
    """What a person gave, and what is known of the model.

    Attributes:
        data: Samples of a reader's format.
        text: Plain text: running text for decoders, a sentence a line for others.
        tokenizer: The ``tokenizer.json`` that came with the model.
        vocabulary: How many tokens the model knows.
        positions: The longest row that it has positions for.
    """

    data: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None
    vocabulary: int | None = None
    positions: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Inputs.

    Attributes:
        name: What a report calls them.
        rows: Samples without a batch axis.
        batches: Inputs with one, where there are no samples.
        made_up: Whether they are not real.
    """

    name: str
    rows: tuple[Sample, ...] = ()
    batches: tuple[Feeds, ...] = ()
    made_up: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is doubtful about them."""
        return (f"verified on {self.name}, which are made up; {_MADE_UP}",) if self.made_up else ()

    def unseen(self, reach: int, positions: int | None) -> tuple[str, ...]:
        """What they are too short for, where tokens that are ``reach`` apart are treated in another way."""
        read = [each.get(WANTED, each.get(IDS)) for each in (*self.rows, *self.batches)]
        longest = max((ids.shape[-1] for ids in read if ids is not None), default=0)
        if not 0 < longest <= reach or reach >= (positions or reach + 1):
            return ()
        what = f"tokens that are {reach} or more apart are treated in another way, as a window has it"
        return (f"{what}, and the longest row of the proof has {longest}: that was not tried",)


def reaching(lengths: Sequence[int], reach: int) -> tuple[int, ...]:
    """The lengths of rows, the longest drawn out to see what is ``reach`` tokens back, where that is not too far."""
    longest, needed = max(lengths), reach + _BEHIND
    return tuple(needed if length == longest < needed <= LONGEST else length for length in lengths)


def find_texts(known: Material, lengths: Sequence[int] = DECODED) -> Found:
    """Rows of ``input_ids`` for a decoder, each as long as asked for or as text and model allow.

    Raises:
        DataInvalid: There is text and no tokenizer; or too little of it.
        UsageError: Both text and data were given.
    """
    wanted = [min(length, known.positions or length) for length in lengths]
    if known.data is not None:
        _demand_one(known)
        samples = _dataset(known, (InputSpec(IDS, np.dtype(np.int64), (None, None)),), max(wanted))
        rows = [sample[IDS][:length] for sample, length in zip(samples, wanted, strict=False)]
        return Found(known.data.name, tuple({IDS: row} for row in rows))
    if known.tokenizer is None:
        _demand_no_text(known)
        rng = np.random.default_rng(0)
        made = tuple({IDS: rng.integers(0, known.vocabulary or 2, length)} for length in wanted)
        return Found("token numbers", made, made_up=True)
    name, text = _running(known)
    ids = np.array(encode(load_tokenizer(known.tokenizer, None), text, name).ids, np.int64)
    if len(ids) < len(wanted) * 2:
        raise DataInvalid(f"the text has {len(ids)} tokens, too few", where=name, hint="give a page of text")
    whole, ends = sum(wanted), np.cumsum([0, *wanted])
    if known.text is None:
        ids = np.resize(ids, max(whole, len(ids)))  # over and over
    cuts = ends if len(ids) >= whole else ends * len(ids) // whole
    rows = [ids[start:end] for start, end in pairwise(cuts)]
    return Found(name, tuple({IDS: row} for row in rows))


def find_samples(known: Material, model: ir.Model, reach: int = 0) -> Found:
    """Inputs of a model that keeps no state; of a decoder they are long enough to see what is ``reach`` tokens back.

    Raises:
        DataInvalid: Data or text does not fit the model, or there is text and no tokenizer.
        UsageError: Both text and data were given.
    """
    inputs = input_specs(model)
    if known.data is not None:
        _demand_one(known)
        return Found(known.data.name, tuple(_dataset(known, inputs, known.positions or 128)))
    names = {one.name for one in inputs}
    if scores_tokens(model) and names <= {IDS, MASK, WANTED}:
        return _rows(known, inputs, reach)
    if IDS in names and names <= {*MAKERS, WANTED}:
        found = _sentences(known, inputs)
        return replace(found, rows=tuple(_of_all_kinds(found.rows, _kinds(model))))
    _demand_no_text(known)
    asked = tuple(_asked(value) for value in model.graph.inputs)
    feeds = generate(asked, sizes_for(asked))
    pictures = {one.name: _picture(one, feeds[one.name].shape) for one in asked if _is_picture(one)}
    return Found("smooth pictures" if pictures else "random numbers", batches=({**feeds, **pictures},), made_up=True)


def _rows(known: Material, inputs: tuple[InputSpec, ...], reach: int) -> Found:
    """Texts for a decoder that reads whole rows; behind an encoder it reads the beginning of each anew."""
    found = find_texts(known, reaching(DECODED, reach))
    if not any(entry.name == WANTED for entry in inputs):
        return replace(found, rows=tuple(_made_up(inputs, row[IDS]) for row in found.rows))
    texts = [row[IDS] for row in found.rows]
    sources = [row[IDS] for row in find_texts(known, reaching(ENCODED, reach)).rows]
    batches = [{**padded(sources[place:]), WANTED: padded(texts[place:])[IDS]} for place in (0, len(texts) - 1)]
    made = ({entry.name: batch[entry.name].astype(entry.dtype) for entry in inputs} for batch in batches)
    return replace(found, rows=(), batches=tuple(made))


def padded(rows: Sequence[Ids]) -> dict[str, Ids]:
    """Rows filled up with zeros to the longest, and the mask that tells so."""
    length = max(map(len, rows))
    mask = np.stack([np.arange(length) < len(row) for row in rows]).astype(np.int64)
    return {IDS: np.stack([np.pad(row, (0, length - len(row))) for row in rows]), MASK: mask}


def _kinds(model: ir.Model) -> int:
    """How many types of tokens a model tells apart, as far as its graph shows."""
    uses = [use for value in model.graph.inputs if value.name == TYPES for use in value.uses()]
    tables = [use.node.inputs[0] for use in uses if use.node.op_type == "Gather" and use.idx == 1]
    sizes = [table.shape[0] for table in tables if table is not None and table.shape is not None]
    return min((size for size in sizes if isinstance(size, int)), default=1)


def _of_all_kinds(rows: Sequence[Sample], kinds: int) -> Iterator[Sample]:
    """The rows, every second with tokens of all types, one type behind the other: no sentence alone has them."""
    for place, row in enumerate(rows):
        if TYPES not in row or place % 2 == 0:
            yield row
        else:
            types = np.arange(len(row[TYPES])) * kinds // max(len(row[TYPES]), 1)
            yield {**row, TYPES: types.astype(row[TYPES].dtype)}


def _sentences(known: Material, inputs: tuple[InputSpec, ...]) -> Found:
    limit = min(known.positions or 128, 128)
    if known.tokenizer is None:
        _demand_no_text(known)
        rng = np.random.default_rng(0)
        lengths = [min(limit, 3 + 4 * number) for number in range(SENTENCES)]
        rows = [_made_up(inputs, rng.integers(0, known.vocabulary or 2, length)) for length in lengths]
        return Found("token numbers", tuple(rows), made_up=True)
    tokenizer = load_tokenizer(known.tokenizer, limit)
    name, lines = _lines(known)
    encoded = [encode(tokenizer, line, name) for line in lines]
    rows = []
    for one, other in zip(encoded, encoded[1:] + encoded[:1], strict=True):
        made = {WANTED: other.ids, **{key: make(one) for key, make in MAKERS.items()}}
        rows.append({entry.name: np.array(made[entry.name], entry.dtype) for entry in inputs})
    return Found(name, tuple(rows))


def _made_up(inputs: tuple[InputSpec, ...], ids: Ids) -> Sample:
    values: Mapping[str, Ids] = {MASK: np.ones_like(ids), TYPES: np.zeros_like(ids)}
    return {entry.name: values.get(entry.name, ids).astype(entry.dtype) for entry in inputs}


def _dataset(known: Material, inputs: tuple[InputSpec, ...], length: int) -> list[Sample]:
    assert known.data is not None
    spec = DataSpec(max_length=length, image=ImageSpec())  # of pixels any will do, both sides see the same
    samples = list(islice(open_dataset(known.data, inputs, spec, tokenizer=known.tokenizer), SENTENCES))
    for place, ids in ((place, sample[IDS]) for place, sample in enumerate(samples) if IDS in sample):
        if known.vocabulary is not None and ids.size and not 0 <= ids.min() <= ids.max() < known.vocabulary:
            what = f"token numbers from {ids.min()} to {ids.max()}, the model has words 0 to {known.vocabulary - 1}"
            raise DataInvalid(what, where=f"{known.data}: sample {place}, {IDS}")
    return samples


# ---------------------------------------------------------------- text


def _running(known: Material) -> tuple[str, str]:
    if known.text is None:
        return "twelve sentences of prose", " ".join(PROSE)
    return known.text.name, _read(known.text)


def _lines(known: Material) -> tuple[str, list[str]]:
    """So many sentences, as unlike in length as there are."""
    lines, name = list(PROSE), "eight sentences of prose"
    if known.text is not None:
        lines, name = [line.strip() for line in _read(known.text).splitlines() if line.strip()], known.text.name
        if not lines:
            raise DataInvalid("holds no text", where=str(known.text))
    ordered = sorted(lines, key=len)
    places = np.linspace(0, len(ordered) - 1, min(SENTENCES, len(ordered))).astype(int)
    return name, [ordered[place] for place in places]


def _read(path: Path) -> str:
    return read_text(path, limit=_MOST_TEXT)


def _demand_no_text(known: Material) -> None:
    if known.text is not None:
        hint = "put the model's tokenizer.json beside it, or give arrays with --data"
        raise DataInvalid("text needs a tokenizer, and the model came with none", where=str(known.text), hint=hint)


def _demand_one(known: Material) -> None:
    if known.text is not None:
        raise UsageError("--data and --text exclude each other", hint="give one of them")


# ---------------------------------------------------------------- numbers


def _asked(value: ir.Value) -> AskedInput:
    """An input of a graph as a person would describe it."""
    spec = next(iter(input_specs(_only(value))))
    axes = [] if value.shape is None else list(value.shape)
    names = [str(axis.value or f"{value.name}_{place}") for place, axis in enumerate(axes) if not isinstance(axis, int)]
    left = iter(names)
    return AskedInput(spec.name, spec.dtype, tuple(axis if isinstance(axis, int) else next(left) for axis in axes))


def _only(value: ir.Value) -> ir.Model:
    like = ir.Value(name=value.name, type=value.type, shape=value.shape)
    return ir.Model(ir.Graph([like], [], nodes=[]), ir_version=10)


def _is_picture(one: AskedInput) -> bool:
    return len(one.shape) == 4 and one.dtype.kind == "f"


def _picture(one: AskedInput, shape: tuple[int, ...]) -> NDArray[Any]:
    """Random numbers on a coarse grid, drawn out to the whole picture, mostly from -1 to 1."""
    rng = np.random.default_rng(0)
    picture = rng.standard_normal((*shape[:2], _COARSE, _COARSE))
    for axis in (2, 3):
        places = np.linspace(0, _COARSE - 1, shape[axis])
        low = np.minimum(places.astype(int), _COARSE - 2)
        part = (places - low).reshape([-1 if each == axis else 1 for each in range(4)])
        picture = np.take(picture, low, axis) * (1 - part) + np.take(picture, low + 1, axis) * part
    return picture.astype(one.dtype)
