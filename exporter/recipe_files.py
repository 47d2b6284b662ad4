"""Recipes from TOML files with one inheritance rule, and settings on top of them.

A recipe is read, its ``extends`` chain is merged, and only then is it a ``Recipe``; every file of the chain is
checked by itself first, so that an error names the file, the line and the step it stands in.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from qexport.errors import UsageError
from qexport.exporter import toml
from qexport.exporter.recipe import Recipe
from qexport.exporter.steps import PASSES, Table, check_option, find_pass, suggest
from qexport.passes.target import TARGETS
from qexport.safe_io import read_text


def list_recipes() -> dict[str, str]:
    """Return the shipped recipes: name to description, sorted."""
    files = sorted(path.name for path in _shipped().iterdir() if path.name.endswith(".toml"))
    texts = {name: (_shipped() / name).read_text("utf-8") for name in files}
    return {name.removesuffix(".toml"): toml.parse(text, name).get("description", "") for name, text in texts.items()}


def load_recipe(name_or_path: str | Path, table: Table = PASSES) -> Recipe:
    """Load a shipped recipe by name, or a file by a path that ends in ``.toml`` or has a folder in it.

    Raises:
        UsageError: No such recipe; not TOML (line, column); an unknown section, key, pass or option (file, line,
            step, nearest name); a value of a wrong type; ``extends`` that leads back to itself.
    """
    chain: dict[str, dict[str, Any]] = {}
    reference: str | Path | None = name_or_path
    folder = Path()
    while reference is not None:
        where, text = _read(reference, folder)
        identity = os.path.realpath(where) if where.endswith(".toml") else where
        if identity in chain:
            raise UsageError(f"'extends' goes round in a circle: {' -> '.join([*chain, identity])}", where=where)
        raw = {"name": Path(where).stem, **toml.parse(text, where)}
        _validate(raw, table, where, text)
        chain[identity] = raw
        folder, reference = Path(where).parent, raw.get("extends")
    merged: dict[str, Any] = {}
    for raw in reversed(chain.values()):
        merged = _merge({**merged, "description": ""}, raw)
    merged.pop("extends", None)
    return _validate(merged, table, str(name_or_path))


def override(recipe: Recipe, settings: Iterable[str], table: Table = PASSES) -> Recipe:
    """Apply settings such as ``quantize.min_sqnr=18`` or ``export.target=ort-cpu`` in order.

    The first word is a section or a pass of the recipe (all its steps of that name), the rest is a key; values are
    TOML, and bare words are strings.

    Raises:
        UsageError: The setting is malformed, or names or gives something that the recipe file could not.
    """
    for setting in settings:
        where = f"--set {setting}"
        key, equals, text = setting.partition("=")
        path = key.strip().split(".")
        if not equals or len(path) < 2 or not all(path):
            raise UsageError("expected step.option=value or section.key=value", where=where)
        raw = recipe.as_dict()
        for place in _places(raw, path[0], where, table):
            _assign(place, path[1:], toml.parse_value(text.strip(), where), where)
        recipe = _validate(raw, table, where)
    return recipe


def _shipped() -> Path:
    return Path(str(resources.files("qexport.exporter").joinpath("recipes")))


def _read(reference: str | Path, folder: Path) -> tuple[str, str]:
    """Return what to call a recipe in messages (its shipped name or its path) and its text."""
    name = os.fspath(reference)
    if isinstance(reference, Path) or name.endswith(".toml") or "/" in name or os.sep in name:
        path = folder / name
        return str(path), read_text(path, limit=toml.LIMIT)
    names = [path.stem for path in _shipped().glob("*.toml")]
    if name not in names:
        hint = f"{suggest(name, names)}; the name of a file must end in .toml"
        raise UsageError(f"no recipe called {name!r}", hint=hint)
    return name, (_shipped() / f"{name}.toml").read_text("utf-8")


def _merge(base: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``child`` over ``base``: tables key by key, steps by ``_merge_steps``, everything else replaced."""
    merged = {**base, **child}
    for key, value in child.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            merged[key] = _merge(base[key], value)
    if "step" in merged:
        merged["step"] = _merge_steps(base.get("step", []), child.get("step", []))
    return merged


