"""One quantization method in a process of its own: ``python benchmarks/methods.py METHOD FOLDER [CALIBRATION]``.

Writes ``FOLDER/model.onnx`` and prints what it cost as one JSON object: ``seconds`` of calibrating and quantizing,
``rss``, the peak resident set until then in bytes, ``bytes`` of the file; for our rows also the engine.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import measure

FLOAT = measure.WORK / "minilm/model.onnx"
SENTENCES = measure.SAMPLES / "data/stsb-calibration.csv"
RESNET = measure.SAMPLES / "resnet20"
SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}
# The best setting found for encoders: linear layers only, a Q/DQ pair for each consumer, none behind a product.
LINEARS = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"], "DedicatedQDQPair": True}


class Watch:
    """A progress that notes the peak resident set at the end of each stage of a build."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Run one stage."""
        yield lambda n=1: None
        self.peaks[name] = measure.peak_rss()


def ours(model: Path, recipe: str, target: str, folder: Path, calibration: Path) -> dict[str, Any]:
    """``qexport.build`` without any flag but the target."""
    import qexport
    from qexport.exporter.options import BuildOptions
    from qexport.runtime.memory import return_freed_blocks

    return_freed_blocks()  # as the command line does
    watch = Watch()
    without = ("export.engine=false",) if target == "tensorrt" else ()  # its builder needs a GPU
    options = BuildOptions(target=target, output=folder, progress=watch, set=without)
    result = qexport.build(model, recipe=recipe, calib=calibration, options=options)
    engine = result.engine
    return {
        "seconds": sum(step.seconds for step in result.steps),
        "rss": watch.peaks["recipe"],
        "bytes": result.bytes_after,
        "build_seconds": result.seconds,
        "engine_bytes": engine.bytes if engine else None,
        "engine_seconds": engine.seconds if engine else None,
    }


def exported(folder: Path) -> dict[str, Any]:
    """The float model, as our front door builds it from the Hugging Face folder."""
    import onnx_ir as ir

    from qexport.exporter.load import load_model

    start = time.perf_counter()
    model = load_model(measure.minilm_folder())
    ir.save(model, folder / "model.onnx")
    return cost(folder, start)


def cost(folder: Path, start: float) -> dict[str, Any]:
    """What a method outside of qexport cost."""
    seconds, size = time.perf_counter() - start, (folder / "model.onnx").stat().st_size
    return {"seconds": seconds, "rss": measure.peak_rss(), "bytes": size}


