"""Zeros and cuts: layer error of 2:4 by criterion, and quality, size and speed against what is cut out.

``python benchmarks/sparsity.py [errors|curves] [NAME ...]`` measures one table or both, or the rows whose names hold
one of ``NAME``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import onnx_ir as ir

PADDED = 128  # tokens, where rows of padding count
CLEANED = ("raise-opset", "cleanup", "fuse-layer-norm", "fuse-rms-norm", "fuse-gelu", "fold-batch-norm")
SPARSE: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "repair": False},
    "magnitude + least squares": {"criterion": "magnitude"},
    "gradient": {"criterion": "gradient", "repair": False},
    "gradient + least squares": {"criterion": "gradient"},
    "Wanda": {"criterion": "wanda", "repair": False},
    "Wanda + least squares": {"criterion": "wanda"},
    "SparseGPT": {"criterion": "sparsegpt", "repair": False},
    "SparseGPT + least squares": {"criterion": "sparsegpt"},
    "SparseGPT + least squares, layer by layer": {"criterion": "sparsegpt", "sequential": True},
    "the same, neurons in another order": {"criterion": "sparsegpt", "sequential": True, "permute": True},
    "the same, rows of padding counted": {"criterion": "sparsegpt", "sequential": True, "padded": True},
}
CUTS: dict[str, tuple[str, tuple[float, ...]]] = {
    "heads": ("minilm", (0.9, 0.75, 0.5, 0.25)),
    "neurons": ("minilm", (0.9, 0.7, 0.5, 0.3)),
    "layers": ("minilm", (0.84, 0.67, 0.5)),
    "channels": ("resnet20", (0.9, 0.8, 0.65, 0.5)),
}
PLAIN = {"heads": (0.75, 0.5), "neurons": (0.7, 0.5), "channels": (0.8,), "layers": (0.84, 0.67)}  # also without repair
ERRORS_NOTE = (
    "all-MiniLM-L6-v2, 2:4 in all 36 layers, 512 calibration sentences, no training. Layer error: squared error of a "
    "layer's output over its square on the calibration rows, mean of the layers, of the layer's own inputs as they are "
    "when it is pruned. Rows of padding, of which sentences filled up to 128 tokens mostly consist, are all alike and "
    "easily fitted: counting them makes the error smaller and the model no better. Spearman x100 on the full STS-B "
    "test set and cosines to fp32's embeddings."
)
CURVES_NOTE = (
    "What is cut out for good, no training, 512 calibration samples. MiniLM: Spearman x100 on the full STS-B test set; "
    "ResNet-20: top-1 of 1000 test images. Share: of heads, neurons, layers, or of all multiplications (channels), "
    "that may stay. Bytes: of the float32 weights. Speed: median of the pairwise ratios to the uncut model in "
    "onnxruntime on the CPU, one thread, 32 sentences or 100 images, with the 10 % and 90 % quantiles."
)


def main(arguments: Sequence[str]) -> None:
    """Measure what was named, or everything."""
    if arguments[:1] == ["--one"]:
        print(json.dumps(ROWS[arguments[1]](*arguments[2:])))
        return
    parts = [name for name in ROWS if name in arguments[:1]] or list(ROWS)
    chosen = [name for name in arguments if name not in ROWS]
    if "errors" in parts:
        names = [name for name in ("float32", *SPARSE) if not chosen or any(part in name for part in chosen)]
        measure.report(
            "sparsity_errors", [measure.run_child("sparsity.py", "--one", "errors", n) for n in names], ERRORS_NOTE
        )
    if "curves" in parts:
        kinds = [kind for kind in CUTS if not chosen or kind in chosen]
        rows = [row for kind in kinds for row in measure.run_child("sparsity.py", "--one", "curves", kind)["rows"]]
        measure.report("sparsity_curves", rows, CURVES_NOTE)
        _draw(rows)


def _jobs(kind: str) -> list[tuple[float, bool]]:
    """Share and repair of every row of a kind, the uncut model first."""
    shares = CUTS[kind][1]
    return [
        (1.0, False),
        *((share, done) for share in shares for done in (True, False) if done or share in PLAIN[kind]),
    ]


def errors(name: str) -> measure.Row:
    """One row of the table of layer errors, in this process."""
    import ablation

    from qexport.calibration.sparsify import SPARSITY_KEY, Sparsify
    from qexport.passes.pipeline import run

    subject = ablation.minilm(["test"])
    asked = dict(SPARSE.get(name, {}))
    samples: Any = ablation.bound(subject, subject.recipe)["data"]
    if asked.pop("padded", False):
        samples = [_padded(sample) for sample in samples]
    step = Sparsify(data=samples, **({"sequential": False} | asked))
    start = time.perf_counter()
    model, _ = run(subject.source.model, _cleanup() if name == "float32" else [*_cleanup(), ("sparsify", step)])
    seconds = time.perf_counter() - start
    losses = [node.meta[SPARSITY_KEY].left for node in model.graph if SPARSITY_KEY in node.meta]
    if np.isnan(losses).any():  # without data nothing was measured; the same mask is, before it is repaired
        measured, _ = run(subject.source.model, [*_cleanup(), ("sparsify", replace(step, repair=True, ridge=1.0))])
        losses = [node.meta[SPARSITY_KEY].masked for node in measured.graph if SPARSITY_KEY in node.meta]
    found = subject.score(model, "ort-cpu")
    return {
        "2:4 by": name,
        "layer error": f"{np.mean(losses):.4f}" if losses else None,
        "worst layer": f"{np.max(losses):.4f}" if losses else None,
        "Spearman": f"{found['test: Spearman x100']:.2f}",
        "mean cosine": f"{found['test: mean cosine']:.4f}",
        "worst cosine": f"{found['test: worst cosine']:.3f}",
        "layers": str(len(losses)),
        "seconds": f"{seconds:.0f}",
    }


def _padded(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sentence filled up with masked tokens."""
    return {name: np.pad(array, (0, max(PADDED - len(array), 0))) for name, array in sample.items()}


