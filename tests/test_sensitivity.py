"""``qexport sensitivity``: groups are found by tracing, layers measured alone, estimates agree."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qexport.cli
from qexport.calibration.reading.tasks import Spearman, Top1
from qexport.calibration.running.execute import open_model
from qexport.errors import EnvironmentMismatch, UsageError
from qexport.exporter.options import BuildOptions
from qexport.exporter.precision.activations import (
    ATTENTION,
    EMBEDDINGS,
    FFN,
    LAST,
    OTHERS,
    SOFTMAX_IN,
    SOFTMAX_OUT,
    Switchboard,
    find_groups,
    last_layers,
    leave_one_out,
    measure_ranges,
)
from qexport.exporter.precision.excerpt import Excerpt, take_excerpt
from qexport.exporter.precision.fisher import fisher
from qexport.exporter.precision.lab import Question, open_lab
from qexport.exporter.precision.layers import correlation, measure_groups, open_probe
from qexport.exporter.precision.publish import publish_sensitivity
from qexport.exporter.precision.sensitivity import analyse
from qexport.exporter.product import requantize
from qexport.exporter.proof.quality import Judge
from qexport.passes.target import find_target

TARGET = find_target("tensorrt-rtx")


def graph_of(text, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


MIXED = """g (float[n, 8, 6, 6] x) => (float[n, 16] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, k)  r = Relu(c)  d = Conv <pads = [1, 1, 1, 1]> (r, k)  a = Add(d, x)
    p = GlobalAveragePool(a)  f = Flatten(p)  h = Gemm(f, w, b)  t = Tanh(h)  u = MatMul(t, v)  z = MatMul(u, v)
    y = Softmax(z) }"""


@pytest.fixture
def mixed(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"k": rng.standard_normal((8, 8, 3, 3)) / 6, "w": rng.standard_normal((8, 16)), "b": np.ones(16)}
    model = graph_of(MIXED, **weights, v=rng.standard_normal((16, 16)) / 3)
    onnx.save(ir.to_proto(model), tmp_path / "model.onnx")
    x = rng.standard_normal((40, 8, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=x)
    np.savez(tmp_path / "eval.npz", x=x[::-1] * 0.9, labels=np.arange(40) % 16)
    (tmp_path / "plain.toml").write_text('[[step]]\npass = "calibrate"\n[[step]]\npass = "quantize"\n')
    return tmp_path


def question(folder, target="ort-cpu", **options):
    data = folder / "calib.npz", folder / "eval.npz"
    asked = BuildOptions(target=target)
    return Question(folder / "model.onnx", folder / "plain.toml", *data, asked, **{"samples": 24, **options})


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
def test_an_injected_error_is_what_that_layer_alone_quantized_does(mixed, target):
    lab = open_lab(question(mixed, target, samples=16))
    names = lab.product.quantized
    assert {"c", "d", "u", "z"} <= set(names)
    assert "a" in names  # but no Add is quantized without its convolution
    probe = open_probe(lab.product, lab.excerpt, lab.target)
    assert probe.unreached == ()
    scores = dict(zip(names, measure_groups(probe, [[name] for name in names]), strict=True))
    truth = open_model(lab.source.model)
    for name in set(names) - {"a"}:
        alone = open_model(requantize(lab.product, lab.samples, set(names) - {name}).model)
        signal = noise = 0.0
        for _, feeds in probe.batches():
            a, b = (session.run(feeds)["y"].astype(np.float64) for session in (truth, alone))
            signal, noise = signal + np.square(a).sum(), noise + np.square(a - b).sum()
        assert scores[name].error == pytest.approx(noise / signal, rel=0.02), name


def test_without_errors_the_probe_is_the_float_model_and_groups_add_up(mixed):
    lab = open_lab(question(mixed))
    probe = open_probe(lab.product, lab.excerpt, lab.target)
    truth = open_model(lab.source.model)
    for indices, feeds in probe.batches():
        np.testing.assert_allclose(probe.rows(feeds, len(indices)), truth.run(feeds)["y"], rtol=1e-5, atol=1e-6)
    names = lab.product.quantized
    none, one, both = measure_groups(probe, [["gone"], ["c"], [n for n in names if n != "c"]])
    assert none.error == 0
    assert none.cosine_worst == pytest.approx(1)
    assert 0 < one.error != both.error > 0
    assert one.drop is not None


def test_the_fisher_estimate_is_the_weighted_squared_error():
    rng = np.random.default_rng(0)
    w, v = rng.standard_normal((2, 16, 16))
    model = graph_of("g (float[n, 16] x) => (float[n, 16] y) { h = MatMul(x, w)  y = MatMul(h, v) }", w=w, v=v)
    rounded = model.clone()
    rounded.graph.initializers["w"].const_value = ir.tensor((np.round(w * 4) / 4).astype(np.float32), name="w")
    samples = tuple({"x": rng.standard_normal(16).astype(np.float32)} for _ in range(64))
    from qexport.exporter.precision.probe import Probe

    probe = Probe(model, rounded, ["h"], Excerpt(samples, None), TARGET)
    found = fisher(probe, probe.batches(), draws=30)
    x = np.stack([sample["x"] for sample in samples]).astype(np.float64)
    error = x @ (np.round(w * 4) / 4 - w)
    expected = (np.square(error) @ np.square(v).sum(axis=1)).sum() / np.square(x @ w @ v).sum()
    assert found["h"] == pytest.approx(expected, rel=0.05)


def test_correlation_is_that_of_the_ranks():
    measured = {"a": 1.0, "b": 10.0, "c": 100.0, "d": 5.0}
    assert correlation(measured, {"a": 0.1, "b": 0.3, "c": 0.4, "d": 0.2}) == 1
    assert correlation(measured, {"a": 4.0, "b": 2.0, "c": 1.0, "x": 9.0}) == -1
    assert correlation(measured, {"a": 4.0, "b": 2.0}) is None


def test_groups_are_found_by_tracing(outlier_model):
    groups = find_groups(outlier_model.transformer(blocks=2).graph)
    assert groups == {
        SOFTMAX_IN: ("ls0", "ls1"),
        EMBEDDINGS: ("r0",),
        ATTENTION: ("o0", "o1"),
        SOFTMAX_OUT: ("p0", "p1"),
        FFN: ("r1", "r2"),
        OTHERS: ("h0", "cf0", "n0", "a0", "h1", "cf1", "n1", "a1"),
    }
    assert last_layers(tuple(map(str, range(12)))) == ("10", "11")
    assert last_layers(("a", "b")) == ("b",)


def test_a_classifiers_softmax_is_no_attention():
    ones = {"k": np.ones((8, 8, 3, 3)), "w": np.ones((8, 16)), "b": np.ones(16), "v": np.eye(16)}
    assert set(find_groups(graph_of(MIXED, **ones).graph)) == {OTHERS}


def test_scores_are_quantized_before_a_mask_is_added_and_embeddings_before_their_norm():
    text = """g (int64[n, s] ids, float[n, 1, s] m) => (float[n, s, 4] y) {
        w0 = Gather(table, ids)  e = Add(w0, place)  x = LayerNormalization(e, one)
        q = MatMul(x, wq)  k = MatMul(x, wk)  t = Transpose <perm = [0, 2, 1]> (k)  l = MatMul(q, t)  d = Div(l, two)
        b = Mul(m, low)  a = Add(d, b)  p = Softmax(a)  c = MatMul(p, x)  o = MatMul(c, wo)  r = Add(o, x)
        h = LayerNormalization(r, one)  u = MatMul(h, wq)  v = Relu(u)  f = MatMul(v, wo)  g2 = Add(h, f)
        y = LayerNormalization(g2, one) }"""
    squares = {name: np.eye(4) for name in ("wq", "wk", "wo")}
    model = graph_of(text, **squares, table=np.ones((9, 4)), place=np.ones(4), one=np.ones(4), two=[2], low=[-1e9])
    groups = find_groups(model.graph)
    assert groups[SOFTMAX_IN] == ("d",)
    assert groups[EMBEDDINGS] == ("e",)
    assert groups[ATTENTION] == ("o",)
    assert groups[FFN] == ("g2",)


def planted(outlier_model, node):
    """A transformer with two enormous channels in one tensor of the residual stream, which its last norm hides."""
    model = outlier_model.transformer(blocks=2)
    spike = (np.arange(64) == 5).astype(float) - (np.arange(64) == 6)  # its mean is zero, as LayerNorm wants it
    changes = {node: lambda array: array + 3000 * spike, "gf": lambda array: array * (spike == 0), "bf": np.zeros_like}
    for name, change in changes.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(change(value.const_value.numpy()).astype(np.float32), name=name)
    return model


def table_of(outlier_model, model, count=12):
    groups = find_groups(model.graph)
    data = outlier_model.sentences(count)
    ranges = measure_ranges(model, groups, data)
    return {row.name: row for row in leave_one_out(model, groups, ranges, Excerpt(tuple(data), None), TARGET)}


def test_the_residual_after_the_ffn_restores_a_model_that_has_its_outliers_there(outlier_model):
    rows = table_of(outlier_model, planted(outlier_model, "bd_1"))
    lost, restored = rows["nothing"].score, rows[FFN].score
    assert lost.sqnr < 10
    assert restored.sqnr > 25
    assert rows[LAST].score.sqnr > 25  # they are in the last layer only
    for name in (SOFTMAX_IN, EMBEDDINGS, ATTENTION, SOFTMAX_OUT, OTHERS):
        assert abs(rows[name].score.sqnr - lost.sqnr) < 3, name
    assert rows[FFN].tensors == 2


def test_without_outliers_no_group_stands_out(outlier_model):
    rows = table_of(outlier_model, outlier_model.transformer())
    assert min(row.score.sqnr for row in rows.values()) > 20
    assert max(row.score.sqnr for row in rows.values()) - rows["nothing"].score.sqnr < 6


def test_a_switchboard_with_all_switches_off_is_the_float_model_and_on_quantizes_as_numpy_does():
    text = "g (float[n, 8] x) => (float[n, 8] a, float[n, 8] y) { a = Gelu(x)  y = Mul(a, two) }"
    model = graph_of(text, two=[2])
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    ranges = measure_ranges(model, {"g": ("a",)}, [{"x": row} for row in x])
    board = Switchboard(model, ranges, TARGET)
    off, on = (board.with_quantized(names).run({"x": x}, ["a", "y"]) for names in ((), ("a",)))
    truth = open_model(model).run({"x": x})
    np.testing.assert_array_equal(off["a"], truth["a"])
    scale = np.float32(np.abs(truth["a"]).max() / 127)
    expected = np.rint(truth["a"] / scale) * scale
    np.testing.assert_allclose(on["a"], expected, atol=1e-6)
    np.testing.assert_allclose(on["y"], 2 * expected, atol=1e-6)


def test_an_excerpt_keeps_pairs_and_labels_together(outlier_model):
    data = outlier_model.Samples({"x": np.array([float(i)])} for i in range(40))
    pairs = take_excerpt(Judge(data, Spearman(np.arange(20.0)), held_out=True), 8)
    first, second = np.split(np.array([sample["x"][0] for sample in pairs.samples]), 2)
    assert (second - first == 20).all()
    assert (pairs.task.scores == first).all()
    labels = take_excerpt(Judge(data, Top1(np.arange(40) % 7), held_out=True), 6)
    assert [sample["x"][0] % 7 for sample in labels.samples] == labels.task.labels.tolist()
    assert take_excerpt(Judge(data, Spearman(np.ones(20)), held_out=True), 4).task is None
    assert len(take_excerpt(Judge(data, None, held_out=True), 400).samples) == 40


def test_layers_come_most_sensitive_first_with_bytes_shares_and_a_correlation(mixed):
    found = analyse(question(mixed))
    assert [row.error for row in found.layers] == sorted((row.error for row in found.layers), reverse=True)
    rows = {row.node: row for row in found.layers}
    assert rows["c"].bytes == 8 * 8 * 9 * 4
    assert rows["a"].bytes == 0
    assert 0 < sum(row.share for row in found.layers) <= 1.01
    assert found.task == "top1"
    assert found.correlation is not None
    assert found.activations == ()
    assert any("activation groups were not measured" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": "float32"}, "no step that quantizes"),
        ({"samples": 0}, "expected 1 or more"),
        ({"calib": None}, "needs calibration data"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_work(mixed, changes, told):
    asked = question(mixed)
    options = BuildOptions(target="ort-cpu")
    values = {"recipe": "int8", "calib": asked.calib, "samples": 4, **changes}
    with pytest.raises(UsageError, match=told):
        open_lab(Question(asked.model, values["recipe"], values["calib"], None, options, values["samples"]))


def test_a_model_with_nothing_to_quantize_is_refused_with_the_reasons(tmp_path):
    model = graph_of("g (float[n, 4] x) => (float[n, 4] y) { h = MatMul(x, w)  y = Relu(h) }", w=np.eye(4))
    onnx.save(ir.to_proto(model), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32))
    with pytest.raises(UsageError, match="K or N below 16"):
        open_lab(Question(tmp_path / "model.onnx", "int8", tmp_path / "calib.npz"))


def test_the_command_prints_tables_or_one_object(mixed, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(mixed / "cache"))
    arguments = ["sensitivity", str(mixed / "model.onnx"), "--calib", str(mixed / "calib.npz"), "--target", "ort-cpu"]
    assert qexport.cli.run([*arguments, "--samples", "8"]) == 0
    assert "rank correlation" in capsys.readouterr().out
    assert qexport.cli.run([*arguments, "--samples", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "qexport.sensitivity/1"
    assert {"c", "d"} <= {row["node"] for row in told["layers"]}


def test_without_matplotlib_plots_are_refused_before_the_work(mixed, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentMismatch, match=r"pip install 'qexport\[report\]'"):
        publish_sensitivity(question(mixed), mixed / "out")
    assert not (mixed / "out").exists()


def test_plots_and_numbers_are_published_together(mixed, monkeypatch):
    pytest.importorskip("matplotlib")
    found = publish_sensitivity(question(mixed, samples=8), mixed / "out")
    folder = mixed / "out"
    assert {path.name for path in folder.iterdir()} == {
        "layers.png", "layers.svg", "manifest.json", "sensitivity.json",
    }  # fmt: skip
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (folder / "layers.svg").read_bytes()
    assert json.loads((folder / "sensitivity.json").read_bytes())["correlation"] == pytest.approx(found.correlation)
    publish_sensitivity(question(mixed, samples=8), folder)  # what it wrote it may replace
