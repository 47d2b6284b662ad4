"""Write the golden files, with torch and transformers: ``python tests/golden/make.py minilm|decoders FOLDER``.

``minilm`` wants the model's folder, ``decoders`` wants samples/decoder; see README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForCausalLM

HERE = Path(__file__).parent
MAX_LENGTH = 128
DECODERS = ("target", "stories260k")
LENGTHS = (96, 61)  # tokens of the rows; the second is padded where they run together
EVERY = 12  # logits of every twelfth position are kept
WITH_HIDDEN = 4  # the first sentences keep their whole last_hidden_state
SENTENCES = [
    "A man is playing a harp.",
    "Zürich – 東京: “naïve café”, Ελληνικά, ещё раз… 🙂👍🏽",
    "The committee, after many hours of debate about the budget, the roads and the school, agreed on nothing. " * 12,
    "",
    "ok",
    "A man is playing a keyboard.",
    "Is this a question? Yes! (Or: no; maybe -- who knows...)",
    "1234567890 3.14159 1e-9 0x7f 50% $20 #7 a_b c+d=e",
    "ALL CAPS AND camelCase and snake_case_identifiers",
    "   spaces\tand\nnew lines   around   ",
    "!!!",
    "antidisestablishmentarianism floccinaucinihilipilification",
    "नमस्ते दुनिया, مرحبا بالعالم, שלום עולם",
    "The quick brown fox jumps over the lazy dog while the slow green turtle watches from under a large old tree.",
    "e\u0301 and \u00e9 are the same letter, \u200b and this one has no width",
    "[MASK] [SEP] <script>alert('x')</script> http://example.org/?q=1&r=2",
]


def decoders(folder: Path) -> None:
    """Run two pieces of held-out text, each alone and without padding, in float32 on the CPU with eager attention."""
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    arrays: dict[str, np.ndarray] = {}
    for name in DECODERS:
        tokens = Tokenizer.from_file(str(folder / name / "tokenizer.json")).encode(text).ids
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for row, length in enumerate(LENGTHS):
            ids = tokens[row * 1000 :][:length]
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].numpy()
            arrays[f"{name}_ids_{row}"] = np.array(ids, np.int64)
            arrays[f"{name}_logits_{row}"] = logits[::EVERY]
            arrays[f"{name}_best_{row}"] = logits.argmax(1)
    np.savez_compressed(HERE / "decoders.npz", **arrays)


def minilm(folder: Path) -> None:
    """Run every sentence alone, without padding, in float32 on the CPU with the eager attention."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = np.zeros((len(SENTENCES), MAX_LENGTH), np.int64)
    mask = np.zeros_like(ids)
    arrays: dict[str, np.ndarray] = {"sentences": np.array(SENTENCES), "input_ids": ids, "attention_mask": mask}
    embeddings = []
    for row, sentence in enumerate(SENTENCES):
        tokens = tokenizer.encode(sentence).ids
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        with torch.inference_mode():
            hidden = model(torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.int64)).last_hidden_state[0]
        embeddings.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
        if row < WITH_HIDDEN:
            arrays[f"last_hidden_state_{row}"] = hidden.numpy()
    np.savez_compressed(HERE / "minilm-16.npz", **arrays, sentence_embedding=np.stack(embeddings))


if __name__ == "__main__":
    {"minilm": minilm, "decoders": decoders}[sys.argv[1]](Path(sys.argv[2]))
