"""Llama-style models of a given shape, and folders that transformers reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pair.corpus import END

CONTEXT = 1024


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. Written ``width x layers x inner x heads x key heads``, as in ``512x5x1408x8x2``."""

    width: int
    layers: int
    inner: int
    heads: int
    key_heads: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape that ``text`` writes; ValueError if it writes none."""
        sizes = [int(size) for size in text.split("x")]
        if len(sizes) != 5 or min(sizes) < 1 or sizes[0] % sizes[3] or sizes[3] % sizes[4]:
            raise ValueError(f"{text!r} is no shape: width x layers x inner x heads x key heads, each a divisor")
        return cls(*sizes)


TARGET = "512x5x1408x8x2"
DRAFT = "192x2x512x6x2"


def build(shape: Shape, tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """A fresh model in float32, embeddings tied, weights drawn with ``seed``."""
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def parameters(model: torch.nn.Module) -> int:
    """How many numbers are learned, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder: float16 safetensors, configuration, tokenizer. ``model`` stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.config.dtype = torch.float16
    half.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "bos_token": END,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described) + "\n", encoding="utf-8")


def load(folder: Path) -> LlamaForCausalLM:
    """The model in ``folder``, in float32 for judging."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
