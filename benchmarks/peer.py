"""Another tool in the interpreter that has it: ``python benchmarks/peer.py quantize|embed|serve ...``.

``quantize METHOD FOLDER`` writes ``FOLDER/model.*`` and prints what it cost as one JSON object, ``embed`` writes the
embeddings of the STS-B test sentences, ``serve`` runs a batch for each number that it reads and prints the seconds.
Needs numpy and the tool alone: ``peers.py`` has put the tokens into a file. Every tool gets the same 512 sentences.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import sentences

PLACE = measure.WORK / "peers"
TOKENS = PLACE / "tokens.json"
FLOAT = measure.WORK / "minilm/model.onnx"
SLOW = ["SkipLayerNormFusion"]  # what qexport.runtime switches off
Run = Callable[[sentences.Feeds], Any]


class Reader:
    """Calibration data as onnxruntime, modelopt and neural-compressor ask for it."""

    def __init__(self, feeds: Iterable[sentences.Feeds]) -> None:
        self.feeds = list(feeds)
        self.rewind()

    def rewind(self) -> None:
        """Begin again."""
        self.rest = iter(self.feeds)

    def get_next(self) -> sentences.Feeds | None:
        """The next batch."""
        return next(self.rest, None)

    def get_first(self) -> sentences.Feeds:
        """The batch whose shapes modelopt looks at."""
        return self.feeds[0]


def by_length() -> list[sentences.Feeds]:
    """Batches of 32 sentences of like length."""
    return [feeds for _, feeds in sentences.batches(stored("calibration"))]


def alone() -> list[sentences.Feeds]:
    """Every sentence alone, without padding."""
    return [sentences.pad([tokens]) for tokens in stored("calibration")]


def at_64() -> list[sentences.Feeds]:
    """Batches of 16 padded to 64 tokens, for methods that need one shape."""
    tokens = stored("calibration")
    return [sentences.pad(tokens[start : start + 16], 64) for start in range(0, len(tokens), 16)]


def stored(split: str) -> list[list[int]]:
    """The tokens that ``peers.py`` left."""
    tokens: list[list[int]] = json.loads(TOKENS.read_text(encoding="utf-8"))[split]
    return tokens


def attention_products() -> list[str]:
    """Names of the matrix products of two activations."""
    import onnx

    graph = onnx.load(FLOAT, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights]


def modelopt(feeds: Callable[[], list[sentences.Feeds]], settings: Mapping[str, Any], folder: Path) -> None:
    """``modelopt.onnx.quantization.quantize``: Q/DQ placed for TensorRT."""
    from modelopt.onnx.quantization import quantize

    reader = Reader(feeds())
    quiet = {"calibration_eps": ["cpu"], "log_level": "ERROR"}
    quantize(str(FLOAT), output_path=str(folder / "model.onnx"), calibration_data_reader=reader, **quiet, **settings)


def modelopt_linears(method: str, feeds: Callable[[], list[sentences.Feeds]], folder: Path) -> None:
    """The same for linear layers alone, the rest in float32."""
    only = {"op_types_to_quantize": ["MatMul", "Gemm"], "nodes_to_exclude": attention_products()}
    rest = {"disable_mha_qdq": True, "high_precision_dtype": "fp32"}
    modelopt(feeds, {"calibration_method": method, **only, **rest}, folder)


def neural_compressor(symmetric: bool, alpha: float | str | None, folder: Path) -> None:
    """onnx-neural-compressor: linear layers in Q/DQ format, per channel, with SmoothQuant where there is an alpha."""
    from onnx_neural_compressor import quantization as q
    from onnx_neural_compressor.quantization import config, quantize

    options = {"WeightSymmetric": True, "DedicatedQDQPair": True}
    options |= {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"], "ActivationSymmetric": symmetric}
    settings = {
        "calibration_data_reader": Reader(by_length() if alpha is None else at_64()),
        "calibration_sampling_size": 512,
        "quant_format": q.QuantFormat.QDQ,
        "activation_type": q.QuantType.QInt8 if symmetric else q.QuantType.QUInt8,
        "weight_type": q.QuantType.QInt8,
        "per_channel": True,
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "nodes_to_exclude": attention_products(),
        "execution_provider": "CPUExecutionProvider",
        "extra_options": options,
    }
    if alpha is None:
        quantize(str(FLOAT), str(folder / "model.onnx"), config.StaticQuantConfig(**settings))
    else:
        options["SmoothQuant"] = True  # without it a SmoothQuantConfig does not smooth, and without the class no alpha
        made = config.SmoothQuantConfig(alpha=alpha, calib_iter=512, **settings)
        quantize(str(FLOAT), str(folder / "model.onnx"), made)


def neural_compressor_default(folder: Path) -> None:
    """onnx-neural-compressor as it comes, but in Q/DQ format."""
    from onnx_neural_compressor import quantization as q
    from onnx_neural_compressor.quantization import config, quantize

    settings = {"calibration_data_reader": Reader(by_length()), "calibration_sampling_size": 512}
    quantize(
        str(FLOAT), str(folder / "model.onnx"), config.StaticQuantConfig(quant_format=q.QuantFormat.QDQ, **settings)
    )


def nncf(form: str, symmetric: bool, alpha: float | None, folder: Path) -> None:
    """``nncf.quantize`` for transformers, with SmoothQuant and bias correction, of the ONNX or the OpenVINO model."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

    smooth = AdvancedSmoothQuantParameters() if alpha is None else AdvancedSmoothQuantParameters(matmul=alpha)
    settings = {
        "subset_size": 512,
        "model_type": nncf.ModelType.TRANSFORMER,
        "preset": nncf.QuantizationPreset.PERFORMANCE if symmetric else nncf.QuantizationPreset.MIXED,
        "advanced_parameters": AdvancedQuantizationParameters(smooth_quant_alphas=smooth),
    }
    data = nncf.Dataset(alone())
    if form == "onnx":
        import onnx

        onnx.save(nncf.quantize(onnx.load(FLOAT), data, **settings), folder / "model.onnx")
    else:
        import openvino

        made = nncf.quantize(openvino.Core().read_model(FLOAT), data, **settings)
        openvino.save_model(made, folder / "model.xml", compress_to_fp16=False)


