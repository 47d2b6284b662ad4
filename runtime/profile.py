"""Where the time goes: seconds of every operator that a session runs, in the order it runs them."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

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
    """

    name: str
    op: str
    seconds: float


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
    for event in json.loads(text):
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_ENDING):
            key = name.removesuffix(_ENDING), str(event["args"]["op_name"])
            times[key].append(event["dur"] / 1e6)
    return [Kernel(name, op, float(np.median(found[skip:] or found))) for (name, op), found in times.items()]
