"""Tables whose rows name their code as ``module:name``, so that only what is asked for is imported."""

from __future__ import annotations

import importlib
from typing import Any


def look_up(home: str) -> Any:
    """What ``home`` names; its module is imported."""
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(module), name)
