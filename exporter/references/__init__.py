"""What a checkpoint computes, in numpy: the second opinion that every export is held against.

One module per family, written from the definition of the model and apart from the code that builds its graph; weights
are read one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from numpy.typing import NDArray

from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import Form
from qexport.exporter.lookup import look_up

Feeds: TypeAlias = Mapping[str, NDArray[Any]]
Reference: TypeAlias = Callable[[Feeds], dict[str, NDArray[Any]]]
"""Inputs of the plain graph by name to its outputs by name, float32."""

REFERENCES = {
    "bert": "qexport.exporter.references.encoder:open_reference",
    "bitnet": "qexport.exporter.references.decoder:open_reference",
    "camembert": "qexport.exporter.references.encoder:open_reference",
    "distilbert": "qexport.exporter.references.encoder:open_reference",
    "gpt2": "qexport.exporter.references.gpt2:open_reference",
    "llama": "qexport.exporter.references.decoder:open_reference",
    "mistral": "qexport.exporter.references.decoder:open_reference",
    "mt5": "qexport.exporter.references.t5:open_reference",
    "qwen2": "qexport.exporter.references.decoder:open_reference",
    "qwen3": "qexport.exporter.references.decoder:open_reference",
    "roberta": "qexport.exporter.references.encoder:open_reference",
    "t5": "qexport.exporter.references.t5:open_reference",
    "vit": "qexport.exporter.references.vit:open_reference",
    "xlm-roberta": "qexport.exporter.references.encoder:open_reference",
}
"""``model_type`` to the function ``(config, folder, form) -> Reference``."""


REACHES = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3"), "qexport.exporter.references.decoder:reach"),
    **dict.fromkeys(("mt5", "t5"), "qexport.exporter.references.t5:reach"),
}
"""``model_type`` to the function ``(config) -> tokens``, see ``find_reach``."""


def find_reference(config: dict[str, Any], folder: Folder, form: Form) -> Reference:
    """The reference of a folder whose family is known.

    It has the weights that a graph in the type of ``form`` has, and computes with them in float32 or better.
    """
    found: Reference = look_up(REFERENCES[config["model_type"]])(config, folder, form)
    return found


def find_reach(config: dict[str, Any]) -> int:
    """How far apart two tokens may be before a model treats them in another way, as a window does; 0 without end."""
    home = REACHES.get(config["model_type"])
    return 0 if home is None else int(look_up(home)(config))
