"""all-MiniLM-L6-v2 in int8: our rows beside onnxruntime's, one float model, one slice of data, one scorer, one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import measure
import methods
import sentences

ROWS = {
    "float": "fp32",
    "qexport-tensorrt-rtx": "**qexport `--int8`, tensorrt-rtx**",
    "qexport-ort-cpu": "**qexport `--int8`, ort-cpu**",
    "ort-s8-minmax-linears": "onnxruntime s8 MinMax, linear layers only",
    "ort-s8-minmax": "onnxruntime s8 MinMax, all operators (its default)",
    "ort-s8-entropy-linears": "onnxruntime s8 Entropy, linear layers only",
    "ort-s8-entropy": "onnxruntime s8 Entropy, all operators",
    "ort-dynamic": "onnxruntime dynamic (TensorRT cannot read it)",
}
NOTE = (
    "all-MiniLM-L6-v2, STS-B test, 1379 pairs; 512 calibration sentences from STS-B train. Cosine to fp32's embedding. "
    "Seconds and peak memory of calibrating and quantizing, each method in a process of its own; one run."
)


def main(chosen: Sequence[str]) -> None:
    """Run the methods that were named, or all of them; the float model is always made first."""
    names = [name for name in ROWS if name == "float" or not chosen or name in chosen]
    made = {name: methods.run(name) for name in names}
    scores = sentences.score(made["float"][0], [model for model, _ in made.values()])
    rows = []
    for (name, (_, cost)), found in zip(made.items(), scores, strict=True):
        plain = name == "float"
        engine = cost.get("engine_bytes")
        rows.append(
            {
                "": ROWS[name],
                "Spearman x100": f"{found['spearman']:.2f}",
                "mean cosine": f"{found['mean']:.4f}",
                "worst cosine": f"{found['worst']:.3f}",
                "calibrate + quantize, s": None if plain else f"{cost['seconds']:.1f}",
                "peak RSS, GB": None if plain else f"{cost['rss'] / 1e9:.2f}",
                "file, MB": f"{cost['bytes'] / 1e6:.1f}",
                "engine, MB": f"{engine / 1e6:.1f}" if engine else None,
                "engine build, s": f"{cost['engine_seconds']:.1f}" if engine else None,
            }
        )
    measure.report("quality", rows, NOTE)


if __name__ == "__main__":
    main(sys.argv[1:])
