"""What is torch's in the export of a module: calls by name, tracing with free dimensions, the errors."""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import BuildFailed, UsageError
from qexport.exporter.doors.inputs import AskedInput, Feeds, free_dims
from qexport.exporter.doors.torch_modules.callables import told
from qexport.exporter.doors.torch_modules.graph import tidy
from qexport.exporter.doors.torch_modules.tensors import to_array, to_tensor
from qexport.exporter.steps import suggest

ROOT = "inner."
_NOISE = re.compile(r"For more information|^Constraints violated|^Suggested fixes|^The following|^Failed to|^Traceback")
_PLACE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_ADVICE = re.compile(r"\. (If you're|Please|Consider)\b.*")


class Subject:
    """A module that is called with arrays by name and answers with arrays by name.

    Args:
        module: The module; it goes to CPU memory and eval mode.
        inputs: Its inputs; by name where its ``forward`` knows the names, else in order.
        where: What a message calls it.
        kept: Names of the outputs to keep; all where there are none.
    """

    def __init__(self, module: Any, inputs: Sequence[AskedInput], where: str, kept: Sequence[str] = ()) -> None:
        self.module = module.to("cpu").eval()
        self.inputs = tuple(inputs)
        self.where = where
        self.kept = tuple(kept)
        self.outputs: tuple[str, ...] = ()
        self._named = _by_name(module, [one.name for one in inputs], where)

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
        """Run the module itself.

        Raises:
            BuildFailed: It fails on these inputs, or what it returns is not made of tensors.
        """
        import torch

        tensors = [to_tensor(feeds[one.name]) for one in self.inputs]
        try:
            with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                found = self.flat(tensors)
        except BuildFailed:
            raise
        except Exception as error:
            sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            hint = "give the inputs that it takes; dimensions that must be equal need one name"
            raise BuildFailed(f"the module fails on {sizes}: {told(error)}", where=self.where, hint=hint) from error
        names = self.outputs or _names(list(found), [one.name for one in self.inputs])
        return {name: np.array(to_array(tensor)) for name, tensor in zip(names, found.values(), strict=True)}

    def flat(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """Run the module on tensors in the order of the inputs; its outputs by the names they have there."""
        if self._named:
            made = self.module(**{one.name: tensor for one, tensor in zip(self.inputs, tensors, strict=True)})
        else:
            made = self.module(*tensors)
        found = {name: tensor for name, tensor in _flattened(made, "") if not self.kept or name in self.kept}
        if not found:
            raise BuildFailed("the module returns no tensors", where=self.where)
        return found

    def settle(self, feeds: Feeds) -> Feeds:
        """Run it twice, fix the names of its outputs, and return them; raise ``BuildFailed`` where they differ."""
        first = self(feeds)
        self.outputs = tuple(first)
        for name, array in self(feeds).items():
            if not np.array_equal(array, first[name], equal_nan=array.dtype.kind in "fc"):
                hint = "take what is random out of it, also dropout that does not ask self.training"
                raise BuildFailed(f"output {name!r} differs from one call to the next", where=self.where, hint=hint)
        return first


def _by_name(module: Any, names: Sequence[str], where: str) -> bool:
    """Whether ``forward`` takes its inputs by these names; in order where it knows none of them."""
    signature = inspect.signature(module.forward)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    known = [name for name in names if name in kinds and kinds[name] is not inspect.Parameter.VAR_POSITIONAL]
    open_ended = inspect.Parameter.VAR_KEYWORD in kinds.values()
    named = bool(known) and (open_ended or len(known) == len(names))
    if known and not named:
        wrong = next(name for name in names if name not in known)
        raise UsageError(f"forward has no input {wrong!r}", where=where, hint=suggest(wrong, kinds))
    try:
        signature.bind(**dict.fromkeys(names)) if named else signature.bind(*names)
    except TypeError as error:
        raise UsageError(f"forward{signature} does not fit the inputs: {error}", where=where) from error
    return named


def _flattened(made: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Tensors of whatever a module returns, named by keys, fields and places."""
    import torch

    if isinstance(made, torch.Tensor):
        yield name or "output_0", made
    elif made is not None:
        for key, part in _parts(made, name):
            yield from _flattened(part, f"{name}_{key}" if name else key)


def _parts(made: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(made, Mapping):
        yield from ((str(key), part) for key, part in made.items())
    elif hasattr(made, "_fields"):
        yield from zip(made._fields, made, strict=True)
    elif isinstance(made, list | tuple):
        yield from ((str(i) if name else f"output_{i}", part) for i, part in enumerate(made))
    elif dataclasses.is_dataclass(made):
        yield from ((field.name, getattr(made, field.name)) for field in dataclasses.fields(made))
    else:
        what = f"output {name or 'output_0'!r} is of type {type(made).__name__!r}, not a tensor"
        raise BuildFailed(what, hint="return tensors, or a tuple or dict of them")


def _names(found: list[str], inputs: list[str]) -> tuple[str, ...]:
    """Names of outputs: an output that is called like an input is told apart from it."""
    taken = {*found, *inputs}
    names = []
    for name in found:
        new = name
        while new in inputs or (new != name and new in taken):
            new = f"{new}_out"
        taken.add(new)
        names.append(new)
    return tuple(names)


# ---------------------------------------------------------------- export


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
