"""Recipes: which passes run in which order with which options, and how they become passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qexport.calibration.reading.spec import DataSpec
from qexport.errors import QexportError, UsageError
from qexport.exporter import toml
from qexport.exporter.steps import PASSES, Table, check_option, find_pass, is_bound, is_required
from qexport.passes.portable import CACHED_OPSET
from qexport.passes.target import find_target

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
