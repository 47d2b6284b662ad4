"""What torch's exporter does: tracing a module with free dimensions, and what its errors mean."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx_ir as ir

from qexport.errors import BuildFailed
from qexport.exporter.doors.inputs import AskedInput, Feeds, free_dims
from qexport.exporter.doors.torch_modules.graph import tidy
from qexport.exporter.doors.torch_modules.subject import Subject
from qexport.exporter.doors.torch_modules.tensors import to_tensor

ROOT = "inner."
_NOISE = re.compile(r"For more information|^Constraints violated|^Suggested fixes|^The following|^Failed to|^Traceback")
_PLACE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_ADVICE = re.compile(r"\. (If you're|Please|Consider)\b.*")


def export(subject: Subject, feeds: Feeds, opset: int) -> tuple[ir.Model, tuple[str, ...]]:
    """Trace a subject whose outputs are settled and turn it into a graph.

    Args:
        subject: The module.
        feeds: Inputs to trace with; sizes of free dimensions are different and none is 0 or 1.
        opset: Version of the operators.

    Returns:
        The graph, and what torch says it relies on.

    Raises:
        BuildFailed: Torch cannot trace or convert it, or only for one size of a dimension.
    """
    import torch

    class Flat(torch.nn.Module):  # type: ignore[misc]  # torch may not be there
        """Tensors to tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = subject.module

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            return tuple(subject.flat(tensors).values())

    tensors = tuple(to_tensor(feeds[one.name]) for one in subject.inputs)
    with torch.no_grad(), quiet():
        program, notes = _traced(Flat().eval(), tensors, subject)
        try:
            made = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, external_data=False)
            model = made.model
        except Exception as error:
            what = f"torch cannot convert it: {_useful(_root(error), subject)}"
            hint = "write that part with other operators, or try another opset"
            raise BuildFailed(what, where=subject.where, hint=hint) from error
    return tidy(model, subject.inputs, subject.outputs, ROOT), notes


def _traced(flat: Any, tensors: tuple[Any, ...], subject: Subject) -> tuple[Any, tuple[str, ...]]:
    """Trace with named dimensions, or, where torch wants more than a name says, with what it finds out itself."""
    import torch

    inputs = subject.inputs
    named = {name: torch.export.Dim(name) for name in free_dims(inputs)}
    try:
        return _program(flat, tensors, inputs, named), ()
    except Exception as error:  # noqa: BLE001 the second attempt says whether it matters
        said, cause = _useful(error, subject), error
    try:
        program = _program(flat, tensors, inputs, dict.fromkeys(named, torch.export.Dim.AUTO))
    except Exception as error:
        what = f"torch cannot trace it: {_useful(error, subject)}"
        raise BuildFailed(what, where=subject.where, hint="see torch.export for what it can trace") from error
    if not named:
        return program, ()
    return program, _limits(program, subject, said, cause)


def _program(flat: Any, tensors: tuple[Any, ...], inputs: Sequence[AskedInput], dims: Mapping[str, Any]) -> Any:
    import torch

    shapes = tuple({i: dims[dim] for i, dim in enumerate(one.shape) if isinstance(dim, str)} for one in inputs)
    return torch.export.export(flat, tensors, dynamic_shapes=(shapes,), strict=False)


def _limits(program: Any, subject: Subject, said: str, cause: Exception) -> tuple[str, ...]:
    """What holds of the dimensions that torch was free to bind.

    Raises:
        BuildFailed: One became a single size, or another dimension, or may not be small.
    """
    places = [node for node in program.graph.nodes if node.op == "placeholder"][-len(subject.inputs) :]
    owner: dict[str, str] = {}
    notes: list[str] = []
    for node, one in zip(places, subject.inputs, strict=True):
        for size, dim in zip(node.meta["val"].shape, one.shape, strict=True):
            if not isinstance(dim, str):
                continue
            if isinstance(size, int) or str(size).isdigit():
                what = f"dimension {dim!r} became fixed at {size}: {said}"
                hint = f"write {size} in the place of {dim}, or make the module work for every size"
                raise BuildFailed(what, where=subject.where, hint=hint) from cause
            if owner.setdefault(str(size), dim) != dim:
                what = f"dimensions {owner[str(size)]!r} and {dim!r} must be equal"
                raise BuildFailed(what, where=subject.where, hint="give them one name") from cause
            known = program.range_constraints.get(size.node.expr)
            if known is not None and known.lower > 2:
                what = f"dimension {dim!r} would have to be {known.lower} or more: {said}"
                raise BuildFailed(what, where=subject.where, hint="make the module work for every size") from cause
            if known is not None and known.upper.is_Integer:
                notes.append(f"dimension {dim!r} is at most {known.upper}")
    return tuple(dict.fromkeys(notes or [f"torch says: {said}"]))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch prints, logs and warns of to ourselves; the exception says what is wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _useful(error: BaseException, subject: Subject) -> str:
    """The first line of what torch says that is about the module, with inputs called by their names."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if not _NOISE.search(line)), type(error).__name__)
    line = _PLACE.sub(lambda match: f"axis {match[2]} of {subject.inputs[int(match[1])].name}", line)
    return _ADVICE.sub("", line).rstrip(".")
