"""M, models that are odd, and what is made of them all the same: built, quantized again, refused before the work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import test_admit_graphs as graphs
from onnx import numpy_helper

from faults.case import Case, Ended, Room
from faults.rows_m import checking, inspecting, planted

FLOAT = ("--recipe", "float32")


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


def idle(name: str) -> Callable[[Room], list[str]]:
    """Build it where nothing can be quantized, of which the result warns by the names of nodes."""

    def plant(room: Room) -> list[str]:
        argv = built(named(name))(room)
        np.savez(room.inputs / "calib.npz", x=np.zeros((16, 32), "f"))
        return argv

    return plant


TOLD: dict[str, Callable[[Room, Path], list[str]]] = {
    "tree": lambda room, path: ["inspect", "--tree", str(path)],
    "plan": lambda room, path: ["plan", str(path), "--target", "ort-cpu", "--nodes"],
    "diff": lambda room, path: ["diff", str(path), str(room.good / "model.onnx")],
    "export": lambda room, path: ["export", str(path), "-o", str(room.artefact)],
}
"""Other commands that speak of names."""


def shown_safely(room: Room, ended: Ended) -> None:
    """Nothing of a name acts in what is published for people to read."""
    for name in ("report.md", "report.html", "README.md"):
        text = (room.artefact / name).read_text("utf-8")
        assert not {"\x1b", "\0", "\u202e", "\u2066", "\x9b", "\x7f"} & set(text), name
        shown = re.sub(r"(`+).*?\1", "", text) if name.endswith(".md") else text  # what is code there is text
        assert "<script>alert" not in shown, name
        assert "\nerror: forged" not in text, name
        assert len(text) < 6 << 20, name
    assert not Path("/tmp/owned").exists()


def both(*checks: Callable[[Room, Ended], None]) -> Callable[[Room, Ended], None]:
    """All of them."""

    def after(room: Room, ended: Ended) -> None:
        for check in checks:
            check(room, ended)

    return after


def reasoned(room: Room, ended: Ended) -> None:
    """Whatever was done or left alone has a reason."""
    steps = json.loads((room.artefact / "result.json").read_bytes())["steps"]
    decisions = [decision for step in steps for decision in step["decisions"]]
    assert decisions
    assert all(decision["reason"] for decision in decisions)


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


CASES = [
    Case("M24_unsorted", checking(UNSORTED)),
    Case("M24_unsorted_build", built(UNSORTED), after=warned("not in order and have been sorted")),
    Case("M25_nest_20_build", built(graphs.nested(20), *FLOAT), (0, 5)),
    Case("M28_allowed", built(HOLED, *FLOAT, "--allow-nonfinite"), (0, 5)),
    Case("M30_again_int8", lambda room: room.build_of(quantized(room), "--int8"), 2, "quantized already"),
    Case("M30_again_float32", lambda room: room.build_of(quantized(room), *FLOAT), after=same_model),
    *(Case(f"M31_check_{id}", checking(named(name))) for id, name in NAMES.items()),
    *(Case(f"M31_inspect_{id}", inspecting(named(name), "--sparsity")) for id, name in NAMES.items()),
    *(Case(f"M31_{command}_{id}", lambda room, id=id, tell=tell: tell(room, planted(room, named(NAMES[id]))))
      for command, tell in TOLD.items() for id in ("escape", "lines", "c1")),
    *(Case(f"M31_idle_{id}", idle(NAMES[id]), after=both(warned("nothing was quantized"), shown_safely))
      for id in ("escape", "lines", "c1")),
    *(Case(f"M31_build_{id}", built(named(name)), after=shown_safely, slow=id == "long") for id, name in NAMES.items()),
    *(Case(f"M35_{id}", contradicting(profiles), 2, says, after=before_the_work)
      for id, (profiles, says) in PROFILES.items()),
    Case("M35_no_size", built(EMPTY), 2, "size 0"),
    *(Case(f"M36_{id}", built(model), after=reasoned) for id, model in ODD.items()),
    Case("M36_string_input", lambda room: room.build_of(planted(room, WORDS), *FLOAT),
         after=warned("'x' cannot be fed")),
]  # fmt: skip
