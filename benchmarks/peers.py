"""all-MiniLM-L6-v2 in int8: our rows beside those of other tools, each at its best setting, on the same data.

``python benchmarks/peers.py [--python PATH] [--quality | --speed] [ROW ...]`` makes and judges the rows that are named,
or all of them, then times all that are there. Tools are looked for in this interpreter and in those of ``--python``;
what is not found is left as it was, or said not to be installed. What a row cost and is worth is kept beside its model
under ``build/bench/peers``, and the table is put together from that.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import methods
import numpy as np
import onnx_ir as ir
import peer
import sentences
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        title: What the table calls it.
        method: Who makes the model: a key of ``methods.METHODS`` or of ``peer.METHODS``.
        runtime: What runs it, see ``peer.opened``.
        module: What an interpreter must be able to import; any interpreter when empty.
    """

    title: str
    method: str
    runtime: str = "onnxruntime"
    module: str = ""


RTX, CPU = "qexport-tensorrt-rtx", "qexport-ort-cpu"
ROWS = {
    "float": Row("fp32, onnxruntime", "float"),
    "openvino-fp32": Row("fp32, OpenVINO", "openvino", "openvino", "openvino"),
    "openvino-bf16": Row("bf16, OpenVINO", "openvino", "openvino-bf16", "openvino"),
    "ours-tensorrt-rtx": Row("**qexport `--int8`, tensorrt-rtx**", RTX),
    "ours-smoothquant-o3": Row("**qexport smoothquant-o3, tensorrt-rtx**", "qexport-smoothquant-o3"),
    "ours-ort-cpu": Row("**qexport `--int8`, ort-cpu**", CPU),
    "ours-ort-cpu-session": Row("**the same, session of qexport.runtime**", CPU, "qexport.runtime"),
    "ours-smoothquant-o1": Row("**qexport smoothquant-o1, ort-cpu**", "qexport-smoothquant-o1"),
    "ours-smoothquant-o2": Row("**qexport smoothquant-o2, ort-cpu**", "qexport-smoothquant-o2"),
    "ort-minmax": Row("onnxruntime s8 MinMax, linear layers", "ort-s8-minmax-linears"),
    "ort-entropy": Row("onnxruntime s8 Entropy, linear layers", "ort-s8-entropy-linears"),
    "ort-u8": Row("onnxruntime u8 MinMax, linear layers", "ort-u8s8-minmax-linears"),
    "ort-dynamic": Row("onnxruntime dynamic", "ort-dynamic"),
    "modelopt": Row("modelopt.onnx, its default", "modelopt", module="modelopt"),
    "modelopt-entropy": Row("modelopt.onnx entropy, linear layers", "modelopt-entropy-linears", module="modelopt"),
    "modelopt-max": Row("modelopt.onnx max, linear layers", "modelopt-max-linears", module="modelopt"),
    "inc": Row("neural-compressor static, its default", "inc", module="onnx_neural_compressor"),
    "inc-s8": Row("neural-compressor s8, linear layers", "inc-s8-linears", module="onnx_neural_compressor"),
    "inc-u8": Row("neural-compressor u8, linear layers", "inc-u8-linears", module="onnx_neural_compressor"),
    "inc-s8-smooth": Row("neural-compressor s8 SmoothQuant 0.8", "inc-s8-smooth", module="onnx_neural_compressor"),
    "inc-u8-smooth": Row("neural-compressor u8 SmoothQuant 0.8", "inc-u8-smooth", module="onnx_neural_compressor"),
    "nncf-onnx": Row("NNCF s8 SmoothQuant 0.95, ONNX", "nncf-onnx", module="nncf"),
    "nncf": Row("NNCF SmoothQuant 0.95 (its default), OpenVINO", "nncf", "openvino", "nncf"),
    "nncf-smooth": Row("NNCF SmoothQuant 0.7, OpenVINO", "nncf-smooth", "openvino", "nncf"),
    "nncf-smooth-bf16": Row("the same, the rest in bf16", "nncf-smooth", "openvino-bf16", "nncf"),
}
FOREIGN_OPS = {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
NOTE = (
    "all-MiniLM-L6-v2, STS-B test, 1379 pairs; 512 calibration sentences from STS-B train, the same for all, each "
    "method in a process of its own. Cosine to fp32's embedding in onnxruntime. Other tools at the best of the "
    "settings tried, judged by this test split. TensorRT reads signed 8-bit Q/DQ with zero point 0. CPU speed: one "
    "thread, the sentences of the test split by length in batches of 32, every model in turn on each batch; median of "
    "fp32's time divided by the row's (10 % and 90 % quantiles)."
)


def main(arguments: Sequence[str]) -> None:
    """Make, judge and time rows, then print the table of everything known."""
    asked = options(arguments)
    names = asked.rows or list(ROWS)
    peer.PLACE.mkdir(parents=True, exist_ok=True)
    tokens, gold = sentences.test_split()
    content = json.dumps({"calibration": sentences.calibration_tokens(), "test": tokens})
    peer.TOKENS.write_text(content, encoding="utf-8")
    pythons = {row.module: find_python(row.module, asked.python) for row in ROWS.values()}
    if not asked.speed:
        judge_rows([name for name in names if pythons[ROWS[name].module]], pythons, gold)
    if not asked.quality:
        time_rows(["float", *(name for name in names if name != "float" and usable(name, pythons))], pythons)
    report(pythons)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="int8 of all-MiniLM-L6-v2 beside other tools")
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--python", action="append", default=[], help="another interpreter to look for tools in")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quality", action="store_true", help="make and judge, do not time")
    only.add_argument("--speed", action="store_true", help="time what is there")
    return parser.parse_args(arguments)


