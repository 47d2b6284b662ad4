"""Hugging Face folders made of numbers: saved, read, built into graphs and answered by references."""

from __future__ import annotations

import json

from helpers import session
from safetensors.numpy import save_file

from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING
from qexport.exporter.load import open_folder
from qexport.exporter.references import find_reference


def save(path, config, tensors, metadata=None):
    """A folder with a checkpoint."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata=metadata)
    return path


def read(path):
    """Its settings, and the folder."""
    return json.loads((path / "config.json").read_text()), Folder(path)


def graph_of(path, form=SCORING):
    """The graph that is built from it."""
    config, folder, build = open_folder(path)
    return build(config, folder, form)


def truth_of(path, feeds, form=SCORING):
    """What the reference answers, by name."""
    return find_reference(*read(path), form)(feeds)


def answers(model, feeds):
    """What onnxruntime makes of a graph, by name."""
    running = session(model)
    return dict(zip([value.name for value in running.get_outputs()], running.run(None, feeds), strict=True))
