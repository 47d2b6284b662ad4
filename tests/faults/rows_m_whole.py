"""M, models that need more than one look: links of hubs, races, sizes, and what is built although it is odd."""

from __future__ import annotations

import hashlib
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
import test_admit_graphs as graphs
import test_cleanup
from onnx import TensorProto, numpy_helper

from faults.case import Case, Ended, Room
from faults.rows_m import SECRET, checking, external, folder, inspecting, planted
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


def overlapping(room: Room) -> list[str]:
    path = folder(room) / "m.onnx"
    path.with_name("w.bin").write_bytes(bytes(1 << 20))
    model = files.small()
    for index in range(10_000):
        tensor = model.graph.initializer.add(name=f"t{index}", data_type=TensorProto.FLOAT, dims=[1 << 18])
        files.point(tensor, offset=0, length=1 << 20)
    path.write_bytes(model.SerializeToString())
    return ["check", str(path)]


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


# ---------------------------------------------------------------- built although it is odd


def built(model: onnx.ModelProto, *flags: str) -> Callable[[Room], list[str]]:
    """Build it on samples of its inputs."""

    def plant(room: Room) -> list[str]:
        path = planted(room, model)
        rng = np.random.default_rng(0)
        shapes = {value.name: [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim][1:]
                  for value in model.graph.input}  # fmt: skip
        data = {name: rng.standard_normal((16, *shape)).astype("f") for name, shape in shapes.items()}
        np.savez(room.inputs / "calib.npz", **data)
        return room.build_of(path, "--calib", str(room.inputs / "calib.npz"), *flags)

    return plant


def warned(words: str) -> Callable[[Room, Ended], None]:
    """The result says so; what is for people was looked at by I7."""

    def after(room: Room, ended: Ended) -> None:
        warnings = (room.artefact / "result.json").read_text("utf-8")
        assert words in warnings

    return after


