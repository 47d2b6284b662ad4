"""Names of the classes that a head tells apart, from config.json to the metadata of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qexport.errors import ModelInvalid
from qexport.passes.portable import LABELS


def label_notes(config: Mapping[str, Any], where: str, count: int) -> dict[str, str]:
    """Metadata that name the labels in the order of their ``count`` logits: as in config.json, numbered without it.

    Raises:
        ModelInvalid: They are not those of 0, 1, ... up to the number of logits.
    """
    told = config.get("id2label")
    if told is None:
        told = {number: f"LABEL_{number}" for number in range(count)}  # as transformers calls them
    numbered = {str(key): str(name) for key, name in told.items()} if isinstance(told, dict) else {}
    if set(numbered) != {str(number) for number in range(count)}:
        what = f"field 'id2label' names {len(numbered)} labels, the weights tell {count} apart"
        raise ModelInvalid(what, where=where, hint='name all of "0", "1", ...')
    return {LABELS: json.dumps([numbered[str(number)] for number in range(count)], ensure_ascii=False)}
