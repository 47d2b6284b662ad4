"""Where the time goes: seconds of every operator that a session runs, in the order it runs them."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qexport.errors import ResourceExhausted
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import Feeds, SessionOptions
from qexport.safe_io import read_text

RUNS = 9
WARM_UP = 2
_ENDING = "_kernel_time"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operator as the runtime ran it.

    Attributes:
        name: Its name after the runtime's own rewriting: mostly that of a node of the file or of its output.
        op: What it computed, which may be several operators of the file in one.
        seconds: Median over the runs.
        inputs: Shapes of what it read in the last run. Missing inputs are left out, and so are most weights: those that
            the runtime has rearranged when it opened the model.
        outputs: Shapes of what it made.
        bytes: What it read and made, without weights.
    """

    name: str
    op: str
    seconds: float
    inputs: tuple[tuple[int, ...], ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()
    bytes: int = 0


def profile(opener: Callable[[SessionOptions], OrtSession], options: SessionOptions, feeds: Feeds) -> list[Kernel]:
    """Run a model a few times on the same inputs and return what each operator took.

    Args:
        opener: Opens the model with the options it is given.
        options: How to run.
        feeds: Inputs of every run.

    Raises:
        ResourceExhausted: The runtime could not write its profile to the folder for temporary files.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            session = opener(replace(options, profile=str(Path(folder) / "profile")))
            for _ in range(WARM_UP + RUNS):
                session.run(feeds)
            return read_kernels(read_text(session.end_profile()))
    except (OSError, ValueError) as error:
        what = "the runtime's profile could not be written"
        raise ResourceExhausted(what, where=tempfile.gettempdir(), hint="free some space there") from error


def read_kernels(text: str, skip: int = WARM_UP) -> list[Kernel]:
    """Read onnxruntime's profile: the kernels of the main graph in order, without the first ``skip`` runs."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    told: dict[tuple[str, str], Mapping[str, Any]] = {}
    for event in json.loads(text):
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_ENDING):
            key = name.removesuffix(_ENDING), str(event["args"]["op_name"])
            times[key].append(event["dur"] / 1e6)
            told[key] = event["args"]
    return [_kernel(*key, float(np.median(found[skip:] or found)), told[key]) for key, found in times.items()]


def _kernel(name: str, op: str, seconds: float, told: Mapping[str, Any]) -> Kernel:
    """What onnxruntime tells of sizes differs with its version; what is missing stays empty."""
    sizes = (str(told.get(key)) for key in ("activation_size", "output_size"))
    moved = sum(int(size) for size in sizes if size.isdigit())
    return Kernel(
        name, op, seconds, _shapes(told.get("input_type_shape")), _shapes(told.get("output_type_shape")), moved
    )


def _shapes(told: object) -> tuple[tuple[int, ...], ...]:
    """``[{"float": [1, 2]}, ...]`` as shapes alone."""
    entries = told if isinstance(told, list) else []
    return tuple(tuple(map(int, shape)) for entry in entries for shape in entry.values())
