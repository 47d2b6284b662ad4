"""Each part of the report by itself: rows, scales, weights, kernels, tries and samples of planted models."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model_from
from PIL import Image
from report_trees import make_result, tiny

from qexport.calibration.running.execute import open_model
from qexport.calibration.statistics.histogram import Histogram
from qexport.calibration.statistics.sketch import sketch
from qexport.exporter.looking.element_types import element_types
from qexport.exporter.outcome.result import DecisionInfo, LayerQuality, SampleQuality, TaskScore, Tried
from qexport.exporter.precision.costs import attribute, flops
from qexport.exporter.precision.tried import Remembering, loss_of
from qexport.exporter.proof.quality import layer_quality
from qexport.exporter.recipe import GatesSpec
from qexport.exporter.report import roofline
from qexport.exporter.report.activations import activation_rows
from qexport.exporter.report.nodes import Graphs, bytes_of, find_rows, node_rows
from qexport.exporter.report.points import points
from qexport.exporter.report.roofline import peaks
from qexport.exporter.report.samples import picture, worst_samples
from qexport.exporter.report.scales import Scales, scale_of
from qexport.exporter.report.times import milliseconds, nodes_of
from qexport.exporter.report.weights import weight_rows
from qexport.passes.numbers.notes import ERROR_KEY, SKETCH_KEY
from qexport.passes.numbers.range import RANGE_KEY, SQNR_KEY, Range
from qexport.passes.target import find_target
from qexport.runtime.accounting.machine import Machine, fingerprint
from qexport.runtime.profile import Kernel, profile
from qexport.runtime.session import SessionOptions
from qexport.safe_io import Cache


def test_a_table_that_is_read_by_two_nodes_counts_for_the_first():
    model = model_from(
        "g (float[2] x) => (float[2] y, float[2] z) { y = Add(x, c)  z = Mul(x, c) }", c=np.ones(2, np.float32)
    )
    for node in model.graph:
        node.name = node.op_type
    assert bytes_of(model.graph) == {"Add": 8}


def test_what_was_decided_about_and_is_not_there_any_more_is_gone():
    text = "g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x)  b = Add(a, c)  y = Neg(b) }"
    before, after = (model_from(text, c=np.ones(4, np.float32)) for _ in range(2))
    for model in (before, after):
        for node in model.graph:
            node.name = node.op_type
    ir.convenience.replace_all_uses_with(after.graph[1].outputs[0], after.graph[0].outputs[0])
    after.graph.remove(after.graph[1], safe=True)
    del after.graph.initializers["c"]
    result, _ = tiny()
    decided = [DecisionInfo(node=name, op="?", action="folded", reason="r") for name in ("Add", "somewhere else")]
    step = result.steps[0].model_copy(update={"decisions": tuple(decided)})
    rows = node_rows(Graphs(before, before, after), result.model_copy(update={"steps": (step,)}), None)
    assert [(row.name, row.state, row.bytes_before) for row in rows] == [
        ("Relu", "float", 0), ("Neg", "float", 0), ("Add", "gone", 16),
    ]  # fmt: skip
    assert rows[2].why[0].reason == "r"


def test_numbers_before_are_of_the_float_model_and_numbers_after_of_the_result():
    text = "g (float[n, 4] x) => (float[n, 4] y) { y = Add(x, c) }"
    source, plain, after = (model_from(text, c=np.ones(size, np.float32)) for size in (4, 1, 1))
    for model in (source, plain, after):
        model.graph[0].name = "sum"
    plain.graph[0].meta.update({SQNR_KEY: 33.0, ERROR_KEY: 0.25})
    after.graph.initializers["c"].const_value = ir.tensor(np.ones(1, np.float16))
    result, _ = tiny()
    layers = (LayerQuality(node="sum", tensor="y", sqnr=22.0),)
    result = result.model_copy(update={"quality": result.quality.model_copy(update={"layers": layers}), "steps": ()})
    kernels = ([Kernel("sum", "Add", 0.002)], [Kernel("sum", "Add", 0.001)])
    (row,) = node_rows(Graphs(source, plain, after), result, kernels)
    assert (row.ms_before, row.ms_after) == (2.0, 1.0)
    assert (row.bytes_before, row.bytes_after) == (16, 2)  # what the source has, although a pass has cut it since
    assert (row.sqnr_own, row.sqnr, row.error) == (33.0, 22.0, 0.25)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt-rtx"])
def test_what_a_range_clips_and_the_noise_it_makes_are_those_of_numpy(target):
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    model = model_from("g (float[n, 4] x) => (float[n, 4] y) { y = Neg(x) }")
    histogram, value = Histogram(), model.graph.inputs[0]
    histogram.add(values)
    span = Range(-0.5, 1.5)
    value.meta.update({RANGE_KEY: span, SKETCH_KEY: sketch(histogram)})
    (row,) = activation_rows(model, find_target(target))
    chosen = row.candidates[0]
    assert (chosen.method, chosen.low, chosen.high) == ("chosen", -0.5, 1.5)
    assert chosen.clipped == pytest.approx(np.mean((values < -0.5) | (values > 1.5)), rel=0.02)
    if row.kind == "uint8":
        scale, low, high = 2.0 / 255, -0.5, 1.5
    else:
        scale, low, high = 1.5 / 127, -1.5 * 128 / 127, 1.5
    assert row.scale == pytest.approx(scale, rel=2e-3)
    found = np.clip(np.rint(values / scale) * scale, low, high)
    noise = np.square(values - found).sum() / np.square(values).sum()
    assert chosen.noise == pytest.approx(noise, rel=0.03)
    assert row.readers == (model.graph[0].name,)


def test_nodes_written_for_another_belong_to_its_row():
    text = "g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x)  b = Neg(a)  c = Exp(b)  y = Abs(c) }"
    model = model_from(text)
    names = ["/a/MatMul/MatMulInteger", "/a/MatMul/deep/Cast", "/a/MatMul2", "/a/Add"]
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    rows = find_rows(model.graph, {"/a/MatMul", "/a/Add"}, {"/a/MatMul"})
    assert [row.name for row in rows] == ["/a/MatMul", "/a/MatMul2", "/a/Add"]


def test_a_layer_that_was_merged_with_its_bias_is_compared_behind_the_bias():
    w = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    long = model_from(
        "g (float[n, 4] x) => (float[n, 4] z) { y = MatMul(x, w)  s = Add(y, b)  z = MatMul(s, w) }",
        w=w, b=np.ones(4, np.float32),
    )  # fmt: skip
    for node in long.graph:
        node.name = node.outputs[0].name
    short = model_from(
        "g (float[n, 4] x) => (float[n, 4] z) { s = Gemm(x, w, b)  z = MatMul(s, w) }",
        w=1.1 * w,
        b=np.ones(4, np.float32),
    )
    data = [{"x": np.full(4, 0.5, np.float32)}]
    layers = layer_quality(long, short, ["y", "z"], data, find_target("ort-cpu"))
    assert [(layer.node, layer.tensor) for layer in layers] == [("y", "s"), ("z", "z")]
    truth, found = 0.5 * w.sum(axis=0) + 1, 0.55 * w.sum(axis=0) + 1
    assert layers[0].sqnr == pytest.approx(10 * np.log10((truth**2).sum() / ((truth - found) ** 2).sum()), abs=1e-3)


def test_a_layer_is_not_mistaken_for_the_next_one():
    w = np.eye(4, dtype=np.float32)
    model = model_from("g (float[n, 4] x) => (float[n, 4] z) { y = MatMul(x, w)  z = MatMul(y, w) }", w=w)
    for node in model.graph:
        node.name = node.outputs[0].name
    one = model_from("g (float[n, 4] x) => (float[n, 4] z) { z = MatMul(x, w) }", w=w)
    layers = layer_quality(model, one, ["y", "z"], [{"x": np.ones(4, np.float32)}], find_target("ort-cpu"))
    assert [layer.node for layer in layers] == ["z"]


def test_weights_are_those_of_numpy_worst_channels_first():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((16, 64)).astype(np.float32)
    kernel[:, 5] *= 20
    model = model_from("g (float[n, 16] x) => (float[n, 64] y) { y = MatMul(x, w) }", w=kernel)
    model.graph[0].name = "product"
    assert weight_rows(model, ["other"]) == ()
    (row,) = weight_rows(model, ["product"])
    reach = np.abs(kernel).max(axis=0)
    assert (row.axis, row.channels, len(row.worst), row.worst[0].index) == (1, 64, 32, 5)
    assert row.spread == pytest.approx(np.quantile(reach, [0, 0.25, 0.5, 0.75, 1]).tolist())
    assert row.outlier == pytest.approx(reach.max() / np.median(reach))
    box = row.worst[0]
    assert (box.low, box.q25, box.q50, box.q75, box.high) == pytest.approx(
        np.quantile(kernel[:, 5], [0, 0.25, 0.5, 0.75, 1]).tolist()
    )


@pytest.mark.parametrize(
    ("text", "shape", "weight", "expected"),
    [
        ("y = MatMul(x, w)", (4, 8), (8, 16), 2 * 4 * 8 * 16),
        ("y = MatMul(x, w)", (3, 4, 8), (8, 16), 3 * 2 * 4 * 8 * 16),
        ("y = MatMul(x, w)", (3, 4, 8), (3, 8, 16), 3 * 2 * 4 * 8 * 16),
        ("y = Gemm(x, w)", (4, 8), (8, 16), 2 * 4 * 8 * 16),
        ("y = Gemm <transB = 1> (x, w)", (4, 8), (16, 8), 2 * 4 * 8 * 16),
        ("y = Gemm <transA = 1> (x, w)", (8, 4), (8, 16), 2 * 4 * 8 * 16),
        ("y = Conv <pads = [1, 1, 1, 1]> (x, w)", (1, 16, 6, 7), (32, 16, 3, 3), 2 * 32 * 6 * 7 * 16 * 9),
        ("y = Conv <group = 4> (x, w)", (1, 16, 6, 6), (32, 4, 1, 1), 2 * 32 * 36 * 4),
        ("y = ConvTranspose(x, w)", (1, 4, 5, 5), (4, 6, 2, 2), 2 * 4 * 25 * 6 * 4),
    ],
)  # fmt: skip
def test_operations_and_bytes_of_a_kernel_are_those_of_its_definition(text, shape, weight, expected):
    rng = np.random.default_rng(0)
    sizes = ", ".join(map(str, shape))
    axes = ", ".join("abcd"[: len(shape)])
    graph = f"g (float[{sizes}] x) => (float[{axes}] y) {{ {text} }}"
    model = model_from(graph, w=rng.standard_normal(weight).astype(np.float32))
    kernels = profile(
        lambda options: open_model(model, options), SessionOptions(threads=1), {"x": np.ones(shape, np.float32)}
    )
    (work,) = (kernel for kernel in kernels if flops(kernel, weight))
    assert flops(work, weight) == expected
    assert work.bytes == 4 * (np.prod(shape) + np.prod(work.outputs[0]))


def test_operations_of_integer_kernels_are_counted_too():
    shapes = {"MatMulIntegerToFloat": ((4, 8), (8, 16)), "QLinearMatMul": ((4, 8), (1,), (1,), (8, 16))}
    for op, inputs in shapes.items():
        assert flops(Kernel("k", op, 1.0, inputs, ((4, 16),))) == 2 * 4 * 8 * 16
    convolution = Kernel("k", "QLinearConv", 1.0, ((1, 16, 6, 7), (1,), (1,)), ((1, 32, 6, 7),))
    assert flops(convolution, (32, 16, 3, 3)) == 2 * 32 * 6 * 7 * 16 * 9
    assert flops(convolution) == 0
    assert flops(Kernel("k", "Softmax", 1.0, ((4, 8),), ((4, 8),))) == 0
    assert flops(Kernel("k", "MatMul", 1.0)) == 0  # a runtime that tells no shapes


def test_the_machine_is_measured_once_where_there_is_a_cache(tmp_path, monkeypatch):
    known = Machine(fingerprint(), 1, ((1, 2.0), (2, 1.0)), 3.0, 4.0)
    monkeypatch.setattr(roofline, "_measured", lambda: known)
    cache = Cache(tmp_path / "cache")
    assert peaks(cache) == known
    monkeypatch.setattr(roofline, "_measured", lambda: pytest.fail("measured again"))
    assert peaks(cache) == known
    (stored,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    stored.write_bytes(stored.read_bytes()[:-3])
    monkeypatch.setattr(roofline, "_measured", lambda: replace(known, flops=5.0))
    assert peaks(cache).flops == 5.0


def test_what_the_runtime_merged_counts_for_the_product_or_convolution_it_began_with():
    text = """g (float[1, 16, 8, 8] x) => (float[1, 16, 8, 8] z) {
        h = Conv <pads = [1, 1, 1, 1]> (x, w)  r = Relu(h)  k = Conv <pads = [1, 1, 1, 1]> (r, w)  s = Add(k, r)
        z = Relu(s) }"""
    model = model_from(text, w=np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32))
    for node in model.graph:
        node.name = f"/l/{node.outputs[0].name}"
    feeds = {"x": np.ones((1, 16, 8, 8), np.float32)}
    kernels = profile(lambda options: open_model(model, options), SessionOptions(threads=1), feeds)
    assert [kernel.op for kernel in kernels if kernel.op == "Relu"] == []  # both are merged, as is the Add
    working = [
        node.name for kernel, node in zip(kernels, nodes_of(model.graph, kernels), strict=True) if kernel.op == "Conv"
    ]
    assert working == ["/l/h", "/l/k"]
    assert {"/l/h", "/l/k"} <= set(milliseconds(model.graph, kernels)) <= {"/l/h", "/l/k", "/l/z", "/l/r", "/l/s"}


def test_a_product_that_the_runtime_has_given_a_bias_is_found_by_its_name():
    kernels = [Kernel("first", "?", 1e-3), Kernel("fused /l/h/MatMulAddFusion", "Gemm", 2e-3)]
    assert attribute(kernels, {"first": 0, "/l/h": 1}, 2) == pytest.approx([1, 2])


def test_a_second_activation_is_no_weight():
    text = """g (float[n, 4] x) => (float[n, 4] y) {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = Add(d, d) }"""
    model = model_from(text, s=np.array(0.5, np.float32), z=np.array(3, np.uint8))
    add = model.graph[-1]
    assert scale_of(add, element_types(model)) == Scales("uint8", "", 0.5, 3, None)
    both = model_from("g (float[n, 4] x, float[4, 4] w) => (float[n, 4] y) { y = MatMul(x, w) }")
    assert scale_of(both.graph[0], element_types(both)) == Scales("float32")


def test_every_try_but_the_chosen_one_is_kept():
    class Fake:
        def judge(self, product):
            return make_result().quality

        def time(self, product):
            return make_result().latency

    class Product:
        model = model_from("g (float[2] x) => (float[2] y) { y = Add(x, c) }", c=np.ones(2, np.float32))

        def __init__(self, *names):
            self.quantized = names

    first, second = Product("a", "b"), Product("a")
    bench = Remembering(Fake())
    bench.judge(first)
    bench.time(second)
    bench.judge(second)
    (tried,) = bench.tried(first, second, GatesSpec(max_drop=0.1))
    assert tried == Tried(kept=0, loss=0.32, unit="points", bytes=8, fits=False)
    (tried,) = bench.tried(first, first, GatesSpec(max_drop=1.0))
    assert (tried.kept, tried.ms, tried.speedup, tried.fits) == (1, 5.0, 2.0, True)


def test_points_hold_float_the_tries_and_the_result_and_tell_who_is_beaten():
    result, report = tiny()
    found = points(result, report.nodes, 23_900_000)
    float_, tried, chosen = (point for point in found if point.measured)
    assert (float_.label, float_.loss, float_.ms, float_.bytes) == ("float", 0.0, 10.0, 90_900_000)
    assert (tried.label, tried.bytes, tried.fits) == ("1 in float", 23_100_000, False)
    assert (chosen.chosen, chosen.loss, chosen.ms) == (True, 0.32, 5.0)
    assert all(point.pareto for point in (float_, tried, chosen))
    slower = result.model_copy(update={"tried": (result.tried[0].model_copy(update={"ms": 6.0, "bytes": 10**9}),)})
    assert [p.pareto for p in points(slower, report.nodes, 23_900_000) if p.measured] == [True, False, True]
    assert points(result.model_copy(update={"quality": None}), report.nodes, 0) == ()


def test_a_dot_of_the_roofline_counts_what_is_read_and_made_with_the_weights_as_they_are_stored(monkeypatch):
    monkeypatch.setattr(roofline, "peaks", lambda cache: Machine(fingerprint(), 1, ((1, 2.0),), 3.0, 4.0))
    head, w = "g (float[4, 8] x) => (float[4, 16] y) ", np.ones((8, 16), np.float32)
    plain = model_from(head + "{ y = MatMul(x, w) }", w=w)
    stored = model_from(
        head + "{ d = DequantizeLinear(w, s)  y = MatMul(x, d) }", w=w.astype(np.int8), s=np.float32(0.5)
    )
    for model in (plain, stored):
        model.graph[-1].name = "product"
    kernel = Kernel("product", "MatMul", 0.001, ((4, 8),), ((4, 16),), 4 * (4 * 8 + 4 * 16))
    found = roofline.roofline(plain, stored, ([kernel], [kernel]), Cache(None))
    work = 2 * 4 * 8 * 16
    assert [(dot.model, dot.node, dot.rate, dot.ms) for dot in found.dots] == [
        ("float", "product", work / 0.001, 1.0), ("result", "product", work / 0.001, 1.0),
    ]  # fmt: skip
    assert [work / dot.intensity for dot in found.dots] == pytest.approx([384 + 512, 384 + 128 + 4])


def test_what_stayed_in_float_from_the_start_counts_in_everything_that_was_tried():
    result, report = tiny()
    states = ("quantized", "kept", "kept", "backed off", "float")
    nodes = tuple(replace(report.nodes[0], name=str(i), state=state) for i, state in enumerate(states))
    found = {point.label: point.kept for point in points(result, nodes, 0) if point.measured}
    assert found == {"float": 4, "2 in float": 2, "result": 3}


def test_points_of_a_target_that_did_not_run_here_have_no_times():
    result, report = tiny()
    foreign = result.model_copy(update={"latency": result.latency.model_copy(update={"foreign": True})})
    assert {(point.ms, point.speedup) for point in points(foreign, report.nodes, 0)} == {(None, None)}


def test_a_gain_does_not_beat_float():
    result, report = tiny()
    gain = result.quality.task.model_copy(update={"result": 82.1, "drop": -0.07})
    larger = result.model_copy(
        update={"quality": result.quality.model_copy(update={"task": gain}), "tried": (), "latency": None}
    )
    larger = larger.model_copy(update={"bytes_before": larger.bytes_after})
    assert [(p.label, p.pareto) for p in points(larger, report.nodes, 0) if p.measured] == [
        ("float", True), ("result", True),
    ]  # fmt: skip


def test_a_loss_is_in_points_where_more_is_better_and_in_the_metric_where_less_is():
    result, report = tiny()
    rise = TaskScore(name="perplexity", better="lower", reference=6.0, result=7.0, drop=1.0)
    quality = result.quality.model_copy(update={"task": rise})
    assert loss_of(result.quality) == (0.32, "points")
    assert loss_of(quality) == (1.0, "perplexity")
    assert loss_of(quality.model_copy(update={"task": None})) == (pytest.approx(1 - 0.98512), "1 - cosine")
    found = points(result.model_copy(update={"quality": quality, "tried": ()}), report.nodes, 0)
    assert {point.unit for point in found} == {"perplexity"}


def test_estimates_of_a_result_in_half_precision_have_its_sizes():
    result, report = tiny()
    row = replace(report.nodes[0], error=0.1)
    rest = replace(row, name="rest", state="float", bytes_before=4000, bytes_after=2000, error=None)
    last = points(result, (row, rest), 0)[-1]
    assert (last.measured, last.bytes - result.bytes_after) == (False, 589_824 // 2 - 148_992)


def test_estimates_fall_with_the_errors_that_are_left_and_have_the_sizes_of_their_weights():
    result, report = tiny()
    row = report.nodes[0]
    nodes = tuple(replace(row, name=str(i), error=0.1 * (i + 1)) for i in range(4))
    guessed = [point for point in points(result, nodes, 0) if not point.measured]
    assert [point.kept for point in guessed] == [1, 2, 4]
    assert [point.loss for point in guessed] == pytest.approx([0.32 * 0.6, 0.32 * 0.3, 0])
    assert [point.bytes - result.bytes_after for point in guessed] == [n * (589_824 - 148_992) for n in (1, 2, 4)]


def test_the_worst_samples_are_read_again_and_no_further_than_needed():
    def data():
        for i in range(10):
            assert i <= 7, "read on behind the last sample that is wanted"
            yield {"x": np.full(3, i, np.float32)}

    worst = [SampleQuality(index=7, cosine=0.5), SampleQuality(index=2, cosine=0.6)]
    found = worst_samples(worst, data(), None)
    assert [(sample.index, sample.cosine, sample.shapes) for sample in found] == [(7, 0.5, "x [3]"), (2, 0.6, "x [3]")]


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7), (5, 7, 3), (3, 200, 100)])
def test_pictures_are_the_pixels_between_their_extremes(shape):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    read = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture(array)))))
    pixels = np.moveaxis(array, 0, 2) if shape[0] in (1, 3) else array
    pixels = pixels[::4, ::4] if max(shape) == 200 else pixels
    wanted = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    assert np.abs(read.reshape(wanted.shape) - wanted).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    "array", [np.zeros((4, 5, 7), np.float32), np.zeros(8, np.float32), np.zeros((3, 4, 4), np.int64)]
)
def test_what_is_no_picture_is_none(array):
    assert picture(array) == ""
