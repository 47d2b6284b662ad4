"""Logits of exported decoders against transformers, position by position, read the way a runtime reads them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import measure
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, logging

import qexport
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions

DECODERS = ("target", "stories260k", "stories3m")
WINDOWS, WINDOW = 8, 250
PREFILL, SINGLE, WIDE = 100, 50, 5
NOTE = (
    f"{WINDOWS * WINDOW} positions of samples/decoder/heldout.txt: {WINDOWS} windows of {WINDOW} tokens, of which "
    f"{PREFILL} are read at once, {SINGLE} one by one, the others in steps of {WIDE} of which every third is first "
    "read with other tokens and rolled back. transformers reads each window at once, in float32."
)


def main() -> None:
    """Compare every sample decoder, in both float types."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name in DECODERS:
            rows += [_row(name, dtype, Path(place) / f"{name}-{dtype}") for dtype in ("float32", "float16")]
    measure.report("export_logits", rows, NOTE)


def _row(name: str, dtype: str, out: Path) -> dict[str, str]:
    folder = measure.SAMPLES / "decoder" / name
    qexport.export(folder, output=out, options=qexport.ExportOptions(dtype=dtype))
    decoder = Decoder(out / "model.onnx", SessionOptions(threads=1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst, same, spread = 0.0, 0, []
    for ids in _windows(folder):
        with torch.no_grad():
            truth = model(torch.tensor(ids[None])).logits[0].numpy()
        found = read(decoder, ids)
        worst = max(worst, float(np.abs(found - truth).max()))
        same += int((found.argmax(1) == truth.argmax(1)).sum())
        spread.append(float(truth.std()))
    return {
        "decoder": f"samples/decoder/{name}",
        "family": model.config.model_type,
        "type": dtype,
        "positions": f"{WINDOWS * WINDOW}",
        "largest error": f"{worst:.1e}",
        "deviation of the logits": f"{np.mean(spread):.1f}",
        "same best token": f"{same}",
    }


def _windows(folder: Path) -> np.ndarray:
    text = (measure.SAMPLES / "decoder/heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[: WINDOWS * WINDOW]
    return np.array(ids).reshape(WINDOWS, WINDOW)


def read(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] of one window: at once, one by one, and in steps that are sometimes taken back."""
    decoder.reset()
    found = [decoder.extend(ids[None, :PREFILL])]
    found += [decoder.extend(ids[None, i : i + 1]) for i in range(PREFILL, PREFILL + SINGLE)]
    for number, start in enumerate(range(PREFILL + SINGLE, len(ids), WIDE)):
        step = ids[None, start : start + WIDE]
        if number % 3 == 0:
            decoder.extend(step[:, ::-1])
            decoder.rollback(start)
        found.append(decoder.extend(step))
    return np.concatenate([logits[0] for logits in found])


if __name__ == "__main__":
    main()
