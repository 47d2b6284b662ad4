"""Recipes: which passes run in which order with which options, as TOML files with one inheritance rule.

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
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qexport.calibration.reading.spec import DataSpec
from qexport.errors import QexportError, UsageError
from qexport.exporter import toml
from qexport.exporter.steps import PASSES, Table, check_option, find_pass, is_bound, is_required, suggest
from qexport.passes.portable import CACHED_OPSET
from qexport.passes.target import TARGETS, find_target
from qexport.safe_io import read_text

if TYPE_CHECKING:
    from qexport.passes.base import Pass

Shape = list[int]

_RAISED = 23  # what the fusions need; a newer one asks for newer runtimes and gives nothing for it
_NEEDS = {"data": "give calibration data with --calib FILE; qexport never makes any up"}
"""What to do when a bound option has no value."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepSpec(BaseModel):
    """One ``[[step]]``: ``pass`` names the pass, every other key is an option of it.

    Attributes:
        pass_: Name of the pass, a key of ``PASSES``.
        enabled: ``false`` leaves the step out, which is how a recipe drops a step of the one it extends.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    pass_: str = Field(alias="pass")
    enabled: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Options by name, as written."""
        return dict(self.model_extra or {})


class ExportSpec(_Section):
    """The ``[export]`` section.

    Attributes:
        target: Backend, a key of ``TARGETS``.
        opset: Operator set of the result; the target's highest, yet no more than 23, when not given.
        engine: Whether to build an engine when the target has them.
        profiles: Input name to smallest, best and largest shape; derived from the calibration data when not given.
        max_batch: Largest batch of the derived profile.
        max_seq: Tokens that the caches of a decoder's engine have room for; what the model has positions for, yet no
            more than 2048, when not given.
        layout: Of decoders that come as a folder: ``cached``, with caches of keys and values, or ``scoring``, reading
            whole rows; caches where target and opset have the operators for them, when not given.
        compute_capabilities: Devices the engine is for, such as ``"8.6"``; portable when empty.
        never_worse: Whether int8 that breaks a gate, or is measured slower than float, goes back to float.
    """

    target: str = "tensorrt-rtx"
    opset: int | None = Field(default=None, ge=7)
    engine: bool = True
    profiles: dict[str, tuple[Shape, Shape, Shape]] | None = None
    max_batch: int = Field(default=32, ge=1)
    max_seq: int | None = Field(default=None, ge=1)
    layout: Literal["cached", "scoring"] | None = None
    compute_capabilities: tuple[str, ...] = ()
    never_worse: bool = True

    @property
    def cached(self) -> bool:
        """Whether decoders that come as a folder get caches."""
        if self.layout is not None:
            return self.layout == "cached"
        return min(self.opset or CACHED_OPSET, find_target(self.target).opset) >= CACHED_OPSET


class GatesSpec(_Section):
    """The ``[gates]`` section: a build that is worse fails and publishes nothing.

    Attributes:
        max_drop: Points of the task metric (x100) that may be lost.
        min_cosine: Smallest mean cosine between float and result.
        min_worst_cosine: Smallest cosine of any sample.
    """

    max_drop: float | None = Field(default=None, allow_inf_nan=False)
    min_cosine: float | None = Field(default=None, ge=-1, le=1, allow_inf_nan=False)
    min_worst_cosine: float | None = Field(default=None, ge=-1, le=1, allow_inf_nan=False)


class Recipe(_Section):
    """A whole recipe, with ``extends`` already followed.

    Attributes:
        name: File name without its ending, unless the file says otherwise.
        description: One line.
        extends: Only in files: the shipped recipe or the path, relative to the file, that this one builds on.
        step: The passes in order.
        export: Where the result runs.
        data: How calibration and evaluation data are read.
        gates: How good the result must be.
    """

    name: str
    description: str = ""
    extends: str | None = None
    step: tuple[StepSpec, ...] = ()
    export: ExportSpec = Field(default_factory=ExportSpec)
    data: DataSpec = Field(default_factory=DataSpec)
    gates: GatesSpec = Field(default_factory=GatesSpec)

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as TOML and ``result.json`` hold it; loading it again gives the same recipe."""
        document = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for step in document["step"]:
            if step["enabled"]:
                del step["enabled"]
        return document

    def to_toml(self) -> str:
        """Return the recipe as TOML text."""
        return "\n".join(toml.dump(self.as_dict())) + "\n"


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


def instantiate(recipe: Recipe, context: Mapping[str, object], table: Table = PASSES) -> list[tuple[str, Pass]]:
    """Build the enabled steps as passes.

    Args:
        recipe: The recipe.
        context: Values of bound options by name, such as ``data``.
        table: Pass classes by name.

    An option called ``target``, ``opset`` or ``samples`` that a step leaves unset gets the recipe's.

    Raises:
        UsageError: A step does not fit its pass, or a bound option that it must have is not in ``context``.
    """
    derived = derived_options(recipe)
    steps = []
    for number, step in enumerate(recipe.step, 1):
        if not step.enabled:
            continue
        where = f"{recipe.name}: step {number} ({step.pass_})"
        cls = find_pass(step.pass_, where, table)
        values = {name: check_option(cls, name, value, where) for name, value in step.options.items()}
        for name, field in cls.options().items():
            if is_bound(field) and context.get(name) is not None:
                values[name] = context[name]
            elif name in derived and name not in values:
                values[name] = check_option(cls, name, derived[name], where)
            elif is_required(field) and name not in values:
                raise UsageError(f"option {name!r} has no value", where=where, hint=_NEEDS.get(name, "set it"))
        steps.append((step.pass_, _construct(cls, values, where)))
    return steps


def derived_options(recipe: Recipe) -> dict[str, object]:
    """Return what the steps' options of these names are where a step leaves them unset.

    All steps that look at samples take as many as the first ``calibrate`` that says how many.
    """
    target = find_target(recipe.export.target)
    found: dict[str, object] = {"target": target.name, "opset": recipe.export.opset or min(target.opset, _RAISED)}
    told = (step.options.get("samples") for step in recipe.step if step.pass_ == "calibrate")
    samples = next((count for count in told if count is not None), None)
    return found if samples is None else found | {"samples": samples}


def needs(recipe: Recipe, name: str, table: Table = PASSES) -> bool:
    """Whether an enabled step cannot do without the bound option ``name``, such as ``data``."""
    classes = (find_pass(step.pass_, recipe.name, table) for step in recipe.step if step.enabled)
    fields = (cls.options().get(name) for cls in classes)
    return any(field is not None and is_bound(field) and is_required(field) for field in fields)


def _construct(cls: type[Pass], values: Mapping[str, object], where: str) -> Pass:
    try:
        return cls(**values)
    except QexportError as error:
        raise UsageError(error.what, where=where, hint=error.hint) from error
    except ValueError as error:
        raise UsageError(str(error), where=where) from error


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
