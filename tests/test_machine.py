from __future__ import annotations

import os
from pathlib import Path

import pytest

from qexport.exporter.machine import check_cpu, check_folder, check_memory, check_packages, examine, installed

NEEDED = ("onnx", "onnx-ir", "onnxscript", "onnxslim", "numpy", "safetensors", "tokenizers", "onnxruntime")
EVERYTHING = dict.fromkeys(NEEDED, "1.0")


def judged(found):
    return {check.name: check for check in check_packages(found)}


def test_this_machine_is_described_without_problems(tmp_path):
    checks = {check.name: check for check in examine({"cache folder": tmp_path / "not" / "yet"})}
    assert {"python", "onnx", "onnxruntime", "gpu", "cpu", "memory", "temporary folder", "cache folder"} <= set(checks)
    assert [check for check in checks.values() if check.status == "problem"] == []
    assert all(check.found for check in checks.values())
    assert all(check.advice for check in checks.values() if check.status != "ok")
    assert list(tmp_path.iterdir()) == []


def test_what_is_installed_is_found_with_its_version():
    assert installed()["onnx"].count(".") >= 1


def test_a_missing_package_is_a_problem_with_a_command():
    check = judged({name: version for name, version in EVERYTHING.items() if name != "onnxslim"})["onnxslim"]
    assert (check.status, check.found) == ("problem", "not installed")
    assert "pip install" in check.advice


def test_no_runtime_names_both_extras():
    check = judged({})["onnxruntime"]
    assert check.status == "problem"
    assert "qexport[cpu]" in check.advice
    assert "qexport[gpu]" in check.advice


def test_two_runtimes_overwrite_each_other():
    check = judged({**EVERYTHING, "onnxruntime-gpu": "1.1"})["onnxruntime"]
    assert check.status == "warning"
    assert check.found == "onnxruntime 1.0, onnxruntime-gpu 1.1"
    assert "overwrite each other" in check.advice


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_one_runtime_of_either_kind_is_enough(name):
    assert judged({name: "1.0"})["onnxruntime"].status == "ok"


def test_one_engine_builder_is_enough():
    assert [judged({})[name].status for name in ("tensorrt", "tensorrt-rtx")] == ["warning", "warning"]
    one = judged({"tensorrt-rtx": "1.7"})
    assert [one[name].status for name in ("tensorrt", "tensorrt-rtx")] == ["ok", "ok"]
    assert "qexport[tensorrt]" in one["tensorrt"].advice


@pytest.mark.parametrize(
    ("cpuinfo", "status", "found"),
    [
        ("flags : fpu avx2 avx512_vnni amx_int8\n", "ok", "avx512_vnni, amx_int8"),
        ("Features : fp asimd asimddp i8mm\n", "ok", "asimddp, i8mm"),
        ("flags : fpu sse2 avx2 avx512_vnni_not\n", "warning", "no int8"),
    ],
)
def test_the_cpu_is_judged_by_its_int8_instructions(cpuinfo, status, found):
    check = check_cpu(cpuinfo)
    assert check.status == status
    assert found in check.found


@pytest.mark.parametrize(("kilobytes", "status"), [(1 << 24, "ok"), (1 << 20, "warning")])
def test_little_memory_is_a_warning(kilobytes, status):
    check = check_memory(f"MemTotal: 99999999 kB\nMemAvailable: {kilobytes} kB\nHugePages_Total: 0\n")
    assert (check.status, check.found) == (status, f"{kilobytes / (1 << 20):.1f} GiB available")


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    check = check_folder("cache folder", tmp_path)
    assert check.status in ("ok", "warning")
    assert "GiB free" in check.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written_is_a_problem():
    check = check_folder("cache folder", Path("/proc/self/fdinfo"))
    assert check.status == "problem"
    assert check.advice


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator writes everywhere")
def test_a_folder_without_permission_is_a_problem(tmp_path):
    tmp_path.chmod(0o500)
    assert check_folder("cache folder", tmp_path).status == "problem"
