"""What goes together: every row of the verdicts, by versions and texts as machines have them."""

from __future__ import annotations

import ctypes

import pytest

from qexport.exporter.doctor.compatibility import Found, jetson_release, verdicts, version
from qexport.runtime.backends.gpus import Gpu, find_cuda

R36 = "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, DATE: Fri Sep 13 04:36:44 2024"
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Wed Jan 22 20:10:00 UTC 2025\nGCC version: 12.2"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)"


def gpu(capability: str, gib: float = 24) -> tuple[Gpu, ...]:
    return (Gpu("A", capability, int(gib * (1 << 30))),)


def judged(name: str, **found: object) -> tuple[str, str] | None:
    """Status and words of the check of this name; ``None`` where there is none."""
    checks = {check.name: check for check in verdicts(Found(**found))}
    return (checks[name].status, f"{checks[name].found} | {checks[name].advice}") if name in checks else None


def test_nothing_installed_and_no_gpu_is_nothing_to_judge() -> None:
    assert list(verdicts(Found())) == []
    assert list(verdicts(Found(packages={"onnxruntime": "1.31.1", "tensorrt": None}))) == []
    assert list(verdicts(Found(packages={"tensorrt": "unknown version"}))) == []


@pytest.mark.parametrize(
    ("name", "told", "status", "words"),
    [
        ("onnxruntime", "1.26.0", "problem", "older than 1.27"),
        ("onnxruntime", "1.27.0", None, ""),
        ("onnxruntime-gpu", "1.9", "problem", "older than 1.27"),
        ("tensorrt", "8.6.1", "warning", "10.3 or later"),
        ("tensorrt", "10.2.0", "warning", "10.3 or later"),
        ("tensorrt", "10.3.0", "ok", "asked for"),
        ("tensorrt", "10.14.1.48", "ok", "asked for"),
        ("tensorrt", "11.4.0", "ok", "all networks are strongly typed"),
        ("tensorrt", "12.0", "warning", "newer than what was tried"),
        ("tensorrt-rtx", "1.7.1.116", "ok", "opset 24"),
        ("tensorrt-rtx", "1.5.0", "warning", "qexport[rtx]"),
        ("tensorrt-rtx", "2.0.0", "warning", "qexport[rtx]"),
    ],
)
def test_versions_of_runtimes(name: str, told: str, status: str | None, words: str) -> None:
    found = judged(f"{name} version", packages={name: told})
    assert (found[0] if found else None) == status
    assert words in (found[1] if found else "")


@pytest.mark.parametrize(
    ("release", "tensorrt", "status", "words"),
    [
        ("35.4", None, "warning", "JetPack 5"),
        ("36.3", None, "warning", "TensorRT 8.6: too old"),
        ("36.4", None, "ok", "TensorRT 10.3"),
        ("36.4", "10.3.0", "ok", "JetPack 6.1"),
        ("36.4", "11.4.1", "warning", "11 is from 11.4.1 on, with JetPack 7.2.2"),
        ("38.2", "10.13.3.9", "ok", "JetPack 7.0 or 7.1 (R38.2.0), which comes with TensorRT 10.13"),
        ("38.4", "11.4.1", "warning", "TensorRT 11.4.1 is not for it"),
        ("39.2.1", "10.16.2.10", "ok", "JetPack 7.2 or later (R39.2.1), which comes with TensorRT 10.16"),
        ("39.2.1", "11.4.1", "warning", "with JetPack 7.2.2"),
        ("39.2.2", "11.4.0", "warning", "11 is from 11.4.1 on"),
        ("39.2.2", "11.4.1", "ok", "build engines on the device"),
        ("99.1", None, "warning", "unknown to qexport"),
    ],
)
def test_jetpacks_by_the_release_of_their_linux(release: str, tensorrt: str | None, status: str, words: str) -> None:
    number, _, revision = release.partition(".")
    text = R36.replace("R36", f"R{number}").replace("4.0", revision if "." in revision else f"{revision}.0")
    found = judged("jetpack", tegra=text, packages={"tensorrt": tensorrt})
    assert found is not None
    assert found[0] == status
    assert words in found[1]


@pytest.mark.parametrize(
    ("capability", "rtx", "status", "words"),
    [
        ("6.1", True, "warning", "too old"),
        ("7.5", True, "warning", "export.compute_capabilities='[\"7.5\"]'"),
        ("7.5", False, "ok", "fp8 begins at 8.9"),
        ("8.0", True, "ok", "fp8 begins at 8.9"),
        ("8.7", True, "warning", "not this one"),
        ("8.9", True, "ok", "int8 and fp8"),
        ("9.0", True, "warning", "not this one"),
        ("9.0", False, "ok", "int8 and fp8"),
        ("12.0", True, "ok", "int8 and fp8"),
    ],
)
def test_gpus_by_their_compute_capability(capability: str, rtx: bool, status: str, words: str) -> None:
    found = judged("gpu 0", gpus=gpu(capability), packages={"tensorrt-rtx": "1.7.1"} if rtx else {})
    assert found is not None
    assert found[0] == status
    assert words in found[1]


def test_little_memory_of_a_gpu_is_doubtful() -> None:
    assert judged("gpu 0 memory", gpus=gpu("8.6", 24)) is None
    found = judged("gpu 0 memory", gpus=gpu("8.6", 2))
    assert found is not None
    assert found[0] == "warning"
    assert "2.0 GiB" in found[1]


@pytest.mark.parametrize(
    ("cuda", "builds", "status", "words"),
    [
        (None, {"tensorrt_cu13": 13}, None, ""),
        ((12, 8), {}, "ok", "CUDA 12.8, driver 570.86.10"),
        ((12, 8), {"tensorrt_cu12": 12}, "ok", ""),
        ((12, 8), {"tensorrt_rtx_cu13": 13}, "warning", "tensorrt_rtx_cu13 is made for CUDA 13"),
        ((13, 0), {"tensorrt_cu12": 12}, "ok", "CUDA 13.0"),
    ],
)
def test_drivers_by_the_cuda_they_speak(
    cuda: tuple[int, int] | None, builds: dict[str, int], status: str | None, words: str
) -> None:
    found = judged("driver", cuda=cuda, builds=builds, driver=DRIVER)
    assert (found[0] if found else None) == status
    assert words in (found[1] if found else "")


def test_the_open_kernel_module_tells_its_version_as_well() -> None:
    assert "driver 580.65.06" in (judged("driver", cuda=(13, 0), driver=OPEN) or ("", ""))[1]
    assert (judged("driver", cuda=(13, 0)) or ("", ""))[1].startswith("CUDA 13.0 |")


def test_numbers_are_read_from_versions_of_all_kinds() -> None:
    texts = ("1.31.1", "10.3.0.post1", "11", "", None, "unknown version")
    assert [version(text) for text in texts] == [(1, 31, 1), (10, 3, 0), (11,), (), (), ()]
    assert [jetson_release(text) for text in (R36, "", "R36")] == [(36, 4, 0), None, None]


def test_the_driver_tells_the_cuda_that_it_speaks() -> None:
    class Library:
        def __init__(self, number: int, status: int = 0) -> None:
            self.number, self.status = number, status

        def cuDriverGetVersion(self, place: object) -> int:  # noqa: N802 - the driver's own name
            ctypes.cast(place, ctypes.POINTER(ctypes.c_int))[0] = self.number  # type: ignore[arg-type]  # a byref
            return self.status

    assert [find_cuda(Library(number)) for number in (12080, 13000, 0)] == [(12, 8), (13, 0), None]
    assert find_cuda(Library(12080, status=999)) is None
    assert find_cuda(object()) is None
