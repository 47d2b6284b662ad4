"""M, models that need more than one look: links of hubs, races, sizes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import test_admit_files as files
import test_cleanup
from onnx import TensorProto

from faults.case import Case, Ended, Room
from faults.rows_m import SECRET, checking, external, folder, planted
from faults.rows_m_built import FLOAT, built, model_of
from qexport.safe_io.publishing import exchange

SAMPLE = Path(__file__).resolve().parents[2] / "samples/decoder/stories260k"


# ---------------------------------------------------------------- M08: the cache of a hub


def hub(room: Room, git: bool = False) -> Path:
    """The folder of a checkpoint as a hub's cache lays it out: links to blobs, small files named by git's digest."""
    snapshot, blobs = room.inputs / "models--a--b/snapshots/0123abcd", room.inputs / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in SAMPLE.iterdir():
        data = file.read_bytes()
        small = git and file.suffix == ".json"
        name = hashlib.sha1(b"blob %d\0" % len(data) + data) if small else hashlib.sha256(data)
        (blobs / name.hexdigest()).write_bytes(data)
        (snapshot / file.name).symlink_to(f"../../blobs/{name.hexdigest()}")
    return snapshot


def damaged(name: str, git: bool) -> Callable[[Room], list[str]]:
    """Check such a folder, of which one blob is not what its name says."""

    def plant(room: Room) -> list[str]:
        snapshot = hub(room, git)
        blob = (snapshot / name).resolve()
        data = blob.read_bytes()
        blob.write_bytes(data + b" " if name.endswith("json") else data[:-1] + bytes([data[-1] ^ 1]))
        return ["check", str(snapshot)]

    return plant


def hub_external(room: Room) -> Path:
    """A model in such a cache, whose weights are a link to a blob beside the one that the model is."""
    path = planted(room, external({}))
    snapshot, blobs = room.inputs / "models--c--d/snapshots/0123abcd", room.inputs / "models--c--d/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (path, path.with_name("w.bin")):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot / path.name


def damaged_external(room: Room) -> list[str]:
    path = hub_external(room)
    blob = path.with_name("w.bin").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x55")
    return ["check", str(path)]


def external_led_away(link: str) -> Callable[[Room], list[str]]:
    """Check such a model, whose weights are a link to somewhere else."""

    def plant(room: Room) -> list[str]:
        path = hub_external(room)
        weights = path.with_name("w.bin")
        name = weights.resolve().name
        (room.inputs / name).write_bytes(weights.read_bytes() + SECRET)
        weights.unlink()
        weights.symlink_to(link.format(name))
        return ["check", str(path)]

    return plant


def led_away(room: Room) -> list[str]:
    snapshot = hub(room)
    (room.inputs / "secret").write_bytes(SECRET)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(room.inputs / "secret")
    return ["check", str(snapshot)]


# ---------------------------------------------------------------- M12: swapped while it is read


class Swapper:
    """Puts a file and a link to a secret in each other's place as fast as it can."""

    def __init__(self, model: Path) -> None:
        self.count, self.ended = 0, False
        self._name, self._other = model / "w.bin", model / "other.bin"
        self._other.symlink_to("../secret")
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.ended = True
        self._thread.join()

    def _run(self) -> None:
        while not self.ended:
            assert exchange(self._name, self._other)
            self.count += 1
            time.sleep(0)


def under_swaps(room: Room, ended: Ended) -> None:
    """Ten thousand swaps while commands read the model, the last of which saves what it has read."""
    model = room.inputs / "model"
    swapper, seen = Swapper(model), 0
    swapper.start()
    try:
        while swapper.count < 10_000 or seen < 20:
            one = room.run(["check", str(model / "m.onnx")])
            seen += 1
            assert one.code in (0, 4), one.stderr
            assert b"SECRET" not in one.stdout + one.stderr
        built = room.run(room.build_of(model / "m.onnx", "--recipe", "float32"))
    finally:
        swapper.stop()
    assert built.code in (0, 4), built.stderr
    for file in room.out.rglob("*"):
        assert not file.is_file() or b"SECRET" not in file.read_bytes()


# ---------------------------------------------------------------- M16, M32 to M34: sizes


