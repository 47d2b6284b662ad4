"""What goes together: runtimes, JetPack, driver and GPUs, judged by their versions alone, as a table of rules.

What the rules rest on: TensorRT-RTX 1.7 was tried op by op; the rest is what NVIDIA's support matrices and release
notes say of TensorRT 10.3 to 11.4, of TensorRT-RTX 1.x and of JetPack 5 to 7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from qexport.exporter.doctor.surroundings import Check
from qexport.runtime.backends.gpus import Gpu

GIB = 1 << 30
LEAST_VRAM = 4 * GIB
LEAST_ONNXRUNTIME = (1, 27)
RTX_GPUS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX 1.x can be told to build for."""

PORTABLE = (8, 0)  # plans that name no GPU begin here
OLDEST_GPU = (7, 5)
FP8 = (8, 9)
JETPACKS = {
    (39, 0): ("7.2 or later", "10.16 or later"),
    (38, 0): ("7.0 or 7.1", "10.13"),
    (36, 4): ("6.1 or later", "10.3"),
    (36, 0): ("6.0", "8.6"),
    (35, 0): ("5", "8.5"),
}
"""First of the releases of Jetson Linux to the JetPack that holds them, and the TensorRT that comes with it."""

OLDEST_JETPACK = (36, 4)
FIRST_11_ON_JETSON, JETPACK_FOR_11 = (11, 4, 1), (39, 2, 2)
"""The first TensorRT 11 for Jetsons, and the Linux of JetPack 7.2.2, which it asks for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What there is.

    Attributes:
        packages: Distribution to version; ``None`` is not installed.
        gpus: What the driver offers.
        cuda: Newest CUDA of the driver; ``None`` without one.
        driver: The text of ``/proc/driver/nvidia/version``.
        tegra: The text of ``/etc/nv_tegra_release``, which Jetsons have.
        builds: Distribution that holds the libraries of a runtime to the major version of CUDA in its name.
    """

    packages: Mapping[str, str | None] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    cuda: tuple[int, int] | None = None
    driver: str = ""
    tegra: str = ""
    builds: Mapping[str, int] = field(default_factory=dict)


def verdicts(found: Found) -> Iterator[Check]:
    """Judge what is there; a GPU or a runtime that is missing is nothing to judge."""
    for rule in RULES:
        yield from rule(found)


def version(text: str | None) -> tuple[int, ...]:
    """The numbers that a version begins with; empty where there are none, as of an unknown version."""
    head = re.match(r"\d+(\.\d+)*", text or "")
    return tuple(map(int, head[0].split("."))) if head else ()


def jetson_release(tegra: str) -> tuple[int, ...] | None:
    """Release and revision of Jetson Linux in ``/etc/nv_tegra_release``, as 36, 4, 3; ``None`` where they are not."""
    named = re.search(r"\bR(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", tegra)
    return (int(named[1]), *version(named[2])) if named else None


def _onnxruntime(found: Found) -> Iterator[Check]:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        numbers = version(found.packages.get(name))
        if numbers and numbers < LEAST_ONNXRUNTIME:
            told = f"{found.packages[name]}: older than 1.27"
            yield Check(name=f"{name} version", status="problem", found=told, advice=f"pip install --upgrade {name}")


def _tensorrt(found: Found) -> Iterator[Check]:
    """10.3 and later of 10, where networks are asked to be strongly typed; 11, where there are no others."""
    name, told = "tensorrt version", found.packages.get("tensorrt")
    numbers = version(told)
    if not numbers:
        return
    if numbers < (10, 3):
        yield _doubtful(name, told, "has no strongly typed networks as qexport builds them", "install 10.3 or later")
    elif numbers[0] > 11:
        yield _doubtful(name, told, "newer than what was tried", "install tensorrt 10.3 to 11")
    else:
        typed = "all networks are strongly typed" if numbers[0] == 11 else "strongly typed networks are asked for"
        yield _good(name, told, typed)


