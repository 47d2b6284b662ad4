"""One decoding step at 200 valid tokens: buffers of the portable layout against onnxruntime's own cache."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from safetensors.numpy import save_file

from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import Form
from qexport.exporter.families.llama import build
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions

VALID, ROUNDS, STEPS = 200, 41, 8
BUCKET, LARGE = 256, 2048
TIMED = ("bucket", "large", "own")
NOTE = (
    f"One thread; a step of one token with {VALID} tokens before it, in ms, median of {ROUNDS} rounds of {STEPS} steps "
    "that take turns in one run. `bucket`: the runtime's decoder, buffers of 256 columns. `2048`: the same with "
    "buffers of 2048 (1024 for the sample, which has no more positions). `own`: the same graph with onnxruntime's "
    "Attention reading past_key and past_value and giving back both longer by one, bound to memory of onnxruntime."
)


def main() -> None:
    """Time the sample decoder and one of a larger shape."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        shapes = {"samples/decoder/target": measure.SAMPLES / "decoder/target", "8 x 768": _made_up(Path(place))}
        for name, folder in shapes.items():
            rows.append(_row(name, folder))
    measure.report("decoder_step", rows, NOTE)


def _row(name: str, folder: Path) -> dict[str, str]:
    model = build(json.loads((folder / "config.json").read_text()), Folder(folder), Form(cached=True))
    data = ir.to_proto(model).SerializeToString()
    options = SessionOptions(threads=1)
    steps = {
        "bucket": _portable(Decoder(data, options, capacity=BUCKET)),
        "large": _portable(Decoder(data, options, capacity=LARGE)),
        "own": _own(ir.to_proto(with_own_cache(model)).SerializeToString(), folder),
    }
    times: dict[str, list[float]] = {key: [] for key in TIMED}
    for turn in range(ROUNDS):
        for key in TIMED if turn % 2 else reversed(TIMED):
            times[key].append(steps[key]())
    ms = {key: 1e3 * statistics.median(found) for key, found in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["bucket"], times["own"], strict=True))
    return {
        "decoder": name,
        "bucket 256, ms": f"{ms['bucket']:.3f}",
        "buffer 2048, ms": f"{ms['large']:.3f}",
        "own cache, ms": f"{ms['own']:.3f}",
        "bucket / own": f"{ratio:.2f}",
        "buffer 2048 / own": f"{ms['large'] / ms['own']:.2f}",
    }


def _portable(decoder: Decoder) -> Callable[[], float]:
    """Seconds of a step at ``VALID`` tokens."""
    ids = np.ones((1, VALID), np.int64)
    decoder.extend(ids)
    one = ids[:, :1]

    def step() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            decoder.extend(one)
        spent = (time.perf_counter() - start) / STEPS
        decoder.rollback(VALID)
        return spent

    return step


def _own(model: bytes, folder: Path) -> Callable[[], float]:
    """The same through Attention's own past, whose outputs are the next step's inputs."""
    config = json.loads((folder / "config.json").read_text())
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    past = [value for value in session.get_inputs() if value.name.startswith("past")]
    heads, dim = config["num_key_value_heads"], past[0].shape[3]
    empty = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, 0, dim), np.float32))

    def run(ids: np.ndarray, first: int, caches: list[ort.OrtValue]) -> list[ort.OrtValue]:
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("position_ids", np.arange(first, first + ids.shape[1])[None])
        for value, cache in zip(past, caches, strict=True):
            binding.bind_ortvalue_input(value.name, cache)
        for value in session.get_outputs():
            binding.bind_output(value.name)
        session.run_with_iobinding(binding)
        found = binding.get_outputs()
        found[0].numpy()
        return found[1:]

    filled = run(np.ones((1, VALID), np.int64), 0, [empty] * len(past))
    one = np.ones((1, 1), np.int64)

    def step() -> float:
        caches = filled
        start = time.perf_counter()
        for more in range(STEPS):
            caches = run(one, VALID + more, caches)
        return (time.perf_counter() - start) / STEPS

    return step


def with_own_cache(model: ir.Model) -> ir.Model:
    """The portable graph with the cache of the Attention operator: new keys and values go in, longer ones come out."""
    model = model.clone()
    graph = model.graph
    for value in [value for value in graph.outputs if (value.name or "").startswith("present.")]:
        graph.outputs.remove(value)
    presents = []
    for node in [node for node in graph if node.op_type == "Attention"]:
        writes = [node.inputs[index].producer() for index in (1, 2)]
        past, new = ([write.inputs[index] for write in writes] for index in (0, 1))
        names = [value.name.replace("past_key_values", "present") for value in past]
        own = ir.node(
            "Attention", [node.inputs[0], *new, node.inputs[3], *past], dict(node.attributes), num_outputs=3, name="own"
        )
        own.name = f"{node.name}/own"
        graph.insert_before(node, own)
        node.outputs[0].replace_all_uses_with(own.outputs[0])
        for value, cache, name in zip(own.outputs[1:], past, names, strict=True):
            value.name, value.dtype = name, ir.DataType.FLOAT
            value.shape = ir.Shape([cache.shape[0], cache.shape[1], "present", cache.shape[3]])
            cache.shape = ir.Shape([cache.shape[0], cache.shape[1], "past", cache.shape[3]])
            presents.append(value)
        graph.remove([node, *writes], safe=True)
    graph.inputs.remove(next(value for value in graph.inputs if value.name == "write_indices"))
    _count_new_columns(graph)
    graph.outputs.extend(presents)
    return model


def _count_new_columns(graph: ir.Graph) -> None:
    """Let the mask cover the past and the new tokens."""
    shape = next(node for node in graph if node.op_type == "Shape" and node.name.startswith("mask"))
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    new = ir.node("Shape", [ids], {"start": 1, "end": 2}, name="mask/new")
    total = ir.node("Add", [shape.outputs[0], new.outputs[0]], name="mask/total")
    graph.insert_after(shape, [new, total])
    shape.outputs[0].replace_all_uses_with(total.outputs[0])
    total.replace_input_with(0, shape.outputs[0])


def _made_up(place: Path) -> Path:
    """A decoder of 8 layers of width 768 with random weights."""
    width, inner, heads, keys, layers, words = 768, 2048, 12, 4, 8, 4096
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": words,
        "max_position_embeddings": LARGE,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        scope = f"model.layers.{layer}"
        shapes |= {f"{scope}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
        shapes |= {f"{scope}.self_attn.{part}_proj.weight": (width, width) for part in "qo"}
        shapes |= {f"{scope}.self_attn.{part}_proj.weight": (width * keys // heads, width) for part in "kv"}
        shapes |= {f"{scope}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"{scope}.mlp.down_proj.weight"] = (width, inner)
    rng = np.random.default_rng(0)
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    noise = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(noise, place / "model.safetensors")
    return place


if __name__ == "__main__":
    main()
