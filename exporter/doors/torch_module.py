"""A torch module, found by ``module:callable`` or ``file.py:callable``, becomes a graph with named dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import onnx_ir as ir
from numpy.typing import NDArray

from qexport.exporter.doors.inputs import AskedInput, Feeds

Reference: TypeAlias = Callable[[Mapping[str, NDArray[Any]]], Feeds]
"""Arrays by input name to arrays by output name."""


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
    raise NotImplementedError