def _merge_steps(base: list[dict[str, Any]], child: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Override step by step, option by option.

    The n-th step of a name overrides the n-th of that name; a step that the base lacks goes in right behind the
    child's step above it, or to the end when there is none.
    """
    merged = list(zip(_keys(base), base, strict=True))
    position = len(merged)
    for key, step in zip(_keys(child), child, strict=True):
        found = next((index for index, (other, _) in enumerate(merged) if other == key), None)
        if found is None:
            merged.insert(position, (key, step))
            position += 1
        else:
            merged[found] = (key, {**merged[found][1], **step})
            position = found + 1
    return [step for _, step in merged]


def _keys(steps: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Name each step by its pass and how many of that pass came before it."""
    seen: Counter[str] = Counter()
    keys = []
    for step in steps:
        keys.append((step["pass"], seen[step["pass"]]))
        seen[step["pass"]] += 1
    return keys


def _places(raw: dict[str, Any], head: str, where: str, table: Table) -> list[dict[str, Any]]:
    """Return the tables of a recipe that the first word of a setting means."""
    sections = [name for name in Recipe.model_fields if isinstance(raw.get(name), dict)]
    if head in sections:
        return [raw[head]]
    steps = [step for step in raw["step"] if step["pass"] == head]
    if not steps:
        names = {step["pass"] for step in raw["step"]}
        what = f"recipe {raw['name']!r} has no step {head!r}" if head in table else f"unknown step or section {head!r}"
        raise UsageError(what, where=where, hint=suggest(head, {*sections, *names}))
    return steps


def _assign(place: dict[str, Any], path: list[str], value: object, where: str) -> None:
    for key in path[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise UsageError(f"{key!r} is a value and has no keys", where=where)
    place[path[-1]] = value


def _validate(raw: dict[str, Any], table: Table, where: str, text: str = "") -> Recipe:
    """Check a whole recipe; ``text`` is the file it was read from and serves to find lines."""
    try:
        # JSON, because strict JSON takes an array for a tuple, and no string for a number.
        recipe = Recipe.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise _explain(error, raw, where, text) from error
    if recipe.export.target not in TARGETS:
        place = _locate(text, where, ("export", "target"), raw)
        raise UsageError(
            f"unknown target {recipe.export.target!r}", where=place, hint=suggest(recipe.export.target, TARGETS)
        )
    for number, step in enumerate(recipe.step):
        cls = find_pass(step.pass_, _locate(text, where, ("step", number, "pass"), raw), table)
        for name, value in step.options.items():
            check_option(cls, name, value, _locate(text, where, ("step", number, name), raw))
    return recipe


def _explain(error: ValidationError, raw: dict[str, Any], where: str, text: str) -> UsageError:
    """Turn the first complaint of pydantic into one that names the place and the nearest key."""
    first = error.errors()[0]
    path, key = first["loc"], str(first["loc"][-1])
    place = _locate(text, where, path, raw)
    if first["type"] == "extra_forbidden":
        return UsageError(f"unknown key {key!r}", where=place, hint=suggest(key, _known(path[:-1])))
    if first["type"] == "missing":
        return UsageError(f"key {key!r} is missing", where=place)
    message = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    return UsageError(f"{key} = {first['input']!r}: {message}", where=place)


def _locate(text: str, where: str, path: tuple[int | str, ...], raw: dict[str, Any]) -> str:
    """Describe the place of a key: file, line where it can be found, and step or section."""
    if path[0] == "step" and len(path) > 2:
        number = int(path[1])
        header, count, key = "step", number + 1, str(path[2])
        label = f": step {count} ({raw['step'][number].get('pass', '?')})"
    else:
        *outer, key = (str(part) for part in path if isinstance(part, str))
        header, count = ".".join(outer), 1
        label = f": [{header}]" if header else ""
    line = toml.line_of(text, header, count, key)
    return f"{where}:{line}{label}" if line else f"{where}{label}"


def _known(path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that may stand in the section at ``path``."""
    model: type[BaseModel] = Recipe
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        model = next(c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel))
    return [field.alias or name for name, field in model.model_fields.items()]
