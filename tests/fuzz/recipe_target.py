"""Recipes: whatever text comes is refused with a reason, or is a recipe that reads the same after it was written."""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path

from fuzz.admit_target import demand_shown
from fuzz.script import Tape
from qexport.errors import QexportError
from qexport.exporter.recipe import Recipe
from qexport.exporter.recipe_files import load_recipe, override

MOST_SECONDS = 1.0
"""Of the processor, without a fuzzer that counts along."""


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Where recipes lie; removed at the end of the process."""
    return tempfile.TemporaryDirectory(prefix="fuzz-")


@functools.cache
def shipped(name: str) -> Recipe:
    """A recipe to override."""
    return load_recipe(name)


def one_input(data: bytes) -> None:
    """Read ``data`` as a file (its first byte even) or as settings, one a line (odd)."""
    tape, path = Tape(data), Path(folder().name) / "mine.toml"
    mode, start = tape.below(256), time.process_time()
    try:
        if mode % 2:
            text = tape.rest().decode("utf-8", "replace")
            found = override(shipped(("int8", "float32", "int4-gptq")[mode // 2 % 3]), text.splitlines()[:8])
        else:
            path.write_bytes(tape.rest())
            found = load_recipe(path)
        path.write_text(found.to_toml(), "utf-8")
        assert load_recipe(path).as_dict() == found.as_dict(), "reads differently after it was written"
    except QexportError as error:
        if error.exit_code == 1:
            raise
        demand_shown(error)
    took = time.process_time() - start
    assert took < MOST_SECONDS, f"took {took:.1f} s"