def model_of(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from the text of its graph."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def square(seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, size)).astype("f")


UNSORTED = model_of("(float[n,32] x) => (float[n,32] y) { y = Relu(a) a = MatMul(x, w) }", w=square())
HOLED = model_of("(float[n,32] x) => (float[n,32] y) { h = Add(x, b) y = MatMul(h, w) }", w=square(),
                 b=np.r_[np.float32(np.nan), np.zeros(31, "f")])  # fmt: skip


def quantized(room: Room) -> Path:
    """What a build made of the good model, among the inputs."""
    first = room.run(room.build())
    assert first.code == 0, first.stderr
    room.artefact.rename(room.inputs / "quantized")
    shutil.rmtree(room.cache / "qexport", ignore_errors=True)
    return room.inputs / "quantized/model.onnx"


def same_model(room: Room, ended: Ended) -> None:
    """What is quantized already is left as it is, but for the order of its weights, and then to the byte."""
    first, second = (onnx.load(path / "model.onnx") for path in (room.inputs / "quantized", room.artefact))
    assert list(first.graph.node) == list(second.graph.node)
    assert sorted(map(str, first.graph.initializer)) == sorted(map(str, second.graph.initializer))
    room.artefact.rename(room.inputs / "again")
    third = room.run(room.build_of(room.inputs / "again/model.onnx", *FLOAT))
    assert third.code == 0, third.stderr
    assert (room.artefact / "model.onnx").read_bytes() == (room.inputs / "again/model.onnx").read_bytes()


NAMES = {
    "escape": "\x1b]0;owned\x07\x1b[31m",
    "direction": "a\u202eb\u2066c",
    "script": "<script>alert(1)</script>&'\"",
    "path": "../../../../tmp/owned",
    "nul": "a\0b",
    "lines": "a\nerror: forged\r\n| b | c |",
    "markup": "[bold red]x[/] ![](http://e.example/x.png) `x` $(id)",
    "long": "x" * 1_000_000,
    "c1": "a\x9b31mb\x7f",
}


def named(name: str) -> onnx.ModelProto:
    """A model in which everything is called that, and a little more so that names differ."""
    model = model_of("(float[n,32] x) => (float[n,32] y) { [one] h = MatMul(x, w) [two] y = Relu(h) }", w=square())
    graph = model.graph
    graph.name = graph.doc_string = model.producer_name = model.doc_string = name
    graph.node[0].name, graph.node[1].name = name, f"{name}2"
    graph.node[0].input[:], graph.node[0].output[:] = ["x", f"{name}w"], [f"{name}h"]
    graph.node[1].input[:] = [f"{name}h"]
    graph.initializer[0].name = f"{name}w"
    model.metadata_props.add(key=name, value=name)
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = name
    return model


def shown_safely(room: Room, ended: Ended) -> None:
    """Nothing of a name acts in what is published for people to read."""
    for name in ("report.md", "report.html"):
        told = room.artefact / name
        text = told.read_text("utf-8") if told.exists() else ""
        assert not {"\x1b", "\0", "\u202e", "\u2066", "\x9b", "\x7f"} & set(text), name
        shown = re.sub(r"(`+).*?\1", "", text) if name.endswith(".md") else text  # what is code there is text
        assert "<script>alert" not in shown, name
        assert "\nerror: forged" not in text, name
        assert len(text) < 6 << 20, name
    assert not Path("/tmp/owned").exists()


LOOP = """(float[n,32] x) => (float[n,32] y) { k = Loop(count, yes, x) <body = b (int64 i, bool c, float[n,32] s)
    => (bool c2, float[n,32] s2) { c2 = Identity(c) m = MatMul(s, w) s2 = Tanh(m) }> y = MatMul(k, v) }"""
IF = """(float[n,32] x) => (float[n,32] y) { s = ReduceSum <keepdims = 0> (x) c = Greater(s, zero)
    h = If(c) <then_branch = t () => (float[n,32] a) { a = MatMul(x, w) },
               else_branch = e () => (float[n,32] b) { b = MatMul(x, v) }> y = MatMul(h, w) }"""
NONZERO = """(float[n,32] x) => (float[m,32] y) { p = Greater(x, zero) q = Cast <to = 1> (p)
    r = ReduceMax <axes = [1], keepdims = 0> (q) i = NonZero(r) j = Squeeze(i, first) g = Gather(x, j)
    y = MatMul(g, w) }"""
STRINGS = """(float[n,32] x) => (float[n,32] y) {
    s = StringNormalizer <case_change_action = "LOWER", locale = "C"> (words)
    c = Shape(s) f = Cast <to = 1> (c) o = ReduceMax <keepdims = 0> (f) h = Mul(x, o) y = MatMul(h, w) }"""

ODD = {
    "loop": model_of(LOOP, w=square() / 8, v=square(1), count=np.array(3), yes=np.array(True)),
    "if": model_of(IF, w=square(), v=square(1), zero=np.float32(0)),
    "nonzero": model_of(NONZERO, w=square(), zero=np.float32(0), first=np.array([0])),
    "strings_inside": model_of(STRINGS, w=square(), words=np.array(["Ab", "c"], dtype=object)),
}

WORDS = model_of("(string[n] x, float[n,32] z) => (string[n] y, float[n,32] h) { y = Identity(x) h = Relu(z) }")

PROFILES = {
    "order": ({"x": [[9, 32], [4, 32], [8, 32]]}, "smallest <= best <= largest"),
    "missing": ({}, "the profile is missing|the model has no such input|no data"),
    "zero": ({"x": [[0, 32], [4, 32], [8, 32]]}, "1 <= smallest"),
    "rank": ({"x": [[1], [4], [8]]}, "three shapes of 2 sizes"),
    "fixed": ({"x": [[1, 16], [4, 32], [8, 32]]}, "the model says 32"),
    "other": ({"z": [[1, 32], [4, 32], [8, 32]]}, "the model has no such input"),
    "clash": ({"x": [[1, 32], [4, 32], [8, 32]], "x2": [[1, 32], [4, 32], [9, 32]]}, "axis 'n' has sizes"),
}
TWO = model_of("(float[n,32] x, float[n,32] x2) => (float[n,32] y) { h = MatMul(x, w) y = Add(h, x2) }", w=square())
EMPTY = model_of("(float[n,0] x) => (float[n,0] y) { y = Relu(x) }")
ONE = model_of("(float[n,32] x) => (float[n,32] y) { y = MatMul(x, w) }", w=square())


def contradicting(profiles: dict[str, list[list[int]]]) -> Callable[[Room], list[str]]:
    """A build for an engine whose profile is no profile of the model."""

    def plant(room: Room) -> list[str]:
        recipe = room.inputs / "mine.toml"
        lines = [f"{name} = {shapes}" for name, shapes in profiles.items()] or ["y = [[1, 32], [4, 32], [8, 32]]"]
        recipe.write_text('extends = "float16"\n[export.profiles]\n' + "\n".join(lines) + "\n")
        argv = built(TWO if "x2" in profiles else ONE, "--recipe", str(recipe))(room)
        return [word if word != "ort-cpu" else "tensorrt-rtx" for word in argv]

    return plant


def before_the_work(room: Room, ended: Ended) -> None:
    """Nothing was measured, let alone built."""
    assert b"recipe" not in ended.stderr.replace(b"mine.toml", b"")
    assert not ended.events("subprocess.Popen")


def over_two_gigabytes(room: Room) -> list[str]:
    """A table of 2.2 GB in a sparse file beside the model, of which a few rows are taken."""
    if shutil.disk_usage(room.root).free < 6 << 30:
        pytest.skip("less than 6 GB of disk are free")
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
FLOAT = ("--recipe", "float32")

CASES = [
    Case("M08_hub_cache", lambda room: ["check", str(hub(room))]),
    Case("M08_hub_cache_git", lambda room: ["check", str(hub(room, git=True))]),
    Case("M08_hub_damaged_weights", damaged("model.safetensors", git=False), 11, "digest"),
    Case("M08_hub_damaged_config", damaged("config.json", git=True), 11, "digest"),
    Case("M08_hub_led_away", led_away, 4, "leads out"),
    Case("M12_swap", checking(external({})), (0, 4), after=under_swaps, moves_inputs=True),
    Case("M16_overlap", overlapping, (0, 9), limits={"rss": 700}),
    Case("M17_unreadable", unreadable("w.bin"), 9, "w.bin", limits=NOBODY),
    Case("M17_unreadable_model", unreadable("m.onnx"), (2, 9), "m.onnx", limits=NOBODY),
    Case("M24_unsorted", checking(UNSORTED)),
    Case("M24_unsorted_build", built(UNSORTED), after=warned("not in order and have been sorted")),
    Case("M25_nest_20_build", built(graphs.nested(20), *FLOAT), (0, 5)),
    Case("M28_allowed", built(HOLED, *FLOAT, "--allow-nonfinite"), (0, 5)),
    Case("M30_again_int8", lambda room: room.build_of(quantized(room), "--int8"), 2, "quantized already"),
    Case("M30_again_float32", lambda room: room.build_of(quantized(room), *FLOAT), after=same_model),
    *(Case(f"M31_check_{id}", checking(named(name))) for id, name in NAMES.items()),
    *(Case(f"M31_inspect_{id}", inspecting(named(name), "--sparsity")) for id, name in NAMES.items()),
    *(Case(f"M31_build_{id}", built(named(name)), after=shown_safely, slow=id == "long") for id, name in NAMES.items()),
    *(Case(f"M32_check_{id}", checking(bomb(id)), 9, limits={"rss": 500}) for id in test_cleanup.BOMBS),
    *(Case(f"M32_build_{id}", built(bomb(id), *FLOAT), 9, limits={"rss": 500}) for id in test_cleanup.BOMBS),
    *(Case(f"M33_{command}_20k", looking_at(command, 20_000), limits={"wall": 20}) for command in ("check", "inspect")),
    *(Case(f"M33_{command}_200k", looking_at(command, 200_000), limits={"wall": 60, "rss": 2000}, slow=True)
      for command in ("check", "inspect")),
    Case("M34_over_2_gb", over_two_gigabytes, after=saved_beside, limits={"wall": 300, "rss": 4000}, slow=True,
         again=lambda room: ["check", str(room.good / "model.onnx")]),
    *(Case(f"M35_{id}", contradicting(profiles), 2, says, after=before_the_work)
      for id, (profiles, says) in PROFILES.items()),
    Case("M35_no_size", built(EMPTY), 2, "size 0"),
    *(Case(f"M36_{id}", built(model)) for id, model in ODD.items()),
    Case("M36_string_input", lambda room: room.build_of(planted(room, WORDS), *FLOAT),
         after=warned("'x' cannot be fed")),
]  # fmt: skip