def overlapping(count: int, size: int) -> Callable[[Room], list[str]]:
    """Check a model of so many weights of so many bytes, which are all the same ones of a sparse file."""

    def plant(room: Room) -> list[str]:
        path = folder(room) / "m.onnx"
        os.truncate(path.with_name("w.bin"), size)
        model = files.small()
        for index in range(count):
            tensor = model.graph.initializer.add(name=f"t{index}", data_type=TensorProto.FLOAT, dims=[size // 4])
            files.point(tensor, offset=0, length=size)
        path.write_bytes(model.SerializeToString())
        return ["check", str(path)]

    return plant


def bomb(name: str, size: int = 1 << 40) -> onnx.ModelProto:
    """Some bytes that grow to so many numbers when they are run."""
    body = f"""<float one = {{1.0}}, int64[1] unit = {{1}}, int64[1] big = {{{size}}}> {{
        {test_cleanup.BOMBS[name]} m = ReduceMax<keepdims=0>(e) z = Cast<to=1>(m) y = Add(x, z) }}"""
    head = '<ir_version: 10, opset_import: ["": 18]> g (float[B, 4] x) => (float[B, 4] y)'
    return onnx.parser.parse_model(f"{head} {body}")


def huge(nodes: int) -> onnx.ModelProto:
    """A row of so many sums, of a quarter as many weights."""
    model = onnx.parser.parse_model(files.TEXT.replace("[n] y = MatMul(x, w)", f"y = Relu(v{nodes - 1})"))
    for index in range(nodes):
        previous = f"v{index - 1}" if index else "x"
        model.graph.node.add(op_type="Add", input=[previous, f"w{index % (nodes // 4)}"], output=[f"v{index}"])
    for index in range(nodes // 4):
        model.graph.initializer.add(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[1], float_data=[1.0])
    return model


def looking_at(command: str, nodes: int) -> Callable[[Room], list[str]]:
    """Check or inspect it."""

    def plant(room: Room) -> list[str]:
        path = room.inputs / "m.onnx"
        path.write_bytes(huge(nodes).SerializeToString())
        return [command, str(path)]

    return plant


def available() -> int:
    """Bytes of memory that the system says are free."""
    told = Path("/proc/meminfo").read_text()
    return int(re.search(r"MemAvailable: +(\d+)", told)[1]) << 10  # type: ignore[index]  # Linux says it


def over_two_gigabytes(room: Room) -> list[str]:
    """A table of 2.2 GB in a sparse file beside the model, of which a few rows are taken."""
    if shutil.disk_usage(room.root).free < 6 << 30:
        pytest.skip("less than 6 GB of disk are free")
    if available() < 9 << 30:
        pytest.skip("less than 9 GB of memory are free")
    rows = 17_200_000
    model = model_of("(int64[n] x) => (float[n,32] y) { g = Gather(w, x) y = Relu(g) }")
    files.point(model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[rows, 32]))
    path = room.inputs / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with (room.inputs / "w.bin").open("wb") as file:
        file.truncate(rows * 32 * 4)
        file.seek(0)
        file.write(np.arange(1 << 16, dtype="f").tobytes())
    np.savez(room.inputs / "calib.npz", x=np.arange(16).reshape(16))
    return room.build_of(path, "--calib", str(room.inputs / "calib.npz"), *FLOAT)


def saved_beside(room: Room, ended: Ended) -> None:
    """The weights are in a file of their own, whose numbers are right where there are any."""
    weights = room.artefact / "model.onnx.data"
    assert weights.stat().st_size >= 17_200_000 * 32 * 4
    with weights.open("rb") as file:
        assert file.read(1 << 18) == np.arange(1 << 16, dtype="f").tobytes()
    shutil.rmtree(room.artefact)  # two of them would be much


def unreadable(name: str) -> Callable[[Room], list[str]]:
    """A file that only root may read."""

    def plant(room: Room) -> list[str]:
        path = planted(room, external({}))
        path.with_name(name).chmod(0)
        return ["check", str(path)]

    return plant


NOBODY = {"uid": 65534}

CASES = [
    Case("M08_hub_cache", lambda room: ["check", str(hub(room))]),
    Case("M08_hub_cache_git", lambda room: ["check", str(hub(room, git=True))]),
    Case("M08_hub_damaged_weights", damaged("model.safetensors", git=False), 11, "digest"),
    Case("M08_hub_damaged_config", damaged("config.json", git=True), 11, "digest"),
    Case("M08_hub_led_away", led_away, 4, "leads out"),
    Case("M08_hub_external", lambda room: ["check", str(hub_external(room))]),
    Case("M08_hub_external_build", lambda room: room.build_of(hub_external(room), *FLOAT)),
    Case("M08_hub_external_damaged", damaged_external, 11, "digest"),
    Case("M08_hub_external_led_away", external_led_away("../../../{}"), 4, "w.bin"),
    Case("M08_hub_external_led_far", external_led_away("../../blobs/../../{}"), 4, "w.bin"),
    Case("M12_swap", checking(external({})), (0, 4), after=under_swaps, moves_inputs=True),
    Case("M16_overlap", overlapping(10_000, 1 << 20), limits={"rss": 700}),
    Case("M16_overlap_too_much", overlapping(700, 100 << 20), 9, "ask for more than 68719476736", limits={"rss": 500}),
    Case("M17_unreadable", unreadable("w.bin"), 9, "w.bin.*permission denied", limits=NOBODY),
    Case("M17_unreadable_model", unreadable("m.onnx"), 2, "m.onnx. is not readable", limits=NOBODY),
    *(Case(f"M32_check_{id}", checking(bomb(id)), 9, limits={"rss": 500}) for id in test_cleanup.BOMBS),
    *(Case(f"M32_build_{id}", built(bomb(id), *FLOAT), 9, limits={"rss": 500}) for id in test_cleanup.BOMBS),
    *(Case(f"M33_{command}_20k", looking_at(command, 20_000), limits={"cpu": 10, "wall": 60})
      for command in ("check", "inspect")),
    *(Case(f"M33_{command}_200k", looking_at(command, 200_000), limits={"cpu": 60, "wall": 240, "rss": 2000}, slow=True)
      for command in ("check", "inspect")),
    Case("M34_over_2_gb", over_two_gigabytes, after=saved_beside, limits={"wall": 300, "rss": 5500}, slow=True,
         again=lambda room: ["check", str(room.good / "model.onnx")]),
]  # fmt: skip
