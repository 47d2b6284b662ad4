"""Whether a tokenizer and a model know the same words."""

from __future__ import annotations

import onnx_ir as ir

from qexport.calibration.reading.text import load_tokenizer
from qexport.errors import DataInvalid
from qexport.exporter.families.folder import TOKENIZER, Folder
from qexport.passes.portable import IDS
from qexport.safe_io import demand_inside


def count_words(model: ir.Model) -> int | None:
    """Rows of the table that ``input_ids`` are looked up in; ``None`` where nothing is seen to do that."""
    ids = next((value for value in model.graph.inputs if value.name == IDS), None)
    uses = [] if ids is None else [use for use in ids.uses() if use.node.op_type == "Gather" and use.idx == 1]
    tables = [table.const_value for use in uses if (table := use.node.inputs[0]) is not None]
    return next((int(table.shape.numpy()[0]) for table in tables if table is not None), None)


def check_vocabulary(folder: Folder, vocab_size: int) -> None:
    """Look whether every number that the folder's tokenizer gives is a row of the model's table of words.

    A folder without ``tokenizer.json`` passes.

    Raises:
        DataInvalid: The largest number is too large, or the file is no tokenizer.
        UnsafeInput: The file lies outside of the folder.
    """
    path = folder.path / TOKENIZER
    demand_inside(path, folder.path)
    if not path.is_file():
        return
    numbers = load_tokenizer(path, None).get_vocab(with_added_tokens=True)
    word, largest = max(numbers.items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size:
        what = f"the tokenizer gives numbers up to {largest} ({word!r}), the model has words 0 to {vocab_size - 1}"
        hint = "use the tokenizer that the model was trained with, or the model resized to the tokenizer"
        raise DataInvalid(what, where=str(path), hint=hint)
