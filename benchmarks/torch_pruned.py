"""Pruned models beside torch models that were pruned the same way, and whether TensorRT-RTX builds them.

``python benchmarks/torch_pruned.py [--python PATH] [ROW ...]`` makes the models of the rows that are named, or of all,
and leaves each under ``build/bench/torch_pruned/ROW`` with its engine. ``torch_peer.py``, run by an interpreter that
has torch, onnx and transformers, takes from a file which units stayed and nothing else: weights are those of the uncut
model, and what a repair fitted it fits by itself, from its own activations. The outputs must be the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import images
import measure
import methods
import numpy as np
import onnx_ir as ir
import sentences
from numpy.typing import NDArray

from qexport.exporter.engines.child import build_in_child
from qexport.exporter.engines.engine import EngineOptions
from qexport.exporter.engines.profiles import derive_profile
from qexport.exporter.load import load_model
from qexport.exporter.looking.sparsity import zeros_of
from qexport.exporter.onnx_file import save_onnx
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import load_recipe
from qexport.exporter.steps import find_pass
from qexport.passes.pipeline import parameters, run
from qexport.passes.target import find_target
from qexport.runtime.backends.artefact import PLAN
from qexport.safe_io import publish

PLACE = measure.WORK / "torch_pruned"
TARGET = "tensorrt-rtx"
RIDGE = 0.01
SEEN = {"minilm": 128, "resnet20": 32}  # calibration samples
FEW = 32  # of them for removing layers, which runs whole models
TESTED = 32
BEHIND = {"minilm": sentences.HIDDEN, "resnet20": "logits"}  # the output that is compared
TITLES = {"minilm": "MiniLM", "resnet20": "ResNet-20"}
SUMS = ("/layer3/layer3.0/conv2/Conv",)
SLOW = tuple(f"encoder.layer.{i}.output.dense/MatMul" for i in range(1, 6))  # to fit; the first is enough to see
FIXED: dict[str, dict[str, Any]] = {
    "heads": {"criterion": "activation", "ridge": RIDGE},
    "neurons": {"criterion": "activation", "ridge": RIDGE},
    "channels": {"criterion": "activation", "ridge": RIDGE},
    "sparsify": {"criterion": "wanda", "sequential": False, "ridge": RIDGE, "keep": SLOW},
}
"""What is not the default: quick criteria, and a ridge that both sides know."""
NOTE = (
    "Float32 for tensorrt-rtx; which units go is told by activation, which numbers by Wanda. Torch reads from the file "
    "which units stayed, cuts its own model, and repairs it by least squares of its own in double precision, from its "
    "own activations on the same 128 sentences (32 for layers) or 32 images. Differences are the largest of any output "
    "number: last_hidden_state of 32 STS-B test sentences in a padded batch, masked positions left out, or the logits "
    "of 32 test images; the ONNX file runs in onnxruntime. check: exit code of qexport check."
)


@dataclass(frozen=True, slots=True)
class Cut:
    """What is cut out of which model.

    Attributes:
        title: What the table calls it.
        model: ``minilm`` or ``resnet20``.
        steps: Options of the steps, by their names.
        repairs: Whether torch repairs it too.
    """

    title: str
    model: str
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    repairs: bool = True


CUTS = {
    "minilm": Cut("nothing", "minilm"),
    "heads-75": Cut("heads 0.75", "minilm", {"heads": {"keep": 0.75}}),
    "heads-50": Cut("heads 0.5", "minilm", {"heads": {"keep": 0.5}}),
    "neurons-70": Cut("neurons 0.7", "minilm", {"neurons": {"keep": 0.7}}),
    "both": Cut("heads 0.75, neurons 0.7", "minilm", {"heads": {"keep": 0.75}, "neurons": {"keep": 0.7}}),
    "layers-5": Cut("layers 5/6", "minilm", {"layers": {"keep": 5 / 6}}),
    "layers-4": Cut("layers 4/6", "minilm", {"layers": {"keep": 4 / 6}}),
    "sparse": Cut("2:4", "minilm", {"sparsify": {}}),
    "resnet20": Cut("nothing", "resnet20"),
    "channels-80": Cut("channels 0.8, none of residual sums", "resnet20", {"channels": {"keep": 0.8, "spare": SUMS}}),
    "sums-80": Cut("channels 0.8", "resnet20", {"channels": {"keep": 0.8}}, repairs=False),
}
REPAIRED = "-repaired"
ROWS = {
    name + end: (cut, end == REPAIRED)
    for name, cut in CUTS.items()
    for end in (("", REPAIRED) if cut.steps and cut.repairs else ("",))
}


def main(arguments: Sequence[str]) -> None:
    """Make rows, let torch make its own, compare, then print the table of everything known."""
    asked = options(arguments)
    names = asked.rows or list(ROWS)
    python = find_torch([sys.executable, *asked.python])
    PLACE.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        start = time.perf_counter()
        found[name] = make(name)
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    told = ask_torch(python, names)
    for name, facts in found.items():
        facts |= compare(name, facts, told["rows"][name])
        facts["version"] = told["version"]
        (PLACE / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    report()


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="pruned models beside torch models that were pruned the same way")
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--python", action="append", default=[], help="another interpreter to look for torch in")
    return parser.parse_args(arguments)


def find_torch(pythons: Sequence[str]) -> str:
    """The first interpreter that has what the other side needs."""
    look = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('torch', 'transformers', 'onnx'))))"
    for python in pythons:
        if not subprocess.run([python, "-c", look], check=False).returncode:
            return python
    raise SystemExit("no interpreter has torch, transformers and onnx: name one with --python")


def make(name: str) -> dict[str, Any]:
    """Prune, write, check, build the engine, and run the file."""
    cut, repair = ROWS[name]
    plain, samples = cleaned(cut.model), seen(cut.model)
    model, records = run(plain, [*steps(cut, samples, repair=repair), ("cleanup", find_pass("cleanup", name)())])
    pruned = [decision for record in records for decision in record.decisions if decision.action == "pruned"]
    if cut.steps and not pruned:
        raise SystemExit(f"{name}: nothing was pruned")
    shutil.rmtree(PLACE / name, ignore_errors=True)
    with publish(PLACE / name) as stage:
        save_onnx(model, stage)
        sparse = any(zeros.two_of_four for zeros in zeros_of(model))
        settings = EngineOptions((profile(model, samples),), sparse=sparse)
        info = build_in_child(stage.path / "model.onnx", str(find_target(TARGET).engine), settings, stage.path / PLAN)
        stage.adopt(PLAN)
    outputs(name).tofile(PLACE / f"{name}.ours")
    return {
        "before": parameters(plain),
        "parameters": parameters(model),
        "zeros": sum(found.zeros * np.prod(found.shape) for found in zeros_of(model)) if "sparsify" in cut.steps else 0,
        "units": [list(decision.units) for decision in pruned if decision.units is not None],
        "check": check(PLACE / name / "model.onnx"),
        "engine": info.bytes,
        "seconds": sum(record.seconds for record in records[: len(cut.steps)]),
    }


@cache
def cleaned(subject: str) -> ir.Model:
    """The uncut model behind the exact steps of every recipe."""
    path = measure.minilm_folder() if subject == "minilm" else methods.RESNET / "resnet20.onnx"
    return run(load_model(path), instantiate(load_recipe("float32"), {}))[0]


def steps(cut: Cut, samples: Sequence[Mapping[str, Any]], *, repair: bool) -> Iterator[tuple[str, Any]]:
    """The steps that prune."""
    for step, asked in cut.steps.items():
        data = samples[:FEW] if step == "layers" else samples
        bound = {"data": data, "samples": len(data), "repair": repair}
        yield step, find_pass(step, "benchmark")(**bound, **FIXED.get(step, {}), **asked)


@cache
def seen(subject: str) -> list[dict[str, NDArray[Any]]]:
    """Calibration samples, without the batch axis."""
    if subject == "minilm":
        return [{name: rows[0] for name, rows in sentences.pad([tokens]).items()} for tokens in calibration()]
    return [
        {"input": image} for image in images.batches(methods.RESNET / "calibration.npz")[0]["input"][: SEEN[subject]]
    ]


def calibration() -> list[list[int]]:
    """The first calibration sentences, each once."""
    return [list(tokens) for tokens in dict.fromkeys(map(tuple, sentences.calibration_tokens()))][: SEEN["minilm"]]


def tested() -> list[list[int]]:
    """The test sentences."""
    return sentences.test_split()[0][:TESTED]


def profile(model: ir.Model, samples: Sequence[Mapping[str, NDArray[Any]]]) -> Any:
    """Sizes that the engine is built for."""
    shapes = ({name: array.shape for name, array in sample.items()} for sample in samples)
    return derive_profile(model.graph.inputs, shapes, limit=sentences.MAX_LENGTH)


def check(path: Path) -> int:
    """Exit code of ``qexport check``."""
    command = [sys.executable, "-m", "qexport", "check", str(path)]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


def outputs(name: str) -> NDArray[np.float32]:
    """What the file makes of the test data, masked positions left out."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    session = ort.InferenceSession(PLACE / name / "model.onnx", settings, providers=["CPUExecutionProvider"])
    subject = ROWS[name][0].model
    if subject == "resnet20":
        feeds = {"input": images.batches(methods.RESNET / "test.npz")[0]["input"][:TESTED]}
    else:
        feeds = sentences.pad(tested())
    made: NDArray[np.float32] = session.run([BEHIND[subject]], feeds)[0]
    return made[feeds["attention_mask"] == 1] if subject == "minilm" else made


