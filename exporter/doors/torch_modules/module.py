"""A torch module, found by ``module:callable`` or ``file.py:callable``, becomes a graph with named dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import BuildFailed, UsageError
from qexport.exporter.doors.inputs import AskedInput, Feeds, describe, generate, resize, sizes_for, sizes_of
from qexport.exporter.doors.origin import Reference
from qexport.exporter.doors.torch_modules.callables import call
from qexport.exporter.doors.torch_modules.subject import Subject
from qexport.exporter.doors.torch_modules.tensors import import_torch, to_array
from qexport.exporter.doors.torch_modules.trace import export

OPSETS = range(20, 25)


@dataclass(frozen=True)
class TorchOptions:
    """What a caller may say about a torch module.

    Attributes:
        inputs: The inputs, see ``parse_inputs``. Without them the examples that the callable returns tell: their first
            axes are the dimension ``batch`` where all have the same size there, everything else is fixed.
        data: Real inputs by name, to export and verify with; generated where there are none.
        opset: Version of the ONNX operators, 20 to 24.
    """

    inputs: tuple[AskedInput, ...] = ()
    data: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    opset: int = 20


@dataclass(frozen=True)
class TorchSource:
    """A torch module as a graph, and itself to compare with.

    Attributes:
        model: The graph; its weights share memory with the module.
        reference: Runs the module itself, in eval mode.
        inputs: The inputs as they were described or found out.
        feeds: Inputs to compare on: the caller's, the callable's or generated ones.
        trials: The same, then at other sizes of the free dimensions, 1 among them.
        notes: What a person should know about the export, in whole sentences without a full stop.
    """

    model: ir.Model
    reference: Reference
    inputs: tuple[AskedInput, ...]
    feeds: Feeds
    trials: tuple[Feeds, ...]
    notes: tuple[str, ...] = ()


def load_torch(source: str, asked: TorchOptions) -> TorchSource:
    """Call ``module:callable`` or ``path/to/file.py:callable``, which runs that code, and export what it returns.

    The callable returns a ``torch.nn.Module``, or a module and example inputs: a dict or tuple of tensors.

    Raises:
        UsageError: No such module, file or callable; it returns something else; inputs are not described.
        DataInvalid: Data does not fit the described inputs.
        BuildFailed: The module fails on its inputs, gives two answers to one question, or torch cannot export it.
        EnvironmentMismatch: torch, or a package that the module needs, is missing.
    """
    import_torch("torch modules")
    module, examples = _unpacked(call(source), source)
    return export_module(module, asked, examples, source)


def export_module(
    module: Any, asked: TorchOptions, examples: Any, where: str, outputs: Sequence[str] = ()
) -> TorchSource:
    """Export a module that is there already; as ``load_torch``.

    Args:
        module: The module; it goes to CPU memory and eval mode.
        asked: The caller's options.
        examples: A dict or tuple of tensors, or ``None``.
        where: What messages call it.
        outputs: Names of the outputs to keep; all of them where there are none.
    """
    if asked.opset not in OPSETS:
        hint = f"{OPSETS[0]} to {OPSETS[-1]} are written"
        raise UsageError(f"opset {asked.opset} cannot be written", where=where, hint=hint)
    inputs, known = _inputs(module, asked, _arrays(module, examples, where), where)
    own = sizes_of(inputs, known, where) if known else {}
    feeds = known or generate(inputs, sizes_for(inputs))
    subject = Subject(module, inputs, where, outputs)
    subject.settle(feeds)
    sizes = sizes_for(inputs, own)
    model, notes = export(subject, resize(inputs, feeds, sizes), asked.opset)
    others, refused = _other_sizes(subject, feeds)
    return TorchSource(model, subject, inputs, feeds, (feeds, *others), (*notes, *refused))


def _unpacked(made: Any, where: str) -> tuple[Any, Any]:
    """The module and the examples in what a callable returned."""
    import torch

    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        what = f"returns {type(module).__name__!r}, not a torch.nn.Module"
        raise UsageError(what, where=where, hint="return a module, or a module and a dict or tuple of tensors")
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError("returns a scripted module", where=where, hint="return the module that was scripted")
    return module, examples


def _arrays(module: Any, examples: Any, where: str) -> Feeds:
    """Examples by name; those in a tuple are called like the parameters of ``forward``."""
    import torch

    if examples is None:
        return {}
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    if not isinstance(examples, Mapping | tuple | list):
        what = f"the examples are of type {type(examples).__name__!r}"
        raise UsageError(what, where=where, hint="return a dict or tuple of tensors beside the module")
    if not isinstance(examples, Mapping):
        names = _parameters(module)
        examples = {(names[i] if i < len(names) else f"input_{i}"): each for i, each in enumerate(examples)}
    for name, each in examples.items():
        if not isinstance(each, torch.Tensor):
            what = f"example {name!r} is of type {type(each).__name__!r}"
            raise UsageError(what, where=where, hint="return a dict or tuple of tensors beside the module")
    return {str(name): np.array(to_array(each.cpu())) for name, each in examples.items()}


def _parameters(module: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, one in inspect.signature(module.forward).parameters.items() if one.kind in kinds]


def _inputs(module: Any, asked: TorchOptions, examples: Feeds, where: str) -> tuple[tuple[AskedInput, ...], Feeds]:
    """The inputs, and values for all of them where there are any: data before examples."""
    data = {name: np.asarray(array) for name, array in asked.data.items()}
    if not asked.inputs:
        known = data or examples
        if not known:
            takes = ", ".join(_parameters(module)) or "what it is given"
            hint = f"describe each, such as 'x:float32[batch,3,32,32]'; forward takes {takes}"
            raise UsageError("nothing says what its inputs are", where=where, hint=hint)
        return describe(known), known
    names = [one.name for one in asked.inputs]
    if not data and examples and set(examples).isdisjoint(names) and len(examples) == len(names):
        examples = dict(zip(names, examples.values(), strict=True))
    return asked.inputs, data or examples


def _other_sizes(subject: Subject, feeds: Feeds) -> tuple[list[Feeds], list[str]]:
    """The feeds at other sizes that the module itself takes, and a note for those it does not."""
    inputs = subject.inputs
    now = sizes_of(inputs, feeds, subject.where)
    first = {one.shape[0] for one in inputs if one.shape}
    alone = {name: 1 if name in first else size for name, size in now.items()}
    more = {name: size + 1 if name in first else size + 8 for name, size in now.items()}
    made: list[Feeds] = []
    notes: list[str] = []
    for sizes in {tuple(sizes.items()): sizes for sizes in (now, alone, dict.fromkeys(now, 1), more)}.values():
        trial = resize(inputs, feeds, sizes)
        try:
            subject(trial)
        except BuildFailed as error:
            notes += [error.what] * (sizes is more)
        else:
            made.append(trial)
    return made[1:], notes
