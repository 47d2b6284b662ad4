"""What must hold of a Hugging Face folder before code of other packages opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qexport.errors import ModelInvalid, UnsafeInput, UsageError
from qexport.exporter.doors.pickled import SUFFIXES
from qexport.exporter.families.folder import CONFIG, Folder, demand_no_code
from qexport.safe_io import demand_inside

GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSeq2SeqLM")
"""How classes of models that generate text end."""


def demand_safe(path: Path) -> dict[str, Any]:
    """Return the config of a folder whose files neither lead outside nor run code.

    Raises:
        UsageError: No folder, or it has no config.json.
        UnsafeInput: It names code of its own (``auto_map``), its weights are pickles, or a link leads out of it.
        ModelInvalid: The config is no JSON object, or there are no weights.
    """
    if not path.is_dir():
        raise UsageError("no such folder", where=str(path), hint="give a folder with config.json and safetensors")
    config = Folder(path).json(CONFIG)
    if not isinstance(config, dict):
        raise ModelInvalid("not a JSON object", where=str(path / CONFIG))
    files = sorted(file for file in path.rglob("*") if not file.is_dir())
    for file in files:
        demand_inside(file, path)
    demand_no_code(path, config)
    if not any(file.suffix == ".safetensors" for file in path.iterdir()):
        pickle = next((file.name for file in files if file.suffix in SUFFIXES), None)
        if pickle is None:
            raise ModelInvalid("there are no weights", where=str(path), hint="a folder has *.safetensors")
        hint = "save them as safetensors: model.save_pretrained(folder)"
        raise UnsafeInput(f"the weights are a pickle, which is not read ({pickle})", where=str(path), hint=hint)
    return config


def files_of(path: Path) -> list[Path]:
    """The files of a folder that the model was read from."""
    return [path / CONFIG, *sorted(path.glob("*.safetensors"))]
