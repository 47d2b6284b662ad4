"""``qexport plan``: a mixed-precision recipe inside a budget that a build reproduces."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qexport
import qexport.cli
from qexport.errors import GateFailed, UsageError
from qexport.exporter.options import BuildOptions
from qexport.exporter.precision.lab import Question
from qexport.exporter.precision.plan import (
    Point,
    choose,
    milestones,
    order_units,
    with_budget,
    with_pareto,
)
from qexport.exporter.precision.publish import publish_plan
from qexport.exporter.precision.sensitivity import LayerRow

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 32] x) => (float[n, 32] y) {
    h = MatMul(x, w)  t = Tanh(h)  s = Mul(t, spread)  k = MatMul(s, v)  e = Tanh(k)  y = MatMul(e, u) }"""

PLAIN = """[[step]]
pass = "calibrate"
[[step]]
pass = "quantize"
[export]
engine = false
"""


@pytest.fixture
def folder(tmp_path):
    """Three products; the second one reads a channel a thousand times larger than the others."""
    rng = np.random.default_rng(0)
    w, v, u = rng.standard_normal((3, 32, 32)) / 6
    spread = np.ones(32)
    spread[0] = 3000
    proto = onnx.parser.parse_model(TEXT)
    for name, array in {"w": w, "v": v / spread[:, None], "u": u, "spread": spread}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    onnx.save(proto, tmp_path / "model.onnx")
    x = rng.standard_normal((96, 32)).astype(np.float32)
    labels = (np.tanh(np.tanh(x @ w) @ v) @ u).argmax(axis=1)
    np.savez(tmp_path / "calib.npz", x=x[:48])
    np.savez(tmp_path / "eval.npz", x=x[48:], labels=labels[48:])
    (tmp_path / "mine.toml").write_text(PLAIN)
    return tmp_path


def question(folder, *, labelled=True, max_drop=None, min_cosine=None, recipe=None):
    data = folder / "eval.npz" if labelled else None
    asked = Question(folder / "model.onnx", recipe or folder / "mine.toml", folder / "calib.npz", data, samples=24)
    return with_budget(asked, max_drop, min_cosine)


def test_the_layer_that_ruins_the_model_stays_in_float_and_a_build_gives_the_same_numbers(folder):
    plan = publish_plan(question(folder, max_drop=2.5), folder / "plan.toml")
    assert plan.keep == ("k",)
    assert not plan.points[0].fits
    chosen = plan.points[plan.chosen]
    assert (chosen.quantized, chosen.kept, chosen.fits) == (2, 1, True)
    assert plan.points[-1].quantized == 0
    options = BuildOptions(output=folder / "out")
    data = {"calib": folder / "calib.npz", "eval": folder / "eval.npz"}
    result = qexport.build(folder / "model.onnx", recipe=folder / "plan.toml", **data, options=options)
    assert result.quantized == 2
    assert result.quality.task.drop == pytest.approx(chosen.drop)
    assert result.quality.least_mean == pytest.approx(chosen.cosine_mean, abs=1e-7)
    assert result.gates == {"max_drop": 2.5}
    assert result.target == plan.target == "tensorrt-rtx"


def test_the_recipe_extends_the_one_it_was_asked_for(folder):
    publish_plan(question(folder, max_drop=2.5), folder / "plan.toml")
    document = tomllib.loads((folder / "plan.toml").read_text("utf-8"))
    assert document["extends"] == "./mine.toml"
    assert {"pass": "quantize", "min_sqnr": 0.0, "keep": ["k"]} in document["step"]
    assert document["export"]["never_worse"] is False


def test_what_chooses_layers_by_itself_is_off_and_stays_off_in_the_plan(folder):
    (folder / "mine.toml").write_text(
        PLAIN.replace(
            '[[step]]\npass = "quantize"', '[[step]]\npass = "triage"\nshare = 0.0\n\n[[step]]\npass = "quantize"'
        )
    )
    plan = publish_plan(question(folder, max_drop=100.0), folder / "plan.toml")
    assert (plan.points[0].quantized, plan.points[0].kept) == (3, 0)
    steps = tomllib.loads((folder / "plan.toml").read_text("utf-8"))["step"]
    assert {"pass": "triage", "enabled": False} in steps
    options = BuildOptions(output=folder / "out")
    data = {"calib": folder / "calib.npz", "eval": folder / "eval.npz"}
    built = qexport.build(folder / "model.onnx", recipe=folder / "plan.toml", **data, options=options)
    assert built.quantized == 3


