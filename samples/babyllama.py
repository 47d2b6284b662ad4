"""Turn a model of llama2.c into a Hugging Face folder.

    python samples/babyllama.py MODEL.bin TOKENIZER.model -o DIR

MODEL.bin is a file of llama2.c's first layout (version 0), TOKENIZER.model the sentencepiece model it was trained with.
EN10/BabyLlama has such a pair of 3.7 MB: 936,448 parameters, 105 characters for a vocabulary.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

Array = NDArray[np.float32]
SPACE = "\u2581"
UNKNOWN, CONTROL = 2, 3
"""Types of sentencepiece's pieces."""
BPE = 2
"""Its type of model."""


@dataclass(frozen=True)
class Sizes:
    """The header of a file, seven int32. ``vocabulary`` is below zero where the head has a matrix of its own."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    context: int

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.width // self.heads

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every part of the file, in order."""
        layers, width, inner, rows = self.layers, self.width, self.inner, abs(self.vocabulary)
        keys, table = self.key_heads * self.head, (self.context, self.head // 2)
        parts: dict[str, tuple[int, ...]] = {
            "embed_tokens": (rows, width),
            "input_layernorm": (layers, width),
            "self_attn.q_proj": (layers, width, width),
            "self_attn.k_proj": (layers, keys, width),
            "self_attn.v_proj": (layers, keys, width),
            "self_attn.o_proj": (layers, width, width),
            "post_attention_layernorm": (layers, width),
            "mlp.gate_proj": (layers, inner, width),
            "mlp.down_proj": (layers, width, inner),
            "mlp.up_proj": (layers, inner, width),
            "norm": (width,),
            "cosines": table,
            "sines": table,
        }
        return parts if self.vocabulary > 0 else {**parts, "lm_head": (rows, width)}


def read_model(data: bytes) -> tuple[Sizes, dict[str, Array]]:
    """The header and the parts; ValueError when they are not just what the file holds."""
    if len(data) < 28:
        raise ValueError("the file is shorter than the header of llama2.c")
    sizes = Sizes(*struct.unpack("<7i", data[:28]))
    whole = min(*list(vars(sizes).values())[:5], abs(sizes.vocabulary), sizes.context) > 0
    if not whole or sizes.width % (2 * sizes.heads) or sizes.heads % sizes.key_heads:
        raise ValueError(f"the file does not begin like one of llama2.c: {sizes}")
    parts = sizes.parts()
    ends = np.cumsum([np.prod(shape, dtype=np.int64) for shape in parts.values()])
    if len(data) != 28 + 4 * ends[-1]:
        raise ValueError(f"{sizes} needs {28 + 4 * ends[-1]} bytes, the file has {len(data)}")
    numbers = np.split(np.frombuffer(data, "<f4", offset=28), ends[:-1])
    return sizes, {name: part.reshape(shape) for (name, shape), part in zip(parts.items(), numbers, strict=True)}


def to_halves(weight: Array, head: int) -> Array:
    """Rows [heads * head, width] for rotary pairs (i, i + head / 2) instead of llama2.c's neighbours (2 i, 2 i + 1)."""
    pairs = weight.reshape(-1, head // 2, 2, weight.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def to_tensors(sizes: Sizes, parts: dict[str, Array]) -> dict[str, Array]:
    """The weights by the names that transformers has for a Llama."""
    tensors = {f"model.{name}.weight": parts[name] for name in ("embed_tokens", "norm")}
    if "lm_head" in parts:
        tensors["lm_head.weight"] = parts["lm_head"]
    for name, stacked in parts.items():
        if "proj" in name or name.endswith("layernorm"):
            turned = name in ("self_attn.q_proj", "self_attn.k_proj")
            for layer, weight in enumerate(stacked):
                tensors[f"model.layers.{layer}.{name}.weight"] = to_halves(weight, sizes.head) if turned else weight
    return tensors


def to_config(sizes: Sizes) -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_heads,
        "head_dim": sizes.head,
        "vocab_size": abs(sizes.vocabulary),
        "max_position_embeddings": sizes.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": sizes.vocabulary > 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: int for varints, bytes for all else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, data[at : at + size]
        at += size


@dataclass(frozen=True)
class Piece:
    """One entry of sentencepiece's vocabulary."""

    text: str
    score: float
    kind: int


def read_pieces(data: bytes) -> list[Piece]:
    """The vocabulary of a sentencepiece model; ValueError unless it is BPE over text as it is.

    Fields as in sentencepiece_model.proto: 1 pieces (1 text, 2 score, 3 type), 2 training (3 type of model),
    3 normalizer (1 name, 3 a space before the text, 4 superfluous spaces removed; both true if not said).
    """
    pieces, trainer, normalizer = [], dict[int, Any](), dict[int, Any]()
    for number, value in fields(data):
        if number == 1:
            piece = dict(fields(value))
            score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
            pieces.append(Piece(piece[1].decode(), score, piece.get(3, 1)))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(fields(value))
    if trainer.get(3) != BPE or normalizer.get(1) != b"identity" or not normalizer.get(3, 1) * normalizer.get(4, 1):
        raise ValueError("only sentencepiece models of type bpe with identity normalization and usual spaces are known")
    return pieces


def to_tokenizer(pieces: list[Piece]) -> Tokenizer:
    """The same vocabulary for ``tokenizers``: two neighbours merge where they make a piece, the best score first."""
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    merges = [
        (piece.text[:cut], piece.text[cut:])
        for piece in sorted(pieces, key=lambda piece: -piece.score)
        if piece.kind not in (UNKNOWN, CONTROL)
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in ids and piece.text[cut:] in ids
    ]
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback="<0x00>" in ids))
    steps = (
        normalizers.Strip(),
        normalizers.Replace(Regex(" {2,}"), " "),
        normalizers.Prepend(SPACE),
        normalizers.Replace(" ", SPACE),
    )
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return tokenizer


def convert(model: Path, tokenizer: Path, out: Path) -> None:
    """Write the folder ``out``; ValueError when the two files do not belong together."""
    sizes, parts = read_model(model.read_bytes())
    pieces = read_pieces(tokenizer.read_bytes())
    if len(pieces) != abs(sizes.vocabulary):
        raise ValueError(f"the tokenizer has {len(pieces)} pieces, the model {abs(sizes.vocabulary)} tokens")
    out.mkdir(parents=True, exist_ok=True)
    save_file(to_tensors(sizes, parts), out / "model.safetensors", metadata={"format": "pt"})
    to_tokenizer(pieces).save(str(out / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "model_max_length": sizes.context}
    for name, content in (
        ("config.json", to_config(sizes)),
        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2}),
        ("tokenizer_config.json", {**described, "clean_up_tokenization_spaces": False}),
    ):
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("tokenizer", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The new folder.")
def main(model: Path, tokenizer: Path, out: Path) -> None:
    """The command line."""
    try:
        convert(model, tokenizer, out)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