def _cleanup() -> list[tuple[str, Any]]:
    """The exact steps that come first in every recipe."""
    from qexport.exporter.steps import find_pass

    return [(name, find_pass(name, "benchmark")()) for name in CLEANED]


def curves(kind: str) -> measure.Row:
    """All rows of a kind of cut, in this process."""
    import ablation

    from qexport.passes.pipeline import run

    name, _ = CUTS[kind]
    subject = ablation.minilm(["test"]) if name == "minilm" else ablation.resnet()
    plain, _ = run(subject.source.model, _cleanup())
    return {"rows": [_cut(kind, subject, plain, share, repair=repair) for share, repair in _jobs(kind)]}


def _cut(kind: str, subject: Any, plain: ir.Model, share: float, *, repair: bool) -> measure.Row:
    """One row of the table of cuts."""
    import ablation

    from qexport.exporter.proof.latency import measure as paired
    from qexport.exporter.steps import find_pass
    from qexport.passes.pipeline import parameters, run
    from qexport.passes.target import find_target

    options = {"data": ablation.bound(subject, subject.recipe)["data"], "keep": share, "repair": repair}
    steps = [] if share == 1 else [(kind, find_pass(kind, "benchmark")(**options)), *_cleanup()[1:2]]
    start = time.perf_counter()
    model, records = run(plain, steps)
    seconds = time.perf_counter() - start
    found = subject.score(model, "ort-cpu")
    units = [d.units for record in records for d in record.decisions if d.units is not None]
    latency = paired(plain, model, _feeds(CUTS[kind][0]), find_target("ort-cpu"))
    before, after = parameters(plain), parameters(model)
    print(f"{kind} {share} {repair}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "model": subject.name,
        "cut": kind,
        "share": f"{share:g}",
        "repair": "yes" if repair else "no",
        "stay": "{} of {}".format(*map(sum, zip(*units, strict=True))) if units else "all",
        "task": f"{found['test: Spearman x100' if subject.name == 'MiniLM' else 'top-1, %']:.2f}",
        "mean cosine": f"{found['test: mean cosine']:.4f}",
        "worst cosine": f"{found['test: worst cosine']:.3f}",
        "parameters": f"{after / 1e6:.3f} M ({after / before:.0%})",
        "bytes": f"{_bytes(model) / 1e6:.2f} MB",
        "speed": f"{latency.speedup:.2f}x ({latency.speedup_low:.2f} to {latency.speedup_high:.2f})",
        "seconds": f"{seconds:.0f}",
    }


def _bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _feeds(name: str) -> dict[str, Any]:
    """A batch of middling sentences, or of images."""
    import images
    import methods
    import sentences

    if name == "resnet20":
        return dict(images.batches(methods.RESNET / "test.npz")[0])
    rows = list(
        sentences.batches(
            sentences.tokenize(sentences.read_column(measure.SAMPLES / "data/stsb-test.csv", "sentence1"))
        )
    )
    return dict(rows[len(rows) // 2][1])


def _draw(rows: Sequence[measure.Row]) -> None:
    """Task metric and mean cosine against the share of parameters, and speed, a picture for each model."""
    from matplotlib.figure import Figure

    for model in dict.fromkeys(row["model"] for row in rows):
        figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
        axes = figure.subplots(1, 3)
        for kind in dict.fromkeys(row["cut"] for row in rows if row["model"] == model):
            of_kind = [row for row in rows if row["cut"] == kind]
            for repair, style in (("yes", "o-"), ("no", "x:")):
                chosen = [row for row in of_kind if row["repair"] == repair or row["share"] == "1"]
                if len(chosen) < 2:
                    continue
                share = [_percent(row["parameters"]) for row in chosen]
                label = kind if repair == "yes" else f"{kind}, no repair"
                for axis, numbers in zip(axes, zip(*map(_numbers, chosen), strict=True), strict=True):
                    axis.plot(share, numbers, style, label=label)
        for axis, title in zip(axes, ("task metric", "mean cosine to fp32", "speed against fp32"), strict=True):
            axis.set(title=title, xlabel="parameters left, %")
            axis.invert_xaxis()
            axis.grid(linewidth=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
        figure.suptitle(f"{model}: what is cut out, no training", fontsize=10)
        figure.savefig(measure.RESULTS / f"sparsity-{str(model).lower()}.svg", metadata={"Date": None})


def _percent(text: str) -> float:
    return float(text.split("(")[1].rstrip("%)"))


def _numbers(row: measure.Row) -> tuple[float, float, float]:
    return float(row["task"]), float(row["mean cosine"]), float(str(row["speed"]).split("x")[0])


ROWS = {"errors": errors, "curves": curves}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main(sys.argv[1:])
