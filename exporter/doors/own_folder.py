"""The door for Hugging Face folders of a family that is known here: its graph is built from config and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.spec import keeps_cache
from qexport.errors import UsageError
from qexport.exporter.doors.origin import Origin, Reference
from qexport.exporter.doors.pickled import PICKLE, PickledFolder
from qexport.exporter.families.folder import INDEX, WEIGHTS
from qexport.exporter.families.form import FLOATS, Form
from qexport.exporter.families.vocabulary import check_vocabulary
from qexport.exporter.load import ONNX_FILE, PARTS, describe, digests_of, find_companions, open_folder
from qexport.exporter.lookup import look_up
from qexport.exporter.options import ExportOptions
from qexport.exporter.references import find_reach, find_reference


def open_own_folder(source: str, asked: ExportOptions, _scratch: Path) -> Origin:
    """Build the graphs, weights unread, and the reference beside them.

    Raises:
        UsageError: It is no such folder, or the head does not exist.
        ModelInvalid: The family is unknown, or config and weights do not fit.
        UnsafeInput: It reaches outside, wants to run code, or its weights are a pickle that nobody allowed.
        DataInvalid: The tokenizer has more tokens than the model.
    """
    path = Path(source)
    config, folder, build = open_folder(path)
    if asked.allow_pickle and not (folder.has(WEIGHTS) or folder.has(INDEX)) and folder.has(PICKLE):
        folder = PickledFolder(path, folder.used, allow_pickle=asked.allow_pickle)
    dtype = FLOATS[asked.dtype or "float32"]
    form = Form(dtype, cached=asked.layout == "cached", lazy=True, task=asked.task)
    parts = {ONNX_FILE: build(config, folder, form)}
    cached = keeps_cache(parts[ONNX_FILE])
    if cached and asked.task is not None:
        raise UsageError(f"a decoder has no head {asked.task!r}", where=source, hint="leave --task out")
    if cached:
        parts |= {name: part(config, folder, form) for name, part in _further(config["model_type"])}
    vocabulary = config.get("vocab_size")
    vocabulary = vocabulary if isinstance(vocabulary, int) else None
    if vocabulary is not None:
        check_vocabulary(folder, vocabulary)
    files = list(dict.fromkeys(folder.used))
    return Origin(
        door="qexport",
        info=describe(path, digests_of(files), parts[ONNX_FILE]),
        parts=parts,
        reference=_quiet(find_reference(config, folder, form)),
        told="the definition of the model in numpy, on the weights of the folder",
        dtype=dtype,
        family=config["model_type"],
        task=asked.task,
        vocabulary=vocabulary,
        companions=find_companions(path),
        unrounded=True,
        reach=find_reach(config),
    )


def _quiet(reference: Reference) -> Reference:
    """Numbers that overflow are seen in what comes out, and told there."""

    def run(feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        with np.errstate(all="ignore"):
            return reference(feeds)

    return run


def _further(family: str) -> Iterator[tuple[str, Any]]:
    for name, home in PARTS.get(family, {}).items():
        yield name, look_up(home)
