import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np  # noqa: F401  # its BLAS is what is limited
import onnx_ir as ir
import pytest
from threadpoolctl import threadpool_info

from qexport.exporter.threads import OneThread
from qexport.passes.base import Outcome, Pass
from qexport.passes.pipeline import run

SEEN = []


def threads():
    return [entry["num_threads"] for entry in threadpool_info() if entry["user_api"] == "blas"]


@dataclass(frozen=True)
class Look(Pass):
    fail: bool = False

    def call(self, model: ir.Model) -> Outcome:
        SEEN.append(threads())
        if self.fail:
            raise ValueError("planted")
        return Outcome(model, False)


class LookAlone(Look):
    one_at_a_time: ClassVar[bool] = True


def model():
    return ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)


def test_passes_have_one_blas_thread_unless_they_take_layers_in_turn():
    before = threads()
    SEEN.clear()
    with OneThread() as limit:
        run(model(), [("look", Look()), ("alone", LookAlone())], [limit])
    limited, free = SEEN
    assert limited == [1] * len(before)
    assert free == before
    assert threads() == before


def test_the_threads_come_back_after_a_failure():
    before = threads()
    with pytest.raises(ValueError, match="planted"), OneThread() as limit:
        run(model(), [("look", Look(fail=True))], [limit])
    assert threads() == before


def test_freed_blocks_go_back_to_the_system():
    code = """
import re
from qexport.runtime.memory import return_freed_blocks
def held():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
told = return_freed_blocks()
blocks = [bytearray(b"x" * (20 << 20)) for _ in range(8)]
keep = [bytearray(100) for _ in range(100)]
before = held()
del blocks
print(told, before - held() > 8 * 19 << 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
