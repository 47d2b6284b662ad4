"""Graphs that are no plain arithmetic, M36: loops, branches, shapes from data, strings; and inputs of no size, M35."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import qexport
from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.load import load_source
from qexport.exporter.options import BuildOptions
from qexport.exporter.proof.equality import distance
from qexport.exporter.recipe_files import load_recipe
from qexport.exporter.samples import open_samples

RNG = np.random.default_rng(0)
WEIGHTS = {"w": RNG.standard_normal((32, 32)).astype(np.float32), "v": RNG.standard_normal((32, 32)).astype(np.float32)}
GRAPHS = {
    "loop": """(float[n, 32] x) => (float[n, 32] y) <int64 m = {2}, bool c = {1}> {
        h = MatMul(x, w) y = Loop(m, c, h) <body = b (int64 i, bool k, float[n, 32] s) => (bool r, float[n, 32] t) {
        r = Identity(k) p = MatMul(s, v) t = Tanh(p) }> }""",
    "if": """(float[n, 32] x) => (float[n, 32] y) <float z = {0.0}> {
        h = MatMul(x, w) a = ReduceSum <keepdims = 0> (h) c = Greater(a, z) y = If(c) <
        then_branch = t () => (float[n, 32] u) { u = MatMul(h, v) }, else_branch = e () => (float[n, 32] o) {
        o = Relu(h) }> }""",
    "nonzero": """(float[n, 32] x) => (float[n, 32] y, int64[2, k] places) {
        y = MatMul(x, w) r = Relu(y) places = NonZero(r) }""",
    "strings_inside": """(float[n, 32] x) => (float[n, 32] y, string[n, 32] said) {
        y = MatMul(x, w) h = Floor(y) i = Cast <to = 7> (h) s = Cast <to = 8> (i) said = StringConcat(s, s) }""",
    "sequence": """(float[n, 32] x) => (float[n, 32] y, seq(float[n, 32]) parts) {
        y = MatMul(x, w) parts = SequenceConstruct(x, y) }""",
}


def saved(folder, text, **weights):
    """A model of opset 20 in a file, with the weights that it reads."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g {text}')
    for name, array in weights.items():
        if name in text:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx"


def built(folder, model, recipe, **data):
    options = BuildOptions(target="ort-cpu", output=folder / "out", set=("export.never_worse=false",))
    return qexport.build(model, recipe=recipe, options=options, **data)


def answers(path, x):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip((port.name for port in session.get_outputs()), session.run(None, {"x": x}), strict=True))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("recipe", ["float32", "int8"])
def test_m36_a_graph_with_odd_operators_is_built_and_what_is_left_alone_has_a_reason(tmp_path, name, recipe):
    model = saved(tmp_path, GRAPHS[name], **WEIGHTS)
    x = RNG.standard_normal((20, 32)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    result = built(tmp_path, model, recipe, **({"calib": tmp_path / "x.npz"} if recipe == "int8" else {}))
    decisions = [decision for step in result.steps for decision in step.decisions]
    assert all(decision.reason for decision in decisions)
    before, after = answers(model, x[:4]), answers(tmp_path / "out/model.onnx", x[:4])
    if recipe == "float32":
        assert distance(before, after) < 1e-5
    else:
        gap = np.linalg.norm(before["y"] - after["y"]) / np.linalg.norm(before["y"])
        assert 1e-6 < gap < 0.2


STRINGS = "(string[n, k] x) => (string[n, k] y) { y = StringConcat(x, x) }"


def test_m36_a_model_that_reads_strings_is_built_by_a_recipe_without_data(tmp_path):
    text = STRINGS.replace("[n, k]", "[k]")
    result = built(tmp_path, saved(tmp_path, text), "float32")
    assert "equality was not proven: the input 'x' cannot be fed" in result.warnings
    assert answers(tmp_path / "out/model.onnx", np.array(["a", "b"], object))["y"].tolist() == ["aa", "bb"]


def test_m36_data_for_a_model_that_reads_strings_is_refused_with_what_to_do(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.ones((4, 3), np.float32))
    with pytest.raises(
        ModelInvalid, match=r"input .x.: has the type STRING.*recipes that need no data, such as float32"
    ):
        built(tmp_path, saved(tmp_path, STRINGS), "int8", calib=tmp_path / "x.npz")
    with pytest.raises(UsageError, match="needs calibration data"):
        built(tmp_path, saved(tmp_path, STRINGS), "int8")


def test_m35_an_input_without_elements_is_refused_before_the_work(tmp_path):
    model = saved(tmp_path, "(float[n, 0] x) => (float[n, 0] y) { y = Relu(x) }")
    with pytest.raises(UsageError, match=r"model input 'x': has the shape \[None, 0\]: an axis of size 0"):
        open_samples(load_source(model), load_recipe("float32"), None, None)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (np.array(["a", "b"], object), np.array(["a", "b"], object), True),
        (np.array(["a", "b"], object), np.array(["a", "c"], object), False),
        ([np.ones(2), np.ones(3)], [np.ones(2), np.ones(3)], True),
        ([np.ones(2), np.ones(3)], [np.ones(2), np.zeros(3)], False),
        ([np.ones(2)], [np.ones(2), np.ones(2)], False),
        ([np.ones(2), np.ones(2)], [np.ones(2)], False),
        ([{"a": 1.0}], [{"a": 1.0}], True),
        ([{"a": 1.0}], [{"b": 1.0}], False),
        (None, None, True),
        (np.ones(2), None, False),
    ],
)
def test_outputs_that_are_no_arrays_of_numbers_are_compared_too(one, other, equal):
    assert (distance({"y": one}, {"y": other}) == 0) == equal
