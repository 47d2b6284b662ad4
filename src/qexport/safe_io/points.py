"""The steps of writing, each announced before it is taken: an audit hook can watch, delay, fail or kill at any of them.

The event is ``qexport.io`` with the name of the step and the path. Without a hook it costs nothing to speak of.
"""

from __future__ import annotations

import os
import sys
from typing import Literal

EVENT = "qexport.io"

Point = Literal["create", "write", "fsync", "rename", "exchange", "sync-folder", "mkdir", "adopt", "remove", "lock"]


def reach(point: Point, path: str | os.PathLike[str]) -> None:
    """Announce a step; whatever a hook raises comes out here."""
    sys.audit(EVENT, point, os.fspath(path))
