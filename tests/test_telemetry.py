"""onnxruntime calls nobody, and leaves nothing where people keep their files."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import os
from qexport.runtime.session import load_onnxruntime
load_onnxruntime()
print(len(os.listdir("/proc/self/task")))
"""


def test_onnxruntime_starts_no_uploader_and_leaves_no_file_when_it_is_loaded(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    env |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    assert told.stdout == "1\n"  # threads
    assert list(tmp_path.iterdir()) == []
