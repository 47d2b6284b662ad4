"""Every family of Hugging Face folders: exported without torch, held against transformers, built as an engine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import numpy as np
import tensorrt_rtx
import torch
import transformers

import qexport
from qexport.calibration.reading.spec import keeps_cache
from qexport.calibration.running.execute import open_model
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.exporter.engines.profiles import derive_profile
from qexport.exporter.onnx_file import load_onnx

BATCH, TOKENS, SOURCE, COLUMNS = 2, 48, 24, 256
NOTE = (
    f"Random weights, 2 layers. Error: largest difference between the float32 export, read in whole rows ({BATCH} x "
    f"{TOKENS} tokens, one row padded), and transformers, as a share of the standard deviation of the output; the "
    "export's own proof is against numpy. Engine: fp16 export in TensorRT-RTX, built without a GPU and not run; "
    f"caches of {COLUMNS} columns."
)


@dataclass(frozen=True)
class Family:
    """One row: the class to save, the changes to its config, and what the graph is like."""

    name: str
    cls: str
    config: Mapping[str, Any] = field(default_factory=dict)
    output: str = "logits"


_WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {**_WIDE, "vocab_size": 200, "max_position_embeddings": 128}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 200}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
FAMILIES = (
    Family("BERT", "BertModel", _TEXT, "last_hidden_state"),
    Family("BERT, classes", "BertForSequenceClassification", {**_TEXT, "num_labels": 3}),
    Family("RoBERTa, tokens", "RobertaForTokenClassification", {**_TEXT, "num_labels": 5}),
    Family(
        "DistilBERT",
        "DistilBertModel",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 200},
        "last_hidden_state",
    ),
    Family("ViT, classes", "ViTForImageClassification", {**_WIDE, "image_size": 32, "patch_size": 8, "num_labels": 10}),
    Family("Llama", "LlamaForCausalLM", _GROUPED),
    Family("Llama, YaRN", "LlamaForCausalLM", {**_GROUPED, "rope_parameters": _YARN}),
    Family("Mistral, window 16", "MistralForCausalLM", {**_GROUPED, "sliding_window": 16}),
    Family("Qwen2", "Qwen2ForCausalLM", _GROUPED),
    Family("Qwen3", "Qwen3ForCausalLM", _GROUPED),
    Family("BitNet", "BitNetForCausalLM", _GROUPED),
    Family(
        "GPT-2", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 200}
    ),
    Family("T5", "T5ForConditionalGeneration", _T5),
    Family(
        "T5 1.1 (gated)",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
)


def main() -> None:
    """Save, export, compare and build every family."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        rows = [_row(family, Path(place) / str(number)) for number, family in enumerate(FAMILIES)]
    measure.report("families", rows, NOTE)


def _row(family: Family, place: Path) -> dict[str, str]:
    torch.manual_seed(0)
    cls = getattr(transformers, family.cls)
    model = cls(cls.config_class(**family.config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.05 * torch.randn_like(parameter))  # norms and biases, too
    model.save_pretrained(place / "source")
    start = time.perf_counter()
    result = qexport.export(place / "source", output=place / "float32")
    seconds = time.perf_counter() - start
    half = qexport.ExportOptions(dtype="float16")
    qexport.export(place / "source", output=place / "float16", options=half)
    engines = [_engine(place / "float16" / name) for name in result.parts]
    return {
        "family": family.name,
        "files": ", ".join(result.parts),
        "layout": result.layout,
        "checks of the export": str(len(result.verification.checks)),
        "export, s": f"{seconds:.1f}",
        "error to transformers": f"{_error(family, model, place / 'float32'):.0e}",
        "fp16 engine, layers": " + ".join(str(layers) for layers, _ in engines),
        "fp16 engine, s": " + ".join(f"{spent:.1f}" for _, spent in engines),
    }


def _error(family: Family, model: Any, folder: Path) -> float:
    feeds = _feeds(model.config)
    with torch.no_grad():
        truth = model(**{name: torch.tensor(array) for name, array in feeds.items()})[family.output].numpy()
    found = _run(folder, feeds)[family.output]
    shown = np.ones(truth.shape[:1], bool)
    if truth.ndim == 3 and "attention_mask" in feeds and "decoder_input_ids" not in feeds:
        shown = feeds["attention_mask"] != 0
    return float(np.abs(found - truth)[shown].max() / truth[shown].std())


def _feeds(config: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if hasattr(config, "image_size"):
        return {"pixel_values": rng.standard_normal((BATCH, 3, 32, 32), np.float32)}
    mask = (np.arange(TOKENS) < np.array([[TOKENS], [TOKENS - 11]])).astype(np.int64)
    feeds = {"input_ids": rng.integers(3, config.vocab_size, mask.shape), "attention_mask": mask}
    if config.is_encoder_decoder:
        feeds["decoder_input_ids"] = rng.integers(3, config.vocab_size, (BATCH, SOURCE))
    return feeds


def _run(folder: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the files answer; a decoder with a cache reads whole rows, behind its encoder where there is one."""
    model, given = load_onnx(folder / "model.onnx"), dict(feeds)
    if (folder / "encoder.onnx").is_file():
        encoded = open_model(load_onnx(folder / "encoder.onnx")).run(feeds)
        given = {**encoded, "input_ids": feeds["decoder_input_ids"], "encoder_attention_mask": feeds["attention_mask"]}
    given.setdefault("token_type_ids", np.zeros_like(given.get("input_ids", np.zeros(1, np.int64))))
    return open_model(model).run(given)


def _engine(path: Path) -> tuple[int, float]:
    """Layers and seconds of an engine."""
    model = load_onnx(path)
    sizes = {"sequence": TOKENS, "encoder_sequence": TOKENS, "max_seq": COLUMNS}
    profile = derive_profile(model.graph.inputs, [], max_batch=4, fixed=sizes)
    for name, shapes in profile.items():
        for axis, dim in enumerate(next(value for value in model.graph.inputs if value.name == name).shape or ()):
            if getattr(dim, "value", None) in ("sequence", "encoder_sequence"):
                shapes[0][axis] = 1
    frozen = (("max_seq", COLUMNS),) if keeps_cache(model) else ()
    built = build_engine(path, tensorrt_rtx, EngineOptions((profile,), frozen=frozen)).info
    return built.layers, built.seconds


if __name__ == "__main__":
    main()
