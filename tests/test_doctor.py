from __future__ import annotations

import importlib.metadata

import pytest

from qexport.exporter.doctor import PACKAGES, diagnose, find_problems
from qexport.passes.target import TARGETS


def installed(**changes: str | None) -> dict[str, str | None]:
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES, "1.0") | {"onnxruntime-gpu": None}
    return versions | {name.replace("_", "-"): version for name, version in changes.items()}


def test_a_whole_installation_has_no_problems() -> None:
    assert find_problems(installed()) == []
    assert find_problems(installed(onnxruntime=None, onnxruntime_gpu="1.0", torch=None, tensorrt=None)) == []


def test_a_missing_runtime_names_both_extras() -> None:
    (problem,) = find_problems(installed(onnxruntime=None))
    assert "qexport[cpu]" in problem
    assert "qexport[gpu]" in problem


def test_two_runtimes_that_overwrite_each_other_are_a_problem() -> None:
    (problem,) = find_problems(installed(onnxruntime_gpu="1.0"))
    assert "overwrite" in problem


@pytest.mark.parametrize("name", [name for name, extra in PACKAGES.items() if not extra])
def test_every_core_package_is_missed(name: str) -> None:
    (problem,) = find_problems({**installed(), name: None})
    assert problem.startswith(f"{name} is not installed")


def test_this_machine_is_described_as_it_is() -> None:
    found = diagnose()
    assert found.packages["onnx"] == importlib.metadata.version("onnx")
    assert [target.name for target in found.targets] == list(TARGETS)
    assert found.cores >= 1
    assert next(target for target in found.targets if target.name == "ort-cpu").ready
