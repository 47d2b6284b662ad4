"""How a sentence-transformers folder goes on behind its encoder: ``modules.json`` and the folders that it lists.

``Transformer, Pooling, Dense ..., Normalize`` makes one vector of a sentence (Reimers & Gurevych 2019); without the
Pooling, as PyLate saves it, one of every token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pydantic import Field, ValidationError

from qexport.errors import ModelInvalid, UnsafeInput
from qexport.exporter.families.folder import CONFIG, PICKLES, WEIGHTS, Folder
from qexport.exporter.families.settings import Settings, misfit
from qexport.runtime.embedding.form import FLAGS

MODULES, POOLING = "modules.json", "1_Pooling"
KNOWN_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
"""In the order that they may come in."""
ACTIVATIONS = {"Identity": None, "Tanh": "Tanh", "ReLU": "Relu", "Sigmoid": "Sigmoid"}
"""Classes of torch that a Dense module may end with, as operators."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer on top.

    Attributes:
        place: Its folder.
        inputs: Width of what it reads.
        outputs: Width of what it makes.
        bias: Whether it has one.
        activation: Operator at its end, if any.
    """

    place: str
    inputs: int
    outputs: int
    bias: bool
    activation: str | None


@dataclass(frozen=True, slots=True)
class Modules:
    """What comes behind the encoder.

    Attributes:
        pooling: Folder of the settings of the pooling; ``None`` where there are none.
        dense: Linear layers, one after the other, behind the pooling if there is one.
        pools: Whether they make one vector of a sentence.
    """

    pooling: str | None = None
    dense: tuple[Dense, ...] = ()
    pools: bool = True


def read_modules(folder: Folder) -> Modules:
    """What the folder says, which may be nothing.

    Raises:
        ModelInvalid: No list of modules, or one that is not known or at another place than it is here.
        UnsafeInput: The settings lie outside of the folder.
    """
    if not folder.has(MODULES):
        return Modules(POOLING if folder.has(f"{POOLING}/{CONFIG}") else None)
    where, listed = str(folder.path / MODULES), folder.json(MODULES)
    found = [_module(module, where) for module in (listed if isinstance(listed, list) else [None])]
    names = [name for name, _ in found]
    if names != sorted(names, key=KNOWN_MODULES.index) or names.count("Pooling") > 1:
        hint = f"supported: {', '.join(KNOWN_MODULES)}, in this order"
        raise ModelInvalid(f"modules in the order {', '.join(names)}", where=where, hint=hint)
    dense = tuple(_dense(folder, place) for name, place in found if name == "Dense")
    places = dict(found)
    return Modules(places.get("Pooling"), dense, "Pooling" in names or not dense)


def _module(module: Any, where: str) -> tuple[str, str]:
    """Name and folder of one module."""
    fields = [module.get(key) if isinstance(module, dict) else None for key in ("type", "path")]
    kind, path = fields
    if not isinstance(kind, str) or not isinstance(path, str):
        raise ModelInvalid("not a list of modules with a type and a path", where=where)
    name = kind.rpartition(".")[2]
    if name not in KNOWN_MODULES:
        hint = f"supported: {', '.join(KNOWN_MODULES)}"
        raise ModelInvalid(f"module {kind!r} is not supported", where=where, hint=hint)
    return name, path


def read_pooling(folder: Folder, modules: Modules, supported: Collection[str]) -> str:
    """Name of the pooling, one of ``supported``; ``mean`` where the folder does not say.

    Raises:
        ModelInvalid: Another pooling, or several at once.
        UnsafeInput: The settings lie outside of the folder.
    """
    if modules.pooling is None:
        return "mean"
    name = str(PurePosixPath(modules.pooling) / CONFIG)
    modes = _modes(folder.json(name))
    if len(modes) != 1 or modes[0] not in supported:
        raise ModelInvalid(
            f"pooling {' + '.join(map(repr, modes))} is not supported",
            where=str(folder.path / name),
            hint=f"supported: {', '.join(supported)}",
        )
    return modes[0]


def _modes(config: Any) -> list[str]:
    """Names of the poolings that are switched on, in either spelling of the settings."""
    if not isinstance(config, dict):
        return []
    named = config.get("pooling_mode")
    if named is None:
        named = [mode for flag, mode in FLAGS.items() if config.get(flag)] or "mean"
    return [str(mode) for mode in named] if isinstance(named, list) else [str(named)]


class _DenseConfig(Settings):
    in_features: int = Field(gt=0)
    out_features: int = Field(gt=0)
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False


def _dense(folder: Folder, place: str) -> Dense:
    """Read the settings of one Dense module; its weights are looked for, not read."""
    name = str(PurePosixPath(place) / CONFIG)
    where = str(folder.path / name)
    try:
        config = _DenseConfig.model_validate(folder.json(name))
    except ValidationError as error:
        raise misfit(error, where) from error
    package, _, activation = config.activation_function.rpartition(".")
    if not package.startswith("torch.nn.") or activation not in ACTIVATIONS or config.use_residual:
        what = "use_residual" if config.use_residual else f"activation_function {config.activation_function!r}"
        hint = f"supported: {', '.join(ACTIVATIONS)}, without use_residual"
        raise ModelInvalid(f"{what} of a Dense module is not supported", where=where, hint=hint)
    _refuse_pickles(folder, place)
    return Dense(place, config.in_features, config.out_features, config.bias, ACTIVATIONS[activation])


def _refuse_pickles(folder: Folder, place: str) -> None:
    pickle = next((name for name in PICKLES if folder.has(f"{place}/{name}")), None)
    if pickle is not None and not folder.has(f"{place}/{WEIGHTS}"):
        what = f"the weights of a Dense module are a pickle, which is not read ({pickle})"
        raise UnsafeInput(what, where=str(folder.path / place), hint="save them as safetensors")
