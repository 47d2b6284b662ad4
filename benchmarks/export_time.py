"""Exporting all-MiniLM-L6-v2: qexport without torch beside torch's dynamo exporter and optimum."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import measure
import numpy as np
import onnxruntime as ort

ROUNDS = 3
OPTIMUM = measure.ROOT / ".venv-optimum/bin/python"
NOTE = (
    "all-MiniLM-L6-v2 from config.json and safetensors, each in a process of its own from start to end, imports "
    f"counted; seconds are medians of {ROUNDS} rounds in which all take turns, and memory is the largest resident set. "
    "Error: largest difference of last_hidden_state to transformers in float32 on two sentences of different length. "
    "qexport verifies what it wrote before it is there, optimum too; torch alone does not."
)
DYNAMO = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa").eval()
ids, mask, types = (torch.full((2, 9), value) for value in (7, 1, 0))
axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
names = ["input_ids", "attention_mask", "token_type_ids"]
with torch.no_grad():
    torch.onnx.export(
        model, (), sys.argv[2] + "/model.onnx", kwargs=dict(zip(names, (ids, mask, types))), input_names=names,
        output_names=["last_hidden_state", "pooler_output"], dynamic_shapes=dict.fromkeys(names, axes),
        dynamo=True, opset_version=20, external_data=False, verbose=False,
    )
"""
Times = dict[str, list[float]]


def main() -> None:
    """Time all, in turns."""
    source = str(measure.minilm_folder())
    place = measure.WORK / "export-time"
    commands = {
        "**qexport export**": [sys.executable, "-m", "qexport", "export", source, "-o"],
        "qexport export, `--via torch`": [sys.executable, "-m", "qexport", "export", source, "--via", "torch", "-o"],
        "torch.onnx.export, dynamo": [sys.executable, "-W", "ignore", "-c", DYNAMO, source],
    }
    if OPTIMUM.exists():
        module = [str(OPTIMUM), "-W", "ignore", "-m", "optimum.exporters.onnx", "--task", "feature-extraction"]
        commands["optimum (transformers 4.57)"] = [*module, "--model", source]
    times: Times = {name: [] for name in commands}
    peaks: Times = {name: [] for name in commands}
    folders = {name: place / str(number) for number, name in enumerate(commands)}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            seconds, peak = _run(command, folders[name])
            times[name].append(seconds)
            peaks[name].append(peak)
    truth = _truth(source)
    rows = [
        {
            "": name,
            "s": f"{statistics.median(times[name]):.1f}",
            "peak RSS, GB": f"{statistics.median(peaks[name]) / 1e9:.2f}",
            "nodes": _nodes(folders[name]),
            "file, MB": f"{sum(file.stat().st_size for file in folders[name].glob('model.onnx*')) / 1e6:.1f}",
            "error": f"{_error(folders[name], truth):.0e}",
        }
        for name in commands
    ]
    measure.report("export_time", rows, NOTE)


def _run(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and the largest resident set of one process, in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    if "-c" in command:
        folder.mkdir(parents=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    child = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:6])} failed")
    return time.perf_counter() - start, 1024.0 * usage.ru_maxrss


def _feeds() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(1000, 20000, (2, 32))
    mask = (np.arange(32) < np.array([[32], [21]])).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _truth(source: str) -> np.ndarray:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(**{name: torch.tensor(array) for name, array in _feeds().items()})
    answer: np.ndarray = found.last_hidden_state.numpy()
    return answer


def _error(folder: Path, truth: np.ndarray) -> float:
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = _feeds()
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    (found,) = session.run(["last_hidden_state"], given)
    return float(np.abs(found - truth)[feeds["attention_mask"] != 0].max())


def _nodes(folder: Path) -> int:
    told = subprocess.run(
        [sys.executable, "-m", "qexport", "inspect", str(folder / "model.onnx"), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(json.loads(told.stdout)["nodes"])


if __name__ == "__main__":
    main()
