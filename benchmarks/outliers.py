"""What activation outliers do to int8, and what each remedy brings back: output SQNR of small pre-LN transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import measure

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.observe import Observe
from qexport.passes.base import Pass
from qexport.passes.dynamic import Dynamic
from qexport.passes.llm_int8 import LlmInt8
from qexport.passes.quantize import Quantize
from qexport.passes.smooth import Smooth

sys.path.append(str(measure.ROOT / "tests"))
import outlier_model  # it lies beside the tests, which share it

CPU, ENGINE = "ort-cpu", "tensorrt-rtx"
FACTOR, OFFSET = 200.0, 100.0
NOTE = (
    f"A pre-LN transformer of 4 blocks, hidden size 128, initialised as GPT-2 is; output SQNR in dB on 64 unseen "
    f"samples, 128 for calibration, and how many of the 24 linear layers are quantized. Columns: the model as it is; "
    f"two channels of every norm times {FACTOR:g} and the weights behind it divided by as much; "
    f"{OFFSET:g} added to every channel of the residual stream. The three compute the same numbers in float."
)


def main() -> None:
    """Print the table."""
    data, unseen = outlier_model.sentences(128, seed=1), outlier_model.sentences(64, seed=2)
    models = dict(variants())
    truth = outlier_model.outputs(models["no outliers"], unseen)
    for name, model in models.items():
        gap = outlier_model.decibel(truth, outlier_model.outputs(model, unseen)) if name != "no outliers" else 200.0
        assert gap > 100, f"{name}: the function changed, {gap:.0f} dB"  # 1e-5 relative
    rows = []
    for method, target, steps in methods(data):
        row: dict[str, Any] = {"method": method, "target": target}
        for name, model in models.items():
            found, count = result(model, steps, unseen)
            row[name] = f"{outlier_model.decibel(truth, found):.1f} ({count})"
        rows.append(row)
    measure.report("outliers", rows, NOTE)


def variants() -> Iterator[tuple[str, Any]]:
    """The model and two others that compute the same."""
    clean = outlier_model.transformer(hidden=128, blocks=4)
    yield "no outliers", clean
    wide = clean.clone()
    outlier_model.widen_norms(wide, FACTOR)
    yield "in norm outputs", wide
    lifted = clean.clone()
    outlier_model.lift_residual(lifted, "table", OFFSET)
    yield "in the residual stream", lifted


Step = Callable[[Any], Any]


def methods(data: Any) -> Iterator[tuple[str, str, Sequence[Step]]]:
    """Name, target and passes of each row."""
    for target in (ENGINE, CPU):
        calibrate, seen = Calibrate(data=data, target=target, method="minmax"), Observe(data=data, target=target)
        plain = Quantize(target=target, min_sqnr=0.0)
        yield "int8 on every sum, norm input and linear", target, [calibrate, plain, everywhere(data)]
        yield "int8 linears, per consumer", target, [calibrate, plain]
        yield "the same, layers under 22 dB in float", target, [calibrate, Quantize(target=target)]
        yield "SmoothQuant, then int8 linears", target, [seen, Smooth(target=target), calibrate, plain]
        yield "LLM.int8(), static range", target, [seen, LlmInt8(target=target, ranges="static")]
    yield "dynamic, per tensor", CPU, [Dynamic()]
    yield "dynamic, per token", CPU, [Dynamic(granularity="token")]
    yield "LLM.int8(), per token", CPU, [Observe(data=data, target=CPU), LlmInt8(target=CPU)]


def everywhere(data: Any) -> Step:
    """Quantizers on what sums and normalizations read."""

    def step(model: Any) -> None:
        outlier_model.quantize_all(model, data)

    return step


def result(model: Any, steps: Sequence[Step], unseen: Any) -> tuple[Any, int]:
    """Outputs after the steps, and how many nodes they quantized."""
    work, count = model.clone(), 0
    for step in steps:
        done = step(work)
        if isinstance(step, Pass) and step.quantizes:
            count += sum(decision.action == "quantized" for decision in done.decisions)
    return outlier_model.outputs(work, unseen), count


if __name__ == "__main__":
    main()