def find_python(module: str, others: Sequence[str]) -> str | None:
    """The first interpreter that has a module; this one where none is needed."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    if not module:
        return sys.executable
    found = (
        path for path in (sys.executable, *others) if not subprocess.run([path, "-c", look], check=False).returncode
    )
    return next(found, None)


def judge_rows(names: Sequence[str], pythons: Mapping[str, str | None], gold: Sequence[float]) -> None:
    """Make the models of rows, each once, and note what they cost and are worth."""
    made = {}
    for method, module in {"float": "", **{ROWS[name].method: ROWS[name].module for name in names}}.items():
        print(f"making {method}", file=sys.stderr, flush=True)
        made[method] = make(method, str(pythons[module]))
    truth = embedded("float", sys.executable)
    for name in names:
        row = ROWS[name]
        model = model_of(row.method)
        facts: dict[str, Any] = {key: made[row.method].get(key) for key in ("version", *cost_of(row))}
        facts |= {"bytes": peer.size(model.parent), "engine": engine_reads(model), "digest": digest(model)}
        if known(name).get("digest") != facts["digest"]:  # the same file is worth the same
            facts |= sentences.judge(embedded(name, str(pythons[row.module])), truth, gold)
        note(name, facts)


def cost_of(row: Row) -> tuple[str, ...]:
    """What is noted of the making of a row."""
    return () if row.method in ("float", "openvino") else ("seconds", "rss")


def digest(model: Path) -> str:
    """SHA-256 of a model with everything beside it under its name, and of what computes it here."""
    found = hashlib.sha256(importlib.metadata.version("onnxruntime").encode())
    for path in sorted(model.parent.glob("model.*")):
        found.update(path.read_bytes())
    return found.hexdigest()


def make(method: str, python: str) -> dict[str, Any]:
    """Run a method in a process of its own."""
    if method in methods.METHODS:
        return methods.run(method)[1]
    folder = peer.PLACE / method
    folder.mkdir(exist_ok=True)
    for old in folder.glob("model.*"):
        old.unlink()
    return answer(python, "quantize", method, str(folder))


def model_of(method: str) -> Path:
    """The file that a method leaves."""
    if method in methods.METHODS:
        return measure.WORK / ("minilm" if method == "float" else method) / "model.onnx"
    folder = peer.PLACE / method
    return next(
        (path for path in (folder / "model.xml", folder / "model.onnx") if path.is_file()), folder / "model.onnx"
    )


def embedded(name: str, python: str) -> sentences.Embeddings:
    """The embeddings that a row computes; ONNX files run in this interpreter's onnxruntime, whoever made them."""
    row, place = ROWS[name], peer.PLACE / f"{name}.f32"
    python = python if row.runtime.startswith("openvino") else sys.executable
    answer(python, "embed", row.runtime, str(model_of(row.method)), str(place))
    return np.fromfile(place, np.float32).reshape(len(stored_test()), -1)


def stored_test() -> list[list[int]]:
    """Tokens of the sentences that are embedded."""
    return peer.stored("test")