def test_names_that_were_kept_before_stay_kept(folder):
    (folder / "mine.toml").write_text(PLAIN.replace('"quantize"', '"quantize"\nkeep = ["h"]'))
    publish_plan(question(folder, min_cosine=0.995, labelled=False), folder / "plan.toml")
    steps = tomllib.loads((folder / "plan.toml").read_text("utf-8"))["step"]
    assert next(step["keep"] for step in steps if step["pass"] == "quantize") == ["h", "k"]


def test_a_budget_that_int8_holds_keeps_nothing(folder):
    plan = publish_plan(question(folder, max_drop=100.0), folder / "plan.toml")
    assert plan.keep == ()
    assert plan.chosen == 0


def test_a_mixture_that_is_not_finite_is_a_point_outside_the_budget(folder, capsys, monkeypatch):
    rng = np.random.default_rng(1)
    w, v, spread = rng.standard_normal((32, 32)) / 6, rng.random((32, 32)), np.ones(32)
    spread[0], v[0] = 3000, 0  # in 8 bits the other channels are 0, and so is what Log gets
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, 32] x) => (float[n, 32] y) {
        h = MatMul(x, w)  t = Sigmoid(h)  s = Mul(t, spread)  k = MatMul(s, v)  y = Log(k) }"""
    proto = onnx.parser.parse_model(text)
    for name, array in {"w": w, "v": v, "spread": spread}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    onnx.save(proto, folder / "model.onnx")
    plan = publish_plan(question(folder, max_drop=50.0), folder / "plan.toml")
    assert plan.keep == ("k",)
    first, chosen = plan.points[0], plan.points[plan.chosen]
    assert (first.drop, first.cosine_mean, first.cosine_worst, first.fits, first.pareto) == (*[None] * 3, False, False)
    assert (chosen.quantized, chosen.fits, chosen.pareto) == (1, True, True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.chdir(folder)
    arguments = ["plan", "model.onnx", "--calib", "calib.npz", "--eval", "eval.npz", "--max-drop", "50"]
    assert qexport.cli.run([*arguments, "--recipe", "mine.toml"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "all 2 in int8" in line)
    assert line.count("not finite") == 3


def test_a_budget_that_nothing_holds_fails_and_writes_nothing(folder):
    before = sorted(folder.iterdir())
    with pytest.raises(GateFailed, match=r"gate max_drop: .*with all 3 layers in float"):
        publish_plan(question(folder, max_drop=-50.0), folder / "plan.toml")
    assert sorted(folder.iterdir()) == before


def test_what_cannot_be_planned_is_refused_before_the_work(folder):
    with pytest.raises(UsageError, match=r"no budget.*--max-drop"):
        question(folder)
    with pytest.raises(UsageError, match=r"gate max_drop: no labels.*--eval"):
        publish_plan(question(folder, max_drop=1.0, labelled=False), folder / "plan.toml")
    with pytest.raises(UsageError, match=r"must end in \.toml"):
        publish_plan(question(folder, max_drop=1.0), folder / "plan.txt")
    with pytest.raises(UsageError, match="replace the recipe it extends"):
        publish_plan(question(folder, max_drop=1.0), folder / "mine.toml")
    with pytest.raises(UsageError, match="no such folder"):
        publish_plan(question(folder, max_drop=1.0), folder / "gone" / "plan.toml")
    with pytest.raises(UsageError, match="no step that quantizes"):
        publish_plan(question(folder, max_drop=1.0, recipe="float16"), folder / "plan.toml")


def test_overrides_that_the_recipe_would_not_hold_are_refused_and_gates_are_written(folder):
    asked = question(folder, min_cosine=0.99)
    (*gates,) = asked.options.set
    for setting in ("quantize.min_sqnr=20", "export.engine=false"):
        spoiled = replace(asked, options=replace(asked.options, set=(setting, *gates)))
        with pytest.raises(UsageError, match=rf"cannot keep the override '{setting}'.*a recipe file that extends"):
            publish_plan(spoiled, folder / "plan.toml")
    assert not (folder / "plan.toml").exists()
    more = replace(asked, options=replace(asked.options, set=(*gates, "gates.min_worst_cosine=0.9")))
    publish_plan(more, folder / "plan.toml")
    written = tomllib.loads((folder / "plan.toml").read_text("utf-8"))["gates"]
    assert written == {"min_cosine": 0.99, "min_worst_cosine": 0.9}


def test_the_command_prints_the_points_or_one_object(folder, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.chdir(folder)
    arguments = ["plan", "model.onnx", "--calib", "calib.npz", "--eval", "eval.npz", "--max-drop", "2.5"]
    assert qexport.cli.run([*arguments, "--recipe", "mine.toml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["keep"], told["task"]) == ("qexport.plan/1", ["k"], "top1")
    assert (folder / "plan.toml").exists()
    assert qexport.cli.run([*arguments, "--recipe", "int8", "-o", "other.toml"]) == 0
    assert "budget: max_drop 2.5, top1 on eval.npz" in capsys.readouterr().out
    assert tomllib.loads((folder / "other.toml").read_text("utf-8"))["extends"] == "int8"
    capsys.readouterr()
    assert qexport.cli.run([*arguments[:-2], "--recipe", "int8"]) == 0
    assert "a build would" in capsys.readouterr().out


def row(name, error, share=0.1, size=100):
    numbers = {"sqnr": 1.0, "cosine_mean": 1.0, "cosine_worst": 1.0}
    return LayerRow(node=name, op="", error=error, estimate=None, layer_sqnr=None, bytes=size, share=share, **numbers)


def test_what_loses_most_for_the_least_time_goes_first():
    rows = [row("dear", 2.0, share=0.9), row("cheap", 1.0, share=0.05), row("fine", 0.001), row("add", 0.5, 0.0, 0)]
    units = [("dear",), ("cheap", "add"), ("fine",)]
    assert order_units(rows, units) == [("cheap", "add"), ("dear",), ("fine",)]


def test_milestones_lie_where_half_and_less_of_the_error_is_left():
    rows = [row("a", 0.6), row("b", 0.2), row("c", 0.12), row("d", 0.06), row("e", 0.02)]
    assert milestones(rows, [(name,) for name in "abcde"]) == [1, 2, 3, 4]
    assert milestones([row("a", 0.0), row("b", 0.0)], [("a",), ("b",)]) == [0]


def test_a_layer_that_makes_infinity_goes_first_and_counts_in_no_share():
    rows = [row("a", 0.6), row("b", 0.4), row("c", float("inf")), row("d", float("inf"))]
    order = order_units(rows, [(name,) for name in "abcd"])
    assert set(order[:2]) == {("c",), ("d",)}
    assert milestones(rows, order) == [3, 4]


def point(loss, size, time, *, foreign=False):
    return Point(
        quantized=1, kept=0, drop=loss, cosine_mean=1, cosine_worst=1, bytes=size, milliseconds=time,
        speedup=10 / time, foreign=foreign, fits=True,
    )  # fmt: skip


def test_the_fastest_wins_where_time_counts_and_the_smallest_where_it_does_not():
    assert choose({0: point(0, 10, 8.0), 4: point(0, 20, 4.0)}) == 4
    assert choose({0: point(0, 10, 8.0, foreign=True), 4: point(0, 20, 4.0, foreign=True)}) == 0
    assert choose({0: point(0, 20, 4.0), 4: point(0, 10, 4.01)}) == 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=7))
def test_a_point_is_in_the_pareto_set_unless_another_one_beats_it(values):
    points = with_pareto([point(float(a), b, float(c)) for a, b, c in values])
    for one, value in zip(points, values, strict=True):
        beaten = any(o != value and all(x <= y for x, y in zip(o, value, strict=True)) for o in values)
        assert one.pareto == (not beaten)
