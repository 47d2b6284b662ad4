"""Peak memory of exporting a Llama folder of 1 GB in shards: it must stay near the largest shard, proof included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import measure
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARDS = 4
ALLOWED = "1.5 x largest shard + 300 MB"
NOTE = (
    "A Llama of random weights in four safetensors files, `qexport export` from start to end in a process of its own, "
    "the comparison with the definition of the model in numpy included. Memory is the peak resident set (VmHWM), pages "
    f"of mapped files counted. Allowed: {ALLOWED}."
)
TYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CASES = (  # stored as, written as, hidden size, inner size, layers, vocabulary
    ("float32", "float32", 1536, 4096, 8, 32000),
    ("float32", "float16", 1536, 4096, 8, 32000),
    ("float16", "float16", 2048, 5632, 9, 32000),
    ("bfloat16", "bfloat16", 2048, 5632, 9, 32000),
    ("float16", "float32", 2048, 5632, 9, 32000),
)
HEAD = 64


def main() -> None:
    """Export each folder."""
    measure.WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    for stored, written, *sizes in CASES:
        folder, out = measure.WORK / f"llama-{stored}", measure.WORK / "llama-exported"
        shards = make_folder(folder, TYPES[stored], *sizes)
        seconds, result = export(folder, out, written)
        allowed = 1.5 * max(shards) + 300e6
        checks = result["verification"]["checks"]
        rows.append(
            {
                "stored": stored,
                "written": written,
                "shards, MB": f"{len(shards)}, {sum(shards) / 1e6:.0f} together",
                "largest, MB": f"{max(shards) / 1e6:.0f}",
                "peak RSS, MB": f"{result['peak_rss_bytes'] / 1e6:.0f}",
                "allowed, MB": f"{allowed / 1e6:.0f}",
                "holds": "yes" if result["peak_rss_bytes"] <= allowed else "no",
                "seconds": f"{seconds:.0f}",
                "worst rms": f"{max(check['rms'] for check in checks):.1e}",
            }
        )
        shutil.rmtree(out)
        shutil.rmtree(folder)
    measure.report("export_memory", rows, NOTE)


def make_folder(folder: Path, dtype: np.dtype, hidden: int, inner: int, layers: int, vocabulary: int) -> list[int]:
    """Write config and shards; returns the size of each shard in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    named = list(tensors(hidden, inner, layers, vocabulary))
    total = sum(int(np.prod(shape)) for _, shape in named)
    placed: dict[str, str] = {}
    held: dict[str, np.ndarray] = {}
    shards, done, rng = [], 0, np.random.default_rng(0)
    for name, shape in named:
        held[name] = made(rng, shape).astype(dtype)
        done += held[name].size
        if done >= total * (len(shards) + 1) / SHARDS:
            file = f"model-{len(shards) + 1:05}-of-{SHARDS:05}.safetensors"
            save_file(held, folder / file)
            placed |= dict.fromkeys(held, file)
            shards.append((folder / file).stat().st_size)
            held = {}
    index = json.dumps({"metadata": {}, "weight_map": placed})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return shards


def tensors(hidden: int, inner: int, layers: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as transformers saves them."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        scope = f"model.layers.{layer}"
        for part, out in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            yield f"{scope}.self_attn.{part}_proj.weight", (out, hidden)
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            yield f"{scope}.mlp.{part}_proj.weight", shape
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield f"{scope}.{part}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def made(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that keep the size of what goes through them; norms near one."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    return 1 + 0.1 * noise if len(shape) == 1 else noise * np.float32(shape[-1] ** -0.5)


def export(folder: Path, out: Path, dtype: str) -> tuple[float, dict]:
    """Seconds and the result of the command."""
    command = [sys.executable, "-m", "qexport", "export", str(folder), "-o", str(out), "--dtype", dtype, "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return time.perf_counter() - start, json.loads(done.stdout)


if __name__ == "__main__":
    main()
