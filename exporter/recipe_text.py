"""A recipe as text for people: TOML that loads again, with what every step is for and could be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qexport.exporter import toml
from qexport.exporter.recipe import Recipe, derived_options
from qexport.exporter.steps import PASSES, Table, find_pass, is_required, settable


def annotated(recipe: Recipe, table: Table = PASSES) -> str:
    """Return the recipe as TOML; comments give each pass's purpose and the defaults of options left unset."""
    document = recipe.as_dict()
    derived = derived_options(recipe)
    steps = document.pop("step", [])
    head = {key: value for key, value in document.items() if not isinstance(value, dict)}
    lines = [*toml.dump(head)]
    for number, step in enumerate(steps, 1):
        cls = find_pass(step["pass"], f"{recipe.name}: step {number}", table)
        first, *rest = toml.dump({"step": [step]})
        lines += [first, f"# {number}. {cls.help()}", *rest]
        lines += [_unset(name, field, derived) for name, field in settable(cls).items() if name not in step]
    sections = {key: value for key, value in document.items() if isinstance(value, dict)}
    return "\n".join([*lines, *toml.dump(sections)]) + "\n"


def _unset(name: str, field: dataclasses.Field[object], derived: Mapping[str, object]) -> str:
    """Return the comment for an option that a step leaves unset: what it is then."""
    if name in derived:
        value = derived[name]
    elif is_required(field) or field.default is None:
        return f"# {name}: not set"
    else:
        value = field.default_factory() if callable(field.default_factory) else field.default
    return "# " + next(toml.dump({name: value}))
