"""How a sentence-transformers folder makes one vector of a sentence: ``modules.json`` and ``1_Pooling/config.json``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any

from qexport.errors import ModelInvalid
from qexport.exporter.families.folder import CONFIG, Folder

MODULES, POOLING = "modules.json", "1_Pooling"
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def read_pooling(folder: Folder, supported: Collection[str]) -> str:
    """Name of the pooling, one of ``supported``; ``mean`` where the folder does not say.

    Raises:
        ModelInvalid: Another pooling, several at once, or a module that is not known, such as a dense layer on top.
        UnsafeInput: The settings lie outside of the folder.
    """
    place = _place(folder)
    if place is None:
        return "mean"
    name = str(PurePosixPath(place) / CONFIG)
    modes = _modes(folder.json(name))
    if len(modes) != 1 or modes[0] not in supported:
        raise ModelInvalid(
            f"pooling {' + '.join(map(repr, modes))} is not supported",
            where=str(folder.path / name),
            hint=f"supported: {', '.join(supported)}",
        )
    return modes[0]


def _place(folder: Folder) -> str | None:
    """Name of the folder that holds the settings of the pooling."""
    if not folder.has(MODULES):
        return POOLING if folder.has(f"{POOLING}/{CONFIG}") else None
    where, place = str(folder.path / MODULES), None
    listed = folder.json(MODULES)
    for module in listed if isinstance(listed, list) else [None]:
        kind, path = _fields(module)
        if kind is None or path is None:
            raise ModelInvalid("not a list of modules with a type and a path", where=where)
        name = kind.rpartition(".")[2]
        if name not in KNOWN_MODULES:
            raise ModelInvalid(
                f"module {kind!r} is not supported", where=where, hint=f"supported: {', '.join(KNOWN_MODULES)}"
            )
        if name == "Pooling":
            place = path
    return place


def _fields(module: Any) -> tuple[str | None, str | None]:
    fields = [module.get(key) if isinstance(module, dict) else None for key in ("type", "path")]
    kind, path = (field if isinstance(field, str) else None for field in fields)
    return kind, path


def _modes(config: Any) -> list[str]:
    """Names of the poolings that are switched on, in either spelling of the settings."""
    if not isinstance(config, dict):
        return []
    named = config.get("pooling_mode")
    if named is None:
        named = [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    return [str(mode) for mode in named] if isinstance(named, list) else [str(named)]
