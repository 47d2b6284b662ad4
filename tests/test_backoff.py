"""Int8 that is worse than float goes back to float, region by region, and says why."""

from __future__ import annotations

import json
import math
import time
import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qexport
from qexport.errors import GateFailed, ResourceExhausted
from qexport.exporter.options import BuildOptions
from qexport.exporter.outcome.result import Latency, Quality
from qexport.exporter.outcome.summary import summary_lines
from qexport.exporter.precision import backoff
from qexport.exporter.precision.activations import find_groups
from qexport.exporter.precision.backoff import TOO_BAD, TOO_SLOW, settle
from qexport.exporter.precision.costs import Cost, attribute, profile_both, region_costs
from qexport.exporter.precision.regions import Region, find_regions, find_units, label
from qexport.exporter.precision.residual import find_residuals, levels
from qexport.exporter.product import Product, Snapshot
from qexport.exporter.recipe import GatesSpec
from qexport.passes.base import Decision
from qexport.passes.pipeline import Step
from qexport.passes.quantize import KEPT
from qexport.runtime import profile as profiling
from qexport.runtime.profile import Kernel
from qexport.runtime.session import SessionOptions


def graph_of(text, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def chain(count):
    """``count`` products behind each other with a Gelu between them: every one is a region."""
    body = "".join(f"a{i} = MatMul(g{i}, w{i})  g{i + 1} = Gelu(a{i}) " for i in range(count))
    text = f"g (float[n, 4] g0) => (float[n, 4] g{count}) {{ {body} }}"
    return graph_of(text, **{f"w{i}": np.eye(4) for i in range(count)})


class Planted:
    """A bench where every node has a loss and a gain in milliseconds, known beforehand."""

    def __init__(self, model, losses=None, gains=None, *, foreign=False, rest=0.0):
        self.model = model
        self.losses, self.gains = losses or {}, gains or {}
        self.names = [node.name for node in model.graph if node.op_type == "MatMul"]
        self.foreign, self.rest, self.asked = foreign, rest, []
        self.timed = self.profiled = 0

    def product(self, keep=()):
        kept = [Decision(n, "MatMul", "skipped" if n in keep else "quantized", KEPT) for n in self.names]
        step = Step("quantize", True, 0.0, 1, tuple(kept))
        return Product(self.model, (step,), (None,), self.model, (), Snapshot(self.model, (), 0))

    def again(self, keep):
        self.asked.append(frozenset(keep))
        return self.product(keep)

    def judge(self, product):
        cosine = 1 - self.rest - sum(self.losses.get(name, 0) for name in product.quantized)
        return Quality(
            data="d", held_out=True, samples=1, output="y", cosine_mean=cosine, cosine_worst=cosine, worst_sample=0,
            sqnr=1, max_error=0,
        )  # fmt: skip

    def time(self, product):
        self.timed += 1
        found = 10 - sum(self.gains.get(name, 0) for name in product.quantized)
        ratio = 10 / found
        return Latency(
            runtime="x", threads=1, shapes={}, pairs=9, reference_ms=10, result_ms=found, speedup=ratio,
            speedup_low=0.99 * ratio, speedup_high=1.01 * ratio, foreign=self.foreign,
        )  # fmt: skip

    def errors(self, regions):
        return [sum(self.losses.get(name, 0) for name in region.nodes) for region in regions]

    def costs(self, product, regions):
        self.profiled += 1
        assert all(set(region.nodes) <= set(product.quantized) for region in regions)
        return [Cost(1.0, 1.0 - sum(self.gains.get(name, 0) for name in region.nodes)) for region in regions]


def settled(bench, never_worse=True, **gates):
    return settle(bench.product(), bench, GatesSpec(**gates), never_worse=never_worse)


def test_a_result_that_is_good_and_fast_is_left_alone():
    bench = Planted(chain(4), gains={f"a{i}": 0.5 for i in range(4)})
    trial = settled(bench, min_cosine=0.9)
    assert trial.backed_off == ()
    assert (bench.asked, bench.timed, bench.profiled) == ([], 1, 1)


@pytest.mark.parametrize("bad", [{2}, {0, 5}, {1, 3, 7}, set(range(8))])
def test_as_few_regions_go_as_the_gate_needs(bad):
    losses = {f"a{i}": 0.2 if i in bad else 0.001 for i in range(8)}
    bench = Planted(chain(8), losses, foreign=True)
    trial = settled(bench, min_cosine=0.95)
    assert trial.kept == {f"a{i}" for i in bad}
    assert all(entry.reason == TOO_BAD and "min_cosine" in entry.detail for entry in trial.backed_off)
    assert len(bench.asked) <= math.ceil(math.log2(8)) + 1
    reasons = {d.node: d.reason for d in trial.product.steps[0].decisions if d.action == "skipped"}
    assert reasons == dict.fromkeys(trial.kept, TOO_BAD)


def test_where_float_does_not_help_either_the_gate_fails_and_tells_what_was_tried():
    bench = Planted(chain(3), {"a1": 0.2}, rest=0.1)
    with pytest.raises(GateFailed, match=r"measured 0\.7, allowed 0\.95; int8 was taken back.*3 in all.*measured 0\.9"):
        settled(bench, min_cosine=0.95)
    assert bench.timed == 0


def test_without_never_worse_a_gate_fails_at_once_and_slow_int8_stays():
    bench = Planted(chain(3), {"a1": 0.2}, {"a0": -5})
    with pytest.raises(GateFailed, match=r"measured 0\.8, allowed 0\.95 "):
        settled(bench, never_worse=False, min_cosine=0.95)
    assert settled(bench, never_worse=False).latency.speedup < 1
    assert (bench.asked, bench.profiled) == ([], 0)


def test_only_the_slow_region_goes_with_its_numbers():
    bench = Planted(chain(4), gains={"a0": 0.5, "a1": -3.0, "a2": 0.5, "a3": 0.5})
    trial = settled(bench)
    assert trial.kept == {"a1"}
    assert trial.latency.speedup > 1
    (entry,) = trial.backed_off
    assert entry.reason == TOO_SLOW
    assert entry.detail == "int8 measured 4.00x slower than float: 4 ms against 1 ms"
    assert (entry.float_ms, entry.quantized_ms) == (1.0, 4.0)


def test_a_slow_region_goes_although_the_whole_is_faster_but_not_for_a_trifle():
    slow = Planted(chain(3), gains={"a0": 4, "a1": -1, "a2": 2})
    assert settled(slow).kept == {"a1"}
    trifle = Planted(chain(3), gains={"a0": 4, "a1": -0.05, "a2": 2})
    assert settled(trifle).kept == frozenset()
    assert trifle.asked == []


def test_everything_goes_where_nothing_wins():
    bench = Planted(chain(3), gains=dict.fromkeys(["a0", "a1", "a2"], -1.0))
    trial = settled(bench)
    assert trial.kept == {"a0", "a1", "a2"}
    assert trial.latency.speedup == 1


def test_the_profile_may_be_wrong_and_the_measurement_decides(monkeypatch):
    bench = Planted(chain(3), gains={"a0": -2.0, "a1": -2.0, "a2": 1.0})
    lies = lambda product, regions: [Cost(1.0, 0.5) for _ in regions]  # noqa: E731 short
    monkeypatch.setattr(bench, "costs", lies)
    trial = settled(bench)
    assert trial.latency.speedup >= 1
    assert {"a0", "a1"} <= trial.kept


def test_where_even_float_is_slower_nothing_is_given_up_and_it_is_told(monkeypatch):
    bench = Planted(chain(2), gains={"a0": 0.1, "a1": 0.1})
    monkeypatch.setattr(bench, "time", lambda product: Planted.time(bench, product).model_copy(
        update={"speedup": 0.5 + 0.1 * len(product.quantized), "speedup_high": 0.8}
    ))  # fmt: skip
    trial = settled(bench)
    assert trial.kept == frozenset()
    assert trial.remarks == (backoff.IN_VAIN,)


def test_another_runtimes_time_is_no_reason():
    bench = Planted(chain(3), gains={"a1": -5.0}, foreign=True)
    assert settled(bench).backed_off == ()
    assert bench.profiled == 0


def test_products_of_one_tensor_are_a_region_and_a_residual_addition_ends_one():
    text = """g (float[n, 4] x) => (float[n, 4] z) {
        e = Gelu(x)  q = MatMul(e, a)  k = MatMul(e, b)  s = Mul(q, k)  o = MatMul(s, c)  r = Add(e, o)
        f = MatMul(r, d)  t = Relu(f)  u = MatMul(t, a)  z = Add(r, u) }"""
    model = graph_of(text, **dict.fromkeys("abcd", np.eye(4)))
    regions = find_regions(model.graph, {"q", "k", "o", "f", "u"})
    assert [region.nodes for region in regions] == [("q", "k"), ("o",), ("f", "u")]
    assert {node.name: level for node, level in levels(model.graph).items()} == {
        **dict.fromkeys(["e", "q", "k", "s", "o", "r"], 0), **dict.fromkeys(["f", "t", "u", "z"], 1),
    }  # fmt: skip
    found = find_residuals(model.graph)
    assert [(r.node.name, r.skip.name, r.branch.name) for r in found] == [("r", "e", "o"), ("z", "r", "u")]
    assert {node.name for node in found[1].layers} == {"f", "t", "u"}


def test_integers_flow_into_a_residual_addition_and_no_farther():
    text = """g (float[n, 4, 5, 5] x) => (float[n, 4, 5, 5] b) {
        c = Conv(x, w)  a = Add(c, x)  r = Relu(a)  d = Conv(r, w)  e = Relu(d)  f = Conv(e, w)  b = Add(f, r) }"""
    model = graph_of(text, w=np.ones((4, 4, 1, 1)))
    regions = find_regions(model.graph, {"c", "a", "d", "f", "b"})
    assert [region.nodes for region in regions] == [("c", "a"), ("d", "f", "b")]
    assert [region.name for region in regions] == ["c and 1 more", "d and 2 more"]


def test_a_mask_is_no_residual_although_later_scores_come_from_it():
    text = """g (float[n, 4] x, bool[n, 4] m) => (float[n, 4] z) {
        f = Cast <to = 1> (m)  s1 = Add(x, f)  p1 = Softmax(s1)  o = MatMul(p1, w)  d = Mul(o, c)  s2 = Add(d, f)
        p2 = Softmax(s2)  z = Identity(p2) }"""
    assert find_residuals(graph_of(text, w=np.eye(4), c=[0.5]).graph) == ()


def test_residuals_are_those_of_the_sets_of_ancestors():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(60):
        made, body, behind = ["x", "m"], "", {"x": {"x"}, "m": {"m"}}
        for number in range(int(rng.integers(3, 30))):
            op, name = rng.choice(["Add", "Add", "Mul", "Relu"]), f"v{number}"
            read = [str(rng.choice(made[-6:])) for _ in range(1 if op == "Relu" else 2)]
            body += f"{name} = {op}({', '.join(read)}) "
            behind[name] = {name}.union(*(behind[value] for value in read))
            made.append(name)
        graph = graph_of(f"g (float[4] x, float[4] m) => (float[4] {made[-1]}) {{ {body} }}").graph
        expected = []
        for node in graph:
            if node.op_type == "Add":
                skip, branch = sorted((value.name for value in node.inputs), key=lambda name: len(behind[name]))
                if behind[skip] & behind[branch]:
                    expected.append((node.name, skip, branch, behind[branch] - behind[skip] - {"x", "m"}))
        residuals = find_residuals(graph)
        told = [(r.node.name, r.skip.name, r.branch.name, {node.name for node in r.layers}) for r in residuals]
        assert told == expected
        deep = {"x": 0, "m": 0}
        for node in graph:
            level = max(deep[value.name] for value in node.inputs)
            assert levels(graph)[node] == level
            deep[node.name] = level + (node.name in {one[0] for one in expected})
        found += len(expected)
    assert found > 100


def doubled(count, end):
    """``v + v`` again and again: as many ways through it as 2 to the power of ``count``."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    nodes = [ir.node("MatMul", [x, x])]
    for _ in range(count):
        (value,) = nodes[-1].outputs
        nodes.append(ir.node("Mul", [value, value]))
        nodes.append(ir.node("Add", [value, *nodes[-1].outputs]))
    nodes.append(ir.node(end, nodes[-1].outputs))
    for number, node in enumerate(nodes):
        node.name, node.outputs[0].name, node.outputs[0].type = f"n{number}", f"v{number}", x.type
    return ir.Graph([x], nodes[-1].outputs, nodes=nodes, opset_imports={"": 21})


@pytest.mark.parametrize("end", ["Softmax", "Relu"])
@pytest.mark.parametrize("count", [60, 10_000])
def test_graphs_with_more_ways_than_atoms_and_of_any_depth_are_divided_at_once(count, end):
    graph = doubled(count, end)
    names = [node.name for node in graph]
    start = time.process_time()
    regions, units, groups = find_regions(graph, names), find_units(graph, names), find_groups(graph)
    assert time.process_time() - start < 5
    assert max(levels(graph).values()) == (0 if end == "Softmax" else count)
    assert sum(len(region.nodes) for region in regions) == sum(map(len, units)) == len(names)
    assert list(groups) == (["softmax input", "softmax output"] if end == "Softmax" else [])


def test_sets_of_ancestors_are_not_kept():
    graph = doubled(5000, "Relu")
    tracemalloc.start()
    levels(graph)
    assert len(find_residuals(graph)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9e6  # a set of 10000 bits for each of 10000 values takes 12e6


def test_what_has_no_weight_goes_with_what_it_reads():
    text = """g (float[n, 4] x) => (float[n, 4] z) {
        a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, w)  s = Add(x, c)  z = MatMul(s, w) }"""
    model = graph_of(text, w=np.eye(4))
    assert find_units(model.graph, {"a", "c", "s", "z"}) == (("a",), ("c", "s"), ("z",))


def test_the_time_of_merged_and_new_operators_is_found():
    model = graph_of(
        "g (float[n, 4] x) => (float[n, 4] z) { a = MatMul(x, w)  r = Relu(a)  b = MatMul(r, w)  z = Gelu(b) }",
        w=np.eye(4),
    )
    labels = label(model.graph, [Region(("a",), ("MatMul",)), Region(("b",), ("MatMul",))])
    assert labels == {"a": 0, "r": 0, "b": 1, "z": 1}
    names = ["ReorderInput", "r_nchwc", "Transpose_token_3", "b", "BiasGelu", "abacus"]
    kernels = [Kernel(name, "?", 1e-3 * 2**i) for i, name in enumerate(names)]
    assert attribute(kernels, labels, 2) == [2 + 4, 8 + 16 + 32]


def test_a_quantizer_costs_what_reads_it_and_an_integer_kernel_goes_by_the_output_it_swallowed():
    text = """g (float[n, 4] x) => (float[n, 4] b) { a = MatMul(x, w)
        q = QuantizeLinear(a, s, zero)  d = DequantizeLinear(q, s, zero)  b = MatMul(d, w) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for node in proto.graph.node:
        node.name = f"n{node.output[0]}"
    labels = label(ir.from_proto(proto).graph, [Region(("na",), ("",)), Region(("nb",), ("",))])
    assert (labels["nq"], labels["q"]) == (1, 0)


def test_the_profile_of_real_models_tells_the_slow_region_from_the_fast_one():
    rng = np.random.default_rng(0)
    text = "g (float[n, 256] x) => (float[n, 256] z) {{ a = {0}(x, w)  g = Tanh(a)  z = {1}(g, {2}) }}"
    light, heavy = (
        graph_of(text.format("MatMul", op, c), w=rng.standard_normal((256, 256)), c=np.ones(256))
        for op, c in (("Mul", "c"), ("MatMul", "w"))
    )
    regions = [Region(("a",), ("MatMul",)), Region(("z",), ("MatMul",))]
    feeds = {"x": rng.standard_normal((64, 256)).astype(np.float32)}
    costs = region_costs(light, heavy, regions, profile_both(light, heavy, feeds, SessionOptions(threads=1)))
    assert costs[1].ratio > 3 * costs[0].ratio > 0


def test_a_profile_that_cannot_be_written_is_a_lack_of_resources(monkeypatch):
    monkeypatch.setattr(profiling, "read_text", lambda path: '[{"cat" : "No')
    model = chain(1)
    with pytest.raises(ResourceExhausted, match="profile could not be written"):
        profile_both(model, model, {"g0": np.ones((1, 4), np.float32)}, SessionOptions(threads=1))


PLAIN = """[[step]]
pass = "calibrate"
[[step]]
pass = "quantize"
min_sqnr = 0
[export]
engine = false
"""
LOPSIDED = """g (float[n, 32] x) => (float[n, 32] y) {
    h = MatMul(x, w)  t = Tanh(h)  s = Mul(t, spread)  k = MatMul(s, v)  e = Tanh(k)  y = MatMul(e, w) }"""


@pytest.fixture
def lopsided(tmp_path):
    """The second of three products reads a channel a thousand times larger than the others."""
    rng = np.random.default_rng(0)
    w, v = rng.standard_normal((2, 32, 32)) / 6
    spread = np.ones(32)
    spread[0] = 3000
    model = graph_of(LOPSIDED, w=w, v=v / spread[:, None], spread=spread)
    onnx.save(ir.to_proto(model), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=rng.standard_normal((64, 32)).astype(np.float32))
    (tmp_path / "plain.toml").write_text(PLAIN)
    return tmp_path


def build(folder, target, *settings):
    options = BuildOptions(target=target, output=folder / "out", set=settings)
    return qexport.build(
        folder / "model.onnx", recipe=folder / "plain.toml", calib=folder / "calib.npz", options=options
    )


def test_a_build_backs_off_the_one_layer_that_breaks_its_gate(lopsided):
    result = build(lopsided, "tensorrt-rtx", "gates.min_cosine=0.999")
    (entry,) = result.backed_off
    assert entry.nodes == ("k",)
    assert "gate min_cosine" in entry.detail
    assert result.quantized == 2
    assert result.skipped[TOO_BAD] == 1
    assert result.quality.cosine_mean >= 0.999
    assert json.loads((lopsided / "out/result.json").read_bytes())["backed_off"][0]["nodes"] == ["k"]
    assert "## Backed off" in (lopsided / "out/report.md").read_text("utf-8")
    assert any(line.startswith("backed off 1 region of int8 to float, such as k:") for line in summary_lines(result))


def test_a_build_that_may_not_back_off_fails_its_gate(lopsided):
    with pytest.raises(GateFailed, match="min_cosine"):
        build(lopsided, "tensorrt-rtx", "gates.min_cosine=0.999", "export.never_worse=false")
    assert not (lopsided / "out").exists()


def test_a_build_takes_back_what_its_profile_finds_slow(lopsided, monkeypatch):
    from qexport.exporter.precision import bench

    def slow(reference, result, *_):
        quantized = sum(node.op_type == "QuantizeLinear" for node in result.graph)
        ratio = 1.0 - 0.2 * quantized
        return Latency(
            runtime="x", threads=1, shapes={}, pairs=9, reference_ms=1, result_ms=1 / ratio, speedup=ratio,
            speedup_low=ratio, speedup_high=ratio,
        )  # fmt: skip

    monkeypatch.setattr(bench, "measure", slow)
    result = build(lopsided, "ort-cpu")
    assert result.latency.speedup == 1
    assert result.quantized == 0
    assert sum(len(entry.nodes) for entry in result.backed_off) == result.skipped[TOO_SLOW] == 3
    assert any("nothing was quantized" in warning for warning in result.warnings)