def answer(python: str, *arguments: str) -> dict[str, Any]:
    """The object that ``peer.py`` prints; some tools print after it."""
    command = [python, "-W", "ignore", str(measure.HERE / "peer.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=peer.PLACE, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with exit code {done.returncode}")
    said: dict[str, Any] = json.loads(next(text for text in reversed(done.stdout.splitlines()) if text[:1] == "{"))
    return said


def engine_reads(path: Path) -> str:
    """Whether TensorRT can read a file by its rules for quantized graphs: ``yes``, or what is in the way."""
    if path.suffix != ".onnx":
        return "no: not ONNX"
    faults = Counter(fault for node in ir.load(path).graph for fault in faults_of(node))
    return f"no: {', '.join(sorted(faults))}" if faults else "yes"


def faults_of(node: ir.Node) -> Iterator[str]:
    """What TensorRT refuses or misreads about one node."""
    if node.domain not in ("", "ai.onnx"):
        yield f"operators of {node.domain}"
    elif node.op_type in FOREIGN_OPS:
        yield node.op_type
    elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        point = node.inputs[2] if len(node.inputs) > 2 else None
        zero = None if point is None else ir.convenience.get_const_tensor(point)
        dtype = zero.dtype if zero is not None else implied(node)
        if dtype not in (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN):
            yield "unknown type" if dtype is None else dtype.name.lower()
        elif zero is not None and np.any(zero.numpy()):
            yield "zero points"


def implied(node: ir.Node) -> ir.DataType | None:
    """The quantized type of a node without a zero point."""
    if node.op_type == "QuantizeLinear":
        return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    value = node.inputs[0]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor.dtype if tensor is not None else value.dtype if value is not None else None


def usable(name: str, pythons: Mapping[str, str | None]) -> bool:
    """Whether a row's model lies there and its interpreter is known."""
    return pythons[ROWS[name].module] is not None and model_of(ROWS[name].method).is_file()


def time_rows(names: Sequence[str], pythons: Mapping[str, str | None]) -> None:
    """Time the models in turn, a waiting process for each, batch by batch; note speed beside fp32's."""
    with ExitStack() as stack:
        calls = [stack.enter_context(server(name, str(pythons[ROWS[name].module]))) for name in names]
        for call in calls:
            ask(call, "")  # loaded
        count = -(-len(stored_test()) // sentences.BATCH)
        times = in_turn(calls, count)
    low, middle, high = np.quantile(times[:, :1] / times, [0.1, 0.5, 0.9], axis=0)
    for i, name in enumerate(names):
        speed = f"{middle[i]:.2f}x ({low[i]:.2f} .. {high[i]:.2f})"
        note(name, {"speed": speed, "pass_seconds": float(times[:, i].sum())})


def server(name: str, python: str) -> subprocess.Popen[str]:
    """A process that runs a row's model when it is told to."""
    row = ROWS[name]
    python = python if row.runtime.startswith("openvino") else sys.executable
    command = [python, "-W", "ignore", str(measure.HERE / "peer.py"), "serve", row.runtime, str(model_of(row.method))]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=peer.PLACE, bufsize=1
    )


def ask(process: subprocess.Popen[str], line: str) -> str:
    """What a server answers."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line)
    process.stdin.flush()
    return process.stdout.readline()


def in_turn(processes: Sequence[subprocess.Popen[str]], count: int, warm_up: int = 2) -> NDArray[np.float64]:
    """Seconds ``[batches, models]``; each batch starts with another model."""
    batches = [*range(count - warm_up, count), *range(count)]  # the longest batches first, to settle memory
    times = np.zeros((len(batches), len(processes)))
    for turn, batch in enumerate(batches):
        for place in np.roll(np.arange(len(processes)), turn):
            times[turn, place] = float(ask(processes[place], f"{batch}\n"))
    return times[warm_up:]


def note(name: str, facts: Mapping[str, Any]) -> None:
    """Add to what is known of a row."""
    peer.PLACE.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**known(name), **facts}, indent=1)
    (peer.PLACE / f"{name}.json").write_text(content + "\n", encoding="utf-8")


def known(name: str) -> dict[str, Any]:
    """What earlier runs noted of a row."""
    path = peer.PLACE / f"{name}.json"
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return facts


def report(pythons: Mapping[str, str | None]) -> None:
    """Print the table."""
    facts = {name: known(name) for name in ROWS}
    rows = [line(ROWS[name], found, pythons[ROWS[name].module] is not None) for name, found in facts.items()]
    versions = sorted({found["version"] for found in facts.values() if found.get("version")})
    measure.report("peers", rows, f"{NOTE} {', '.join(versions) or 'No other tool is installed'}.")


def line(row: Row, facts: Mapping[str, Any], installed: bool) -> measure.Row:
    """A line of the table; what is not known stays empty."""
    if not facts:
        return dict.fromkeys(columns({}), None) | {
            "": row.title,
            "Spearman x100": None if installed else "not installed",
        }
    return {"": row.title} | columns(facts)


def columns(facts: Mapping[str, Any]) -> dict[str, str | None]:
    """The cells behind the title."""
    shown = {
        "Spearman x100": ("spearman", "{:.2f}", 1.0),
        "mean cosine": ("mean", "{:.4f}", 1.0),
        "worst cosine": ("worst", "{:.3f}", 1.0),
        "TensorRT reads it": ("engine", "{}", None),
        "calibrate + quantize, s": ("seconds", "{:.1f}", 1.0),
        "peak RSS, GB": ("rss", "{:.2f}", 1e-9),
        "file, MB": ("bytes", "{:.1f}", 1e-6),
        "CPU speed": ("speed", "{}", None),
    }
    cells = {}
    for title, (key, form, unit) in shown.items():
        value = facts.get(key)
        cells[title] = None if value is None else form.format(value if unit is None else value * unit)
    return cells


if __name__ == "__main__":
    main(sys.argv[1:])
