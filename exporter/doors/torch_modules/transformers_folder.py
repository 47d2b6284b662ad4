"""Encoders and vision models of a Hugging Face folder by way of transformers and torch: ``--via torch``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qexport.errors import EnvironmentMismatch, ModelInvalid, UsageError
from qexport.exporter.doors.inputs import AskedInput, Feeds, generate, sizes_for
from qexport.exporter.doors.safe_folder import GENERATING, demand_safe
from qexport.exporter.doors.torch_modules.callables import told
from qexport.exporter.doors.torch_modules.module import TorchOptions, TorchSource, export_module
from qexport.exporter.doors.torch_modules.subject import Subject
from qexport.exporter.doors.torch_modules.tensors import import_torch
from qexport.exporter.doors.torch_modules.trace import quiet
from qexport.exporter.families.folder import architecture
from qexport.exporter.steps import suggest
from qexport.passes.portable import IDS, MASK, TYPES


@dataclass(frozen=True, slots=True)
class Task:
    """Which class of transformers does it, and which of its outputs count.

    Attributes:
        loader: Name of the class.
        outputs: Names of the outputs to keep.
        ending: How classes of models end that were saved for it.
    """

    loader: str
    outputs: tuple[str, ...]
    ending: str


TASKS = {
    "classification": Task("AutoModelForSequenceClassification", ("logits",), "ForSequenceClassification"),
    "token-classification": Task("AutoModelForTokenClassification", ("logits",), "ForTokenClassification"),
    "masked-lm": Task("AutoModelForMaskedLM", ("logits",), "ForMaskedLM"),
    "question-answering": Task("AutoModelForQuestionAnswering", ("start_logits", "end_logits"), "ForQuestionAnswering"),
    "image-classification": Task("AutoModelForImageClassification", ("logits",), "ForImageClassification"),
    "embedding": Task("AutoModel", ("last_hidden_state",), ""),
}
"""By name; the first whose ending fits is the one that a folder was saved for."""


def load_transformers(folder: str | Path, task: str | None = None, asked: TorchOptions | None = None) -> TorchSource:
    """Load a folder with transformers, offline and without code or pickles, in float32, and export the module.

    Args:
        folder: ``config.json`` and safetensors.
        task: One of ``TASKS``; the one that the folder was saved for when ``None``.
        asked: Inputs and data that replace those of the model's kind; opset.

    Raises:
        UsageError: Unknown task, or inputs that nobody described.
        UnsafeInput: See ``demand_safe``.
        ModelInvalid: transformers does not know or cannot read it, weights of the task are missing, or it generates.
        BuildFailed: As ``load_torch``.
        EnvironmentMismatch: torch or transformers is missing.
    """
    path = Path(folder)
    config = demand_safe(path)
    named = architecture(config)
    if named.endswith(GENERATING) or config.get("is_encoder_decoder"):
        hint = "optimum's exporter writes it with its cache: --via optimum"
        raise ModelInvalid(
            f"{named or 'a model'} generates, which this road does not export", where=str(path), hint=hint
        )
    wanted = task or next(name for name, one in TASKS.items() if named.endswith(one.ending))
    if wanted not in TASKS:
        raise UsageError(f"unknown task {wanted!r}", where=str(path), hint=suggest(wanted, TASKS))
    module, missing = _loaded(path, TASKS[wanted])
    options = asked or TorchOptions()
    if not options.inputs:
        inputs = _inputs(module, str(path))
        options = replace(options, inputs=inputs, data=options.data or _padded(inputs))
    if missing:
        _demand_unused(module, missing, options, path, wanted)
    return export_module(module, options, None, str(path), TASKS[wanted].outputs)


def _demand_unused(module: Any, missing: Sequence[str], asked: TorchOptions, path: Path, task: str) -> None:
    """Raise ``ModelInvalid`` where a weight that the folder lacks, and that is NaN therefore, shows in an output."""
    feeds = asked.data or generate(asked.inputs, sizes_for(asked.inputs))
    outputs = Subject(module, asked.inputs, str(path), TASKS[task].outputs)(feeds)
    if any(np.isnan(array).any() for array in outputs.values()):
        what = f"{len(missing)} weights that {task!r} needs are missing, such as {missing[0]!r}"
        raise ModelInvalid(what, where=str(path), hint="choose a task that it was trained for")


def _loaded(path: Path, task: Task) -> tuple[Any, Sequence[str]]:
    """The module, and names of the weights that the folder does not have: they are NaN, so that using them shows."""
    torch = import_torch("models by way of transformers")
    try:
        with quiet():
            import transformers
    except ImportError as error:
        raise EnvironmentMismatch("transformers is missing", hint="pip install 'qexport[export]'") from error
    try:
        with quiet():
            module, told_of = getattr(transformers, task.loader).from_pretrained(
                str(path.resolve()),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                attn_implementation="eager",
            )
    except Exception as error:
        raise ModelInvalid(f"transformers cannot read it: {told(error)}", where=str(path)) from error
    missing = sorted(told_of["missing_keys"])
    weights = dict(module.named_parameters())
    with torch.no_grad():
        for name in missing:
            if name in weights:
                weights[name].fill_(float("nan"))
    return module, missing


def _inputs(module: Any, where: str) -> tuple[AskedInput, ...]:
    """The inputs of a model that reads text or images."""
    config, ids = module.config, np.dtype(np.int64)
    if module.main_input_name == IDS:
        top = {IDS: config.vocab_size - 1, MASK: 1, TYPES: getattr(config, "type_vocab_size", 1) - 1}
        taken = inspect.signature(module.forward).parameters
        return tuple(
            AskedInput(name, ids, ("batch", "sequence"), (0, most))
            for name, most in top.items()
            if name in taken and most > 0
        )
    size = getattr(config, "image_size", None)
    if module.main_input_name == "pixel_values" and size:
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return (AskedInput("pixel_values", np.dtype(np.float32), ("batch", channels, high, wide)),)
    hint = f"describe each, such as {module.main_input_name}:float32[batch,3,224,224]"
    raise UsageError("its config does not tell the shapes of its inputs", where=where, hint=hint)


def _padded(inputs: tuple[AskedInput, ...]) -> Feeds:
    """Generated inputs whose rows end at different places, as a tokenizer pads them."""
    feeds = generate(inputs, sizes_for(inputs))
    if MASK in feeds:
        rows, length = feeds[MASK].shape
        ends = length - np.arange(rows) * (length // (rows + 1))
        feeds[MASK] = (np.arange(length) < ends[:, None]).astype(np.int64)
    return feeds
