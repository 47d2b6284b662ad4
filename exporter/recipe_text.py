"""A recipe as text for people: TOML that loads again, with what every step is for and could be told."""

from __future__ import annotations

import dataclasses

from qexport.exporter import toml
from qexport.exporter.recipe import Recipe
from qexport.exporter.steps import PASSES, Table, find_pass, is_required, settable


def annotated(recipe: Recipe, table: Table = PASSES) -> str:
    """Return the recipe as TOML; comments give each pass's purpose and the defaults of options left unset."""
    document = recipe.as_dict()
    steps = document.pop("step", [])
    head = {key: value for key, value in document.items() if not isinstance(value, dict)}
    lines = [*toml.dump(head)]
    for number, step in enumerate(steps, 1):
        cls = find_pass(step["pass"], f"{recipe.name}: step {number}", table)
        first, *rest = toml.dump({"step": [step]})
        lines += [first, f"# {number}. {cls.help()}", *rest]
        lines += [_unset(name, field) for name, field in settable(cls).items() if name not in step]
    sections = {key: value for key, value in document.items() if isinstance(value, dict)}
    return "\n".join([*lines, *toml.dump(sections)]) + "\n"


def _unset(name: str, field: dataclasses.Field[object]) -> str:
    return f"# {name}{' = ' if (value := _default(field)) else ': '}{value or 'not set'}"


def _default(field: dataclasses.Field[object]) -> str:
    """Return the default as TOML, or "" where there is none that TOML could write."""
    if is_required(field) or field.default is None:
        return ""
    value = field.default_factory() if callable(field.default_factory) else field.default
    return _written(value)


def _written(value: object) -> str:
    return next(iter(toml.dump({"v": value}))).removeprefix("v = ")