def openvino_float(folder: Path) -> None:
    """The float model as OpenVINO stores it."""
    import openvino

    openvino.save_model(openvino.Core().read_model(FLOAT), folder / "model.xml", compress_to_fp16=False)


METHODS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "modelopt": ("nvidia-modelopt", partial(modelopt, by_length, {})),
    "modelopt-entropy-linears": ("nvidia-modelopt", partial(modelopt_linears, "entropy", alone)),
    "modelopt-max-linears": ("nvidia-modelopt", partial(modelopt_linears, "max", by_length)),
    "inc": ("onnx-neural-compressor", neural_compressor_default),
    "inc-s8-linears": ("onnx-neural-compressor", partial(neural_compressor, True, None)),
    "inc-u8-linears": ("onnx-neural-compressor", partial(neural_compressor, False, None)),
    "inc-s8-smooth": ("onnx-neural-compressor", partial(neural_compressor, True, 0.8)),
    "inc-u8-smooth": ("onnx-neural-compressor", partial(neural_compressor, False, 0.8)),
    "nncf-onnx": ("nncf", partial(nncf, "onnx", True, None)),
    "nncf": ("nncf", partial(nncf, "openvino", False, None)),
    "nncf-smooth": ("nncf", partial(nncf, "openvino", False, 0.7)),
    "openvino": ("openvino", openvino_float),
}
"""The distribution that a method belongs to, and what it does."""


def quantize(method: str, folder: Path) -> dict[str, Any]:
    """Run a method; peak resident set in bytes."""
    package, make = METHODS[method]
    start = time.perf_counter()
    make(folder)
    seconds = time.perf_counter() - start
    version = f"{package} {importlib.metadata.version(package)}"
    return {"seconds": seconds, "rss": measure.peak_rss(), "bytes": size(folder), "version": version}


def size(folder: Path) -> int:
    """Bytes of a model with everything that lies beside it under its name."""
    return sum(path.stat().st_size for path in folder.glob("model.*"))


def opened(runtime: str, model: Path, threads: int) -> Run:
    """What runs a model: ``onnxruntime``, ``qexport.runtime``, ``openvino``, or ``openvino-bf16``."""
    if runtime.startswith("openvino"):
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "bf16" if "bf16" in runtime else "f32"}
        settings |= {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        names = [value.any_name for value in compiled.inputs]
        return lambda feeds: compiled({name: feeds[name] for name in names})[sentences.HIDDEN]
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 4
    disabled = SLOW if runtime == "qexport.runtime" else []
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    names = [value.name for value in session.get_inputs()]
    return lambda feeds: session.run([sentences.HIDDEN], {name: feeds[name] for name in names})[0]


def embed(runtime: str, model: Path, place: Path) -> dict[str, Any]:
    """Write the embeddings as float32 numbers, row by row."""
    sentences.pooled_by(opened(runtime, model, 0), stored("test")).astype(np.float32).tofile(place)
    return {}


def serve(runtime: str, model: Path) -> None:
    """Run the batches whose numbers come in, on one thread; the first line says that the model is loaded."""
    feeds = [feeds for _, feeds in sentences.batches(stored("test"))]
    run = opened(runtime, model, 1)
    print("ready", flush=True)
    for line in sys.stdin:
        batch = feeds[int(line)]
        start = time.perf_counter()
        run(batch)
        print(time.perf_counter() - start, flush=True)


def answer(facts: Mapping[str, Any]) -> None:
    """Print an object on a line of its own: progress bars leave theirs unfinished."""
    print("\n" + json.dumps(facts))


def main(arguments: Sequence[str]) -> None:
    """Do one thing."""
    verb, subject, *places = arguments
    if verb == "serve":
        serve(subject, Path(places[0]))
    elif verb == "embed":
        answer(embed(subject, *map(Path, places)))
    else:
        answer(quantize(subject, Path(places[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
