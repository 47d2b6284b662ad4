"""The doctor: this machine as it is, and every verdict on packages, targets, CPU, memory, folders."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

import qexport.cli
from qexport.exporter.doctor.doctor import PACKAGES, Package, check_packages, diagnose, installed, judge_target
from qexport.exporter.doctor.surroundings import Check, check_cpu, check_folder, check_gpu, check_memory
from qexport.passes.target import TARGETS

NEEDED = [name for name, package in PACKAGES.items() if not package.extra]
WHOLE = dict.fromkeys([*NEEDED, "onnxruntime", "tensorrt-rtx"], "1.0")


def judged(found: dict[str, str]) -> dict[str, Check]:
    return {check.name: check for check in check_packages(found)}


def problems(found: dict[str, str]) -> list[str]:
    return [check.name for check in check_packages(found) if check.status == "problem"]


def test_this_machine_is_described_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = diagnose()
    checks = {check.name: check for check in found.checks}
    assert {*NEEDED, "python", "onnxruntime", "gpu", "cpu", "memory", "temporary folder"} <= set(checks)
    assert str(tmp_path) in checks["current folder"].found
    assert list(tmp_path.iterdir()) == []
    assert found.problems == ()
    assert all(check.found for check in found.checks)
    assert all(check.advice for check in found.checks if check.status != "ok")
    assert found.packages["onnx"] == importlib.metadata.version("onnx") == checks["onnx"].found
    assert [target.name for target in found.targets] == list(TARGETS)
    assert next(target for target in found.targets if target.name == "ort-cpu").ready


def test_a_whole_installation_has_no_problems() -> None:
    assert problems(WHOLE) == []
    assert problems({**WHOLE, "pillow": "1.0", "tensorrt": "1.0"}) == []


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_package_is_a_problem_with_a_command(name: str) -> None:
    found = {other: version for other, version in WHOLE.items() if other != name}
    assert problems(found) == [name]
    check = judged(found)[name]
    assert check.found == "not installed"
    assert "pip install" in check.advice


def test_a_missing_runtime_is_a_problem_and_names_both_extras() -> None:
    check = judged({})["onnxruntime"]
    assert check.status == "problem"
    assert "qexport[cpu]" in check.advice
    assert "qexport[gpu]" in check.advice


def test_two_runtimes_that_overwrite_each_other_are_a_problem() -> None:
    check = judged({**WHOLE, "onnxruntime-gpu": "1.1"})["onnxruntime"]
    assert check.status == "problem"
    assert check.found == "onnxruntime 1.0, onnxruntime-gpu 1.1"
    assert "overwrite each other" in check.advice


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_one_runtime_of_either_kind_is_enough(name: str) -> None:
    assert judged({name: "1.0"})["onnxruntime"].status == "ok"


def test_one_engine_builder_is_enough() -> None:
    assert [judged({})[name].status for name in ("tensorrt", "tensorrt-rtx")] == ["warning", "warning"]
    one = judged({"tensorrt-rtx": "1.7"})
    assert [one[name].status for name in ("tensorrt", "tensorrt-rtx")] == ["ok", "ok"]
    assert "qexport[tensorrt]" in one["tensorrt"].advice


def test_what_is_missing_is_told_as_missing_and_a_module_counts_whatever_brought_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "no-such-distribution", Package("module_of_another_distribution"))
    assert installed()["no-such-distribution"] is None
    (tmp_path / "module_of_another_distribution.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert installed()["no-such-distribution"] == "unknown version"


@pytest.mark.parametrize(
    ("target", "packages", "gpu", "ready", "note"),
    [
        ("ort-cpu", "onnxruntime", False, True, "the file is the result"),
        ("ort-cpu", "", True, False, "onnxruntime is not installed"),
        ("ort-cuda", "onnxruntime", True, False, "qexport[gpu]"),
        ("ort-cuda", "onnxruntime-gpu", False, False, "no GPU"),
        ("ort-cuda", "onnxruntime-gpu", True, True, "the file is the result"),
        ("tensorrt-rtx", "onnxruntime", False, False, "qexport[rtx]"),
        ("tensorrt-rtx", "onnxruntime tensorrt-rtx", False, True, "builds engines"),
        ("tensorrt", "onnxruntime tensorrt-rtx", True, False, "qexport[tensorrt]"),
        ("tensorrt", "onnxruntime tensorrt", False, False, "needs a GPU"),
        ("tensorrt", "onnxruntime tensorrt", True, True, "builds engines"),
    ],
)
def test_a_target_is_ready_with_its_packages_and_its_gpu(
    target: str, packages: str, gpu: bool, ready: bool, note: str
) -> None:
    status = judge_target(TARGETS[target], dict.fromkeys(packages.split(), "1.0"), gpu=gpu)
    assert status.ready == ready
    assert note in status.note


def test_a_missing_gpu_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexport.runtime.backends.gpus._LIBRARY", "libno-such-driver.so")
    check = check_gpu()
    assert check.status == "warning"
    assert "libno-such-driver" in check.found
    assert "tensorrt-rtx" in check.advice


@pytest.mark.parametrize(
    ("cpuinfo", "status", "found"),
    [
        ("flags : fpu avx2 avx512_vnni amx_int8\n", "ok", "avx512_vnni, amx_int8"),
        ("Features : fp asimd asimddp i8mm\n", "ok", "asimddp, i8mm"),
        ("flags : fpu sse2 avx2 avx512_vnni_not\n", "warning", "no int8"),
    ],
)
def test_the_cpu_is_judged_by_its_int8_instructions(cpuinfo: str, status: str, found: str) -> None:
    check = check_cpu(cpuinfo)
    assert check.status == status
    assert found in check.found
    assert " 0 cores" not in check.found


@pytest.mark.parametrize(("kilobytes", "status"), [(1 << 24, "ok"), (1 << 20, "warning")])
def test_little_memory_is_a_warning(kilobytes: int, status: str) -> None:
    check = check_memory(f"MemTotal: 99999999 kB\nMemAvailable: {kilobytes} kB\nHugePages_Total: 0\n")
    assert (check.status, check.found) == (status, f"{kilobytes / (1 << 20):.1f} GiB available")


@pytest.mark.parametrize(
    ("group", "status", "told"),
    [
        ("max\n", "ok", "16.0 GiB available"),
        (f"{32 << 30}\n", "ok", "16.0 GiB available"),
        (f"{8 << 30}\n", "ok", "16.0 GiB available, 8.0 GiB of them to this control group"),
        (f"{1 << 30}\n", "warning", "16.0 GiB available, 1.0 GiB of them to this control group"),
    ],
)
def test_the_limit_of_the_control_group_counts(group: str, status: str, told: str) -> None:
    check = check_memory(f"MemAvailable: {16 << 20} kB\n", group)
    assert (check.status, check.found) == (status, told)
    assert ("give the container more" in check.advice) == (status == "warning")


def test_memory_that_is_not_told_is_unknown() -> None:
    check = check_memory("MemTotal: 99999999 kB\n")
    assert (check.status, check.found) == ("warning", "unknown")


@pytest.mark.parametrize("beneath", [".", "not/yet"])
def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path, beneath: str) -> None:
    check = check_folder("cache folder", tmp_path / beneath)
    assert check.status in ("ok", "warning")
    assert "GiB free" in check.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written_is_a_problem() -> None:
    check = check_folder("cache folder", Path("/proc/self/fdinfo"))
    assert check.status == "problem"
    assert check.advice


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator writes everywhere")
@pytest.mark.parametrize(("mode", "beneath"), [(0o500, "."), (0o000, "inside")])
def test_a_folder_without_permission_is_a_problem(tmp_path: Path, mode: int, beneath: str) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode)
    assert check_folder("cache folder", folder / beneath).status == "problem"


@pytest.mark.parametrize("inner", [".", "statistics"])
def test_a_cache_that_builds_refuse_is_a_problem(tmp_path: Path, inner: str) -> None:
    assert judged_cache(tmp_path / "cache").status == "ok"
    folder = tmp_path / "cache" / inner
    folder.mkdir(parents=True)
    assert judged_cache(tmp_path / "cache").status == "ok"
    folder.chmod(0o777)
    found = judged_cache(tmp_path / "cache")
    assert (found.status, str(folder) in found.found) == ("problem", True)
    assert "chmod go-w" in found.advice


def judged_cache(folder: Path) -> Check:
    return next(check for check in diagnose(folder).checks if check.name == "cache folder")


def test_a_current_folder_that_is_gone_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "current folder" in [check.name for check in diagnose().problems]


def test_a_problem_is_exit_code_8_with_everything_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "no-such-distribution", Package("no_such_module"))
    assert qexport.cli.run(["doctor"]) == 8
    told = capsys.readouterr()
    assert "ort-cpu" in told.out
    assert told.err.startswith("error: doctor: no-such-distribution: not installed\nhint: pip install")


def test_a_problem_as_json_is_exit_code_8_and_one_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "no-such-distribution", Package("no_such_module"))
    assert qexport.cli.run(["doctor", "--json"]) == 8
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["schema"] == "qexport.doctor/1"
    assert found["packages"]["no-such-distribution"] is None
    assert [check["name"] for check in found["checks"] if check["status"] == "problem"] == ["no-such-distribution"]
    assert told.err == ""


def test_a_machine_without_problems_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert qexport.cli.run(["doctor"]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("ok\n")
    assert told.err == ""