def ask_torch(python: str, names: Sequence[str]) -> dict[str, Any]:
    """Let the other side make its models; it leaves their outputs beside ours."""
    asked = {
        "minilm": str(measure.minilm_folder()),
        "resnet20": str(methods.RESNET),
        "seen": SEEN["resnet20"],
        "few": FEW,
        "tested": TESTED,
        "ridge": RIDGE,
        "tokens": {"calibration": calibration(), "test": tested()},
        "rows": {name: {"model": cut.model, "steps": [*cut.steps], "repair": repair}
                 for name, (cut, repair) in ROWS.items() if name in names},
    }  # fmt: skip
    (PLACE / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    command = [python, "-W", "ignore", str(measure.HERE / "torch_peer.py"), str(PLACE)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"torch_peer.py failed with exit code {done.returncode}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def compare(name: str, facts: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """The largest differences; what torch found in the file must be what the passes said."""
    if facts["units"] != told["units"]:
        raise SystemExit(f"{name}: the passes say {facts['units']} stayed, the file says {told['units']}")
    ours, theirs, uncut = (
        np.fromfile(PLACE / path, np.float32)
        for path in (f"{name}.ours", f"{name}.torch", f"{ROWS[name][0].model}.ours")
    )
    gaps = {"torch": float(np.abs(ours - theirs).max()), "uncut": float(np.abs(ours - uncut).max())}
    print(f"{name}: {gaps}, torch {told['seconds']:.1f} s", file=sys.stderr, flush=True)
    return gaps | {"mask": told.get("mask")}


def report() -> None:
    """Print the table of all rows that are known."""
    known = {name: PLACE / f"{name}.json" for name in ROWS}
    facts = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in known.items() if path.is_file()}
    masks = {tuple(found["mask"]) for found in facts.values() if found.get("mask")}
    agreed = [f"Of {whole:,} numbers that Wanda judges, torch judges {other} otherwise." for other, whole in masks]
    versions = sorted({found["version"] for found in facts.values()})
    rows = [line(name, found) for name, found in facts.items()]
    measure.report("torch_pruned", rows, " ".join([NOTE, *agreed, f"{', '.join(versions)}."]))


def line(name: str, facts: Mapping[str, Any]) -> measure.Row:
    """One line of the table."""
    cut, repair = ROWS[name]
    zeros = f", {facts['zeros'] / 1e6:.2f} M zeros" if facts["zeros"] else ""
    return {
        "model": TITLES[cut.model],
        "cut": cut.title,
        "repair": ("yes" if repair else "no") if cut.steps else None,
        "parameters": f"{facts['before'] / 1e6:.3f} M to {facts['parameters'] / 1e6:.3f} M{zeros}",
        "largest difference to torch": f"{facts['torch']:.1e}",
        "to the uncut model": f"{facts['uncut']:.2f}" if cut.steps else None,
        "check": str(facts["check"]),
        "engine, MB": f"{facts['engine'] / 1e6:.1f}",
    }


if __name__ == "__main__":
    main(sys.argv[1:])