def _rtx(found: Found) -> Iterator[Check]:
    name, told = "tensorrt-rtx version", found.packages.get("tensorrt-rtx")
    numbers = version(told)
    if not numbers:
        return
    if numbers[0] == 1 and numbers >= (1, 7):
        yield _good(name, told, "reads opset 24; plans are for the GPUs it names")
    else:
        yield _doubtful(name, told, "not a version that was tried", "pip install 'qexport[rtx]'")


def _jetpack(found: Found) -> Iterator[Check]:
    """A Jetson has the TensorRT of its JetPack; of TensorRT 11 only late releases are for it, with a late JetPack."""
    release = jetson_release(found.tegra)
    if release is None:
        return
    linux = f"R{'.'.join(map(str, release))}"
    known = next((first for first in JETPACKS if first[0] == release[0] and first <= release), None)
    if known is None:
        yield _doubtful("jetpack", f"Jetson Linux {linux}", "unknown to qexport", "look up its TensorRT first")
        return
    jetpack, comes_with = JETPACKS[known]
    told = f"JetPack {jetpack} ({linux}), which comes with TensorRT {comes_with}"
    wanted = version(found.packages.get("tensorrt"))
    if release < OLDEST_JETPACK:
        yield _doubtful("jetpack", told, "too old to build engines", "install JetPack 6.1 or later")
    elif wanted >= (11,) and (wanted < FIRST_11_ON_JETSON or release < JETPACK_FOR_11):
        advice = "install the tensorrt that came with the JetPack, or JetPack 7.2.2 and TensorRT 11.4.1"
        why = f"TensorRT {found.packages['tensorrt']} is not for it: 11 is from 11.4.1 on, with JetPack 7.2.2"
        yield _doubtful("jetpack", told, why, advice)
    else:
        yield _good("jetpack", told, "build engines on the device")


def _driver(found: Found) -> Iterator[Check]:
    """Libraries run with a driver of the same major version of CUDA, or a later one."""
    if found.cuda is None:
        return
    kernel = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)", found.driver)
    told = f"CUDA {found.cuda[0]}.{found.cuda[1]}" + (f", driver {kernel[1]}" if kernel else "")
    beyond = {name: major for name, major in found.builds.items() if major > found.cuda[0]}
    for name, major in beyond.items():
        advice = f"update the driver to one with CUDA {major}"
        yield _doubtful("driver", told, f"{name} is made for CUDA {major} and cannot run with it", advice)
    if not beyond:
        yield _good("driver", told, "")


def _gpus(found: Found) -> Iterator[Check]:
    for number, gpu in enumerate(found.gpus):
        name = f"gpu {number}"
        told = f"{gpu.name}, compute capability {gpu.capability}"
        capability = version(gpu.capability)
        if capability < OLDEST_GPU:
            yield _doubtful(name, told, "too old for TensorRT 10 and later", "use the target ort-cuda or ort-cpu")
            continue
        if found.packages.get("tensorrt-rtx") and gpu.capability not in RTX_GPUS:
            advice = "try one engine before planning on it; the target tensorrt takes it"
            yield _doubtful(name, told, f"TensorRT-RTX names {', '.join(RTX_GPUS)} and not this one", advice)
        elif found.packages.get("tensorrt-rtx") and capability < PORTABLE:
            advice = f"build for it by name: --set export.compute_capabilities='[\"{gpu.capability}\"]'"
            yield _doubtful(name, told, "engines that name no GPU begin at 8.0", advice)
        else:
            yield _good(name, told, "int8 and fp8" if capability >= FP8 else "int8; fp8 begins at 8.9")
        if gpu.memory < LEAST_VRAM:
            small = f"{gpu.memory / GIB:.1f} GiB"
            yield _doubtful(f"{name} memory", small, "engines of large models may not fit", "build smaller batches")


RULES: tuple[Callable[[Found], Iterator[Check]], ...] = (_onnxruntime, _tensorrt, _rtx, _jetpack, _driver, _gpus)


def _good(name: str, told: str | None, why: str) -> Check:
    return Check(name=name, status="ok", found=": ".join(filter(None, (told, why))))


def _doubtful(name: str, told: str | None, why: str, advice: str) -> Check:
    return Check(name=name, status="warning", found=f"{told}: {why}", advice=advice)
