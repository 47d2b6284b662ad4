"""A torch module that is called like a graph: arrays by name in, arrays by name out."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import BuildFailed, UsageError
from qexport.exporter.doors.inputs import AskedInput, Feeds
from qexport.exporter.doors.torch_modules.callables import told
from qexport.exporter.doors.torch_modules.tensors import to_array, to_tensor
from qexport.exporter.steps import suggest


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