def static(
    source: Path, feeds: Callable[[], Iterable[dict[str, Any]]], settings: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """``quantize_static`` of onnxruntime: Q/DQ format, int8 weights per channel, float bias."""
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.rest = iter(feeds())

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    unsigned = settings.get("unsigned", False)
    linears = settings.get("linears", False)
    start = time.perf_counter()
    q.quantize_static(
        source,
        folder / "model.onnx",
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"] if linears else None,
        nodes_to_quantize=weighted(source) if linears else None,
        per_channel=True,
        activation_type=q.QuantType.QUInt8 if unsigned else q.QuantType.QInt8,
        weight_type=q.QuantType.QInt8,
        calibrate_method=q.CalibrationMethod[settings.get("method", "MinMax")],
        extra_options={
            **({"WeightSymmetric": True} if unsigned else SYMMETRIC),
            "QuantizeBias": False,
            **(LINEARS if linears else {}),
        },
    )
    return cost(folder, start)


def weighted(source: Path) -> list[str]:
    """Names of the matrix products with a constant weight."""
    import onnx

    graph = onnx.load(source, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants]


def dynamic(source: Path, folder: Path) -> dict[str, Any]:
    """``quantize_dynamic`` of onnxruntime with int8 weights per channel; TensorRT cannot read the result."""
    from onnxruntime import quantization as q

    start = time.perf_counter()
    q.quantize_dynamic(source, folder / "model.onnx", per_channel=True, weight_type=q.QuantType.QInt8)
    return cost(folder, start)


def by_length() -> Iterable[dict[str, Any]]:
    """Batches of 32 sentences of like length: the quickest way through onnxruntime's MinMax."""
    import sentences

    return [feeds for _, feeds in sentences.batches(sentences.calibration_tokens())]


def at_64() -> Iterable[dict[str, Any]]:
    """Batches padded to 64 tokens: onnxruntime's entropy method needs one shape for all."""
    import sentences

    tokens = sentences.calibration_tokens()
    return [sentences.pad(tokens[start : start + 16], 64) for start in range(0, len(tokens), 16)]


def images() -> Iterable[dict[str, Any]]:
    """The calibration images of CIFAR-10."""
    import images

    return images.batches(RESNET / "calibration.npz")


def minilm(target: str, folder: Path, calibration: Path = SENTENCES, recipe: str = "int8") -> dict[str, Any]:
    """Our main road with the sentence encoder."""
    return ours(measure.minilm_folder(), recipe, target, folder, calibration)


def resnet(target: str, folder: Path, calibration: Path = RESNET / "calibration.npz") -> dict[str, Any]:
    """Our main road with the image classifier."""
    return ours(RESNET / "resnet20.onnx", str(RESNET / "int8.toml"), target, folder, calibration)


METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "float": exported,
    "qexport-tensorrt-rtx": partial(minilm, "tensorrt-rtx"),
    "qexport-ort-cpu": partial(minilm, "ort-cpu"),
    "qexport-float32-ort-cpu": partial(minilm, "ort-cpu", recipe="float32"),
    "qexport-int8-dynamic": partial(minilm, "ort-cpu", recipe="int8-dynamic"),
    "qexport-smoothquant-o1": partial(minilm, "ort-cpu", recipe="smoothquant-o1"),
    "qexport-smoothquant-o2": partial(minilm, "ort-cpu", recipe="smoothquant-o2"),
    "qexport-smoothquant-o3": partial(minilm, "tensorrt-rtx", recipe="smoothquant-o3"),
    "ort-s8-minmax": partial(static, FLOAT, by_length, {}),
    "ort-s8-minmax-linears": partial(static, FLOAT, by_length, {"linears": True}),
    "ort-s8-entropy": partial(static, FLOAT, at_64, {"method": "Entropy"}),
    "ort-s8-entropy-linears": partial(static, FLOAT, at_64, {"method": "Entropy", "linears": True}),
    "ort-u8s8-minmax-linears": partial(static, FLOAT, by_length, {"linears": True, "unsigned": True}),
    "ort-dynamic": partial(dynamic, FLOAT),
    "resnet20-qexport-tensorrt-rtx": partial(resnet, "tensorrt-rtx"),
    "resnet20-qexport-tensorrt": partial(resnet, "tensorrt"),
    "resnet20-qexport-ort-cpu": partial(resnet, "ort-cpu"),
    "resnet20-ort-s8-minmax": partial(static, RESNET / "resnet20.onnx", images, {}),
    "resnet20-ort-s8-entropy": partial(static, RESNET / "resnet20.onnx", images, {"method": "Entropy"}),
}


def run(method: str) -> tuple[Path, dict[str, Any]]:
    """Run a method in a child process; returns its model and what it cost."""
    folder = measure.WORK / ("minilm" if method == "float" else method)
    return folder / "model.onnx", measure.run_child("methods.py", method, str(folder))


def main(arguments: Sequence[str]) -> None:
    """Run one method here."""
    method, folder, *more = arguments
    place = Path(folder)
    shutil.rmtree(place, ignore_errors=True)
    if "qexport" in method:
        place.parent.mkdir(parents=True, exist_ok=True)
    else:
        place.mkdir(parents=True)
    print(json.dumps(METHODS[method](place, *map(Path, more))))


if __name__ == "__main__":
    main(sys.argv[1:])
