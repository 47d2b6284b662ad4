from __future__ import annotations

import json
import os
import sys
import types

import pytest

from qexport.errors import EnvironmentMismatch, IntegrityError, UnsafeInput, UsageError
from qexport.exporter.engines.device import find_gpus, read_gpus
from qexport.exporter.engines.engine import load_module, load_plan, run_support
from qexport.exporter.engines.messages import Messages, Phases, fraction, listed, readable
from qexport.safe_io import digest_bytes

# ------------------------------------------------------------ messages and progress


def test_nested_phases_add_up():
    assert fraction([]) == 0
    assert fraction([(1, 4)]) == 0.25
    assert fraction([(1, 4), (1, 2), (1, 5)]) == pytest.approx(0.25 + 0.125 + 0.025)
    assert fraction([(9, 4)]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('creator && "Plugin not found, are the name and version correct?"', "no such operator"),
        ("Assertion failed: a == A::b || c: it is so", "it is so"),
        ("Invalid Node - n\nfirst\n[x::catchCudaError::250] cudaError 35", "first"),
    ],
)
def test_messages_of_the_library_become_readable(text, words):
    assert readable(text).endswith(words) or words in readable(text)
    assert "\n" not in readable(text)
    assert "cudaError" not in readable(text)


# ------------------------------------------------------------ modules, devices, plans


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "rtx")])
def test_a_missing_module_says_what_to_install(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentMismatch, match=f"{name} is not installed") as caught:
        load_module(name)
    assert f"qexport[{extra}]" in caught.value.hint


def test_only_engine_builders_are_loaded():
    with pytest.raises(UsageError, match="'antigravity'"):
        load_module("antigravity")


class Driver:
    """The functions of the CUDA driver interface, for one GPU of compute capability 8.9 or none."""

    def __init__(self, status=0, count=1, capability=(8, 9)):
        self.status, self.count, self.capability = status, count, capability

    def cuInit(self, flags):  # noqa: N802 the driver's name
        return self.status

    def cuDeviceGetCount(self, count):  # noqa: N802 the driver's name
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device, index):  # noqa: N802 the driver's name
        return 0

    def cuDeviceGetName(self, name, size, device):  # noqa: N802 the driver's name
        name.value = b"NVIDIA Test"
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):  # noqa: N802 the driver's name
        memory._obj.value = 8 << 30
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802 the driver's name
        value._obj.value = self.capability[attribute - 75]
        return 0


def test_a_gpu_is_described_by_the_driver():
    (gpu,) = read_gpus(Driver())
    assert (gpu.name, gpu.capability, gpu.memory) == ("NVIDIA Test", "8.9", 8 << 30)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(Driver(100), "finds no GPU"), (Driver(count=0), "finds no GPU"), (Driver(803), "versions"), (Driver(7), "7")],
)
def test_a_driver_without_gpu_says_why(driver, reason):
    with pytest.raises(EnvironmentMismatch, match=reason):
        read_gpus(driver)


def test_run_support_is_the_reason_of_the_driver(monkeypatch):
    module = types.ModuleType("tensorrt")
    for driver, word in ((Driver(100), "finds no GPU"), (Driver(capability=(6, 1)), "6.1")):
        monkeypatch.setattr("ctypes.CDLL", lambda name, driver=driver: driver)
        assert word in run_support(module)
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver())
    assert run_support(module) is None


@pytest.fixture
def artefact(tmp_path, monkeypatch):
    """A folder as a build leaves it, and the module that built it."""
    module = types.ModuleType("tensorrt_rtx")
    module.__version__ = "1.7.1.116"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    plan = b"native code"
    manifest = {
        "files": {"engine.plan": {"bytes": len(plan), "digest": digest_bytes(plan)}},
        "engine": {"module": "tensorrt_rtx", "version": "1.7.1.116"},
    }
    (tmp_path / "engine.plan").write_bytes(plan)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def edit(artefact, change):
    path = artefact / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_plan_that_its_manifest_vouches_for_is_read(artefact):
    assert load_plan(artefact) == b"native code"


@pytest.mark.parametrize("plan", [b"nativE code", b"native cod", b"native code and more", b""])
def test_a_plan_that_was_changed_is_refused(artefact, plan):
    (artefact / "engine.plan").write_bytes(plan)
    with pytest.raises(IntegrityError):
        load_plan(artefact)


@pytest.mark.parametrize(
    "change",
    [lambda m: m["engine"].update(version="1.7.0.1"), lambda m: m["engine"].update(module="os", version="1")],
    ids=["release", "module"],
)
def test_a_plan_of_another_builder_is_an_environment_mismatch(artefact, change):
    edit(artefact, change)
    with pytest.raises(EnvironmentMismatch, match="was built by"):
        load_plan(artefact)


def test_a_plan_nobody_vouches_for_is_unsafe(artefact):
    edit(artefact, lambda manifest: manifest["files"].clear())
    with pytest.raises(UnsafeInput, match="lists no engine"):
        load_plan(artefact)
    (artefact / "manifest.json").unlink()
    with pytest.raises(UnsafeInput, match="no manifest"):
        load_plan(artefact)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 1}', '{"files": {"engine.plan": {}}, "engine": {}}'])
def test_a_manifest_that_is_not_ours_is_refused(artefact, text):
    (artefact / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError):
        load_plan(artefact)


def test_a_plan_that_is_a_link_is_unsafe(artefact):
    os.rename(artefact / "engine.plan", artefact / "elsewhere")
    (artefact / "engine.plan").symlink_to("elsewhere")
    with pytest.raises(UnsafeInput):
        load_plan(artefact)


def test_a_machine_without_driver_says_so(monkeypatch):
    monkeypatch.setattr("qexport.exporter.engines.device._LIBRARY", "libno-such-driver.so")
    with pytest.raises(EnvironmentMismatch, match="no NVIDIA driver: libno-such-driver"):
        find_gpus()


def test_only_errors_are_kept_and_not_the_noise_a_missing_gpu_adds():
    messages = Messages(kept=2)
    for severity, text in [("ERROR", "old"), ("WARNING", "w"), ("INTERNAL_ERROR", "a"), ("ERROR", "b")]:
        messages.add(severity, text)
    messages.add("ERROR", "[checkMacros.cpp::catchCudaError::250] cudaError 35")
    assert messages.errors == ["a", "b"]


def test_a_phase_that_ends_early_never_takes_progress_back():
    seen = []
    phases = Phases(lambda name, done: seen.append(done))
    phases.start("build", 4)
    phases.step("build", 0)
    phases.start("inner", 2)
    phases.step("inner", 1)
    phases.finish("inner")
    phases.start("other", 0)
    assert phases.step("build", 1)
    assert seen == [0, 0.25, 0.25, 0.5, 0.5, 0.5]


def test_one_detail_stands_on_the_line_and_long_names_are_cut():
    assert listed("refused", ["a"]) == "refused: a"
    assert listed("refused", ["a", "b"]) == "refused (2):\n- a\n- b"
    assert len(listed("refused", ["a" * 10**6])) < 300
