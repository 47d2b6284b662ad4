"""Models in segments: the same numbers as in one session, caches carried, weights in memory no longer than needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cached_models import Tiny, portable
from helpers import feeds_of, model_from, session

from qexport.errors import BuildFailed
from qexport.exporter.onnx_file import load_onnx, release_pages, save_onnx
from qexport.exporter.proof import streamed
from qexport.exporter.proof.decoding import decode, plan
from qexport.exporter.proof.streamed import run_streamed
from qexport.safe_io import publish

ONE = 1 << 40
RNG = np.random.default_rng(0)
CHAIN = """g (float[n, 8] x) => (float[n, 8] y, float[n, 8] z) {
    a = MatMul(x, w1)
    b = Relu(a)
    c = MatMul(b, w2)
    d = Add(c, x)
    e = MatMul(d, w3)
    y = Add(e, b)
    z = Identity(d) }"""


def chain(**more):
    weights = {f"w{n}": RNG.standard_normal((8, 8)).astype(np.float32) for n in (1, 2, 3)}
    return model_from(CHAIN, **weights | more)


def texts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 50, length) for length in (40, 31, 17)]


def segments_of(monkeypatch):
    """Collect what is run."""
    seen = []
    real = streamed._run

    def spy(model, segment, values, carried):
        seen.append(segment)
        real(model, segment, values, carried)

    monkeypatch.setattr(streamed, "_run", spy)
    return seen


def test_segments_give_the_same_bits_as_one_session(monkeypatch):
    model, seen = chain(), segments_of(monkeypatch)
    feeds = [feeds_of(model, seed) for seed in (1, 2)]
    whole = run_streamed(model, feeds, budget=ONE)
    assert len(seen) == 1
    parts = run_streamed(model, feeds, budget=8 * 8 * 4)
    assert len(seen) == 1 + 3
    truth = [dict(zip("yz", session(model).run(None, feed), strict=True)) for feed in feeds]
    for one, other, true in zip(whole, parts, truth, strict=True):
        assert set(one) == set(other) == {"y", "z"}
        for name in one:
            assert np.array_equal(one[name], other[name])
            np.testing.assert_allclose(one[name], true[name], rtol=1e-6)


def test_no_segment_holds_more_weights_than_the_budget_unless_a_node_does(monkeypatch):
    big = np.zeros((8, 64), np.float32)
    model = model_from(
        """g (float[n, 8] x) => (float[n, 64] y) {
            a = MatMul(x, w1)
            b = MatMul(a, w2)
            y = MatMul(b, big) }""",
        w1=np.eye(8, dtype=np.float32),
        w2=np.eye(8, dtype=np.float32),
        big=big,
    )
    seen = segments_of(monkeypatch)
    run_streamed(model, [feeds_of(model)], budget=600)
    assert [segment.bytes for segment in seen] == [512, 2048]


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_a_decoder_in_segments_carries_its_caches(monkeypatch, dtype):
    model, seen = portable(Tiny(), dtype), segments_of(monkeypatch)
    calls = plan(texts())
    whole = decode(model, calls, budget=ONE)
    assert len(seen) == 1
    parts = decode(model, calls, budget=4096)
    assert len(seen) > 5
    for one, other in zip(whole, parts, strict=True):
        assert one.dtype == np.float32
        assert np.array_equal(one, other)


def test_the_last_values_of_carried_outputs_are_not_returned_and_calls_begin_anew_when_told():
    model = model_from(
        """g (float[n] x, float[n] past) => (float[n] y, float[n] present) {
            present = Add(past, x)
            y = Mul(present, w) }""",
        w=np.array([2.0], np.float32),
    )
    start, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    calls = [{"x": one, "past": start}, {"x": one}, {"x": one}, {"x": one, "past": start + 10}]
    found = run_streamed(model, calls, {"past": "present"}, budget=1)
    assert [list(outputs) for outputs in found] == [["y"]] * 4
    assert [float(outputs["y"][0]) for outputs in found] == [2, 4, 6, 22]


def test_a_cache_that_is_read_away_from_where_it_is_written_stays_in_one_segment(monkeypatch):
    model = model_from(
        """g (float[n, 4] x, float[n, 4] past) => (float[n, 4] y, float[n, 4] present) {
            a = MatMul(past, w1)
            b = MatMul(a, w2)
            y = Add(b, x)
            present = Add(past, y) }""",
        w1=RNG.standard_normal((4, 4)).astype(np.float32),
        w2=RNG.standard_normal((4, 4)).astype(np.float32),
    )
    seen = segments_of(monkeypatch)
    zeros, ones = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    found = run_streamed(model, [{"x": ones, "past": zeros}, {"x": ones}], {"past": "present"}, budget=1)
    assert len(seen) == 1
    first, present = session(model).run(None, {"x": ones, "past": zeros})
    second, _ = session(model).run(None, {"x": ones, "past": present})
    np.testing.assert_allclose(found[0]["y"], first, rtol=1e-6)
    np.testing.assert_allclose(found[1]["y"], second, rtol=1e-6)


def test_control_flow_is_one_segment_with_everything_its_bodies_read(monkeypatch):
    model = model_from(
        """g (float[n] x, bool c) => (float[n] y) {
            a = Mul(x, w)
            b = If(c) <
                then_branch = t () => (float[n] p) { p = Mul(a, u) },
                else_branch = e () => (float[n] q) { q = Neg(a) }>
            y = Add(b, x) }""",
        w=np.array([3.0], np.float32),
        u=np.array([5.0], np.float32),
    )
    seen = segments_of(monkeypatch)
    x = np.ones(2, np.float32)
    found = run_streamed(model, [{"x": x, "c": np.array(True)}, {"x": x, "c": np.array(False)}], budget=1)
    assert len(seen) == 1
    assert [outputs["y"].tolist() for outputs in found] == [[16, 16], [-2, -2]]


def test_outputs_that_are_weights_or_inputs_come_back_too():
    model = model_from("g (float[n] x) => (float[n] y, float[1] w) { y = Mul(x, w) }", w=np.array([2.0], np.float32))
    model.graph.outputs.append(model.graph.inputs[0])
    (found,) = run_streamed(model, [{"x": np.ones(3, np.float32)}])
    assert found["y"].tolist() == [2, 2, 2]
    assert found["w"].tolist() == [2]
    assert found["x"].tolist() == [1, 1, 1]


def test_sixteen_bits_are_rounded_after_every_operator():
    text = "g (float16[n] x) => (float16[n] y) { a = Mul(x, w) y = Sub(a, v) }"
    model = model_from(text, w=np.array([1.001], np.float16), v=np.array([1.0], np.float16))
    x = np.linspace(1, 2, 50).astype(np.float16)
    (found,) = run_streamed(model, [{"x": x}])
    rounded = (x * np.float16(1.001)).astype(np.float16) - np.float16(1)
    assert found["y"].dtype == np.float32
    assert np.array_equal(found["y"], rounded.astype(np.float32))


def test_caches_of_sixteen_bits_may_be_given_as_they_are_or_as_float32():
    model = portable(Tiny(), ir.DataType.BFLOAT16)
    past = {value.name: value for value in model.graph.inputs if value.dtype == ir.DataType.BFLOAT16}
    assert len(past) == 4
    ids = texts()[0][None, :5]
    call = {"input_ids": ids, "position_ids": np.arange(5)[None], "write_indices": np.zeros(1, np.int64)}
    found = []
    for dtype in (ir.DataType.BFLOAT16.numpy(), np.dtype(np.float32)):
        caches = {name: np.ones((1, value.shape[1], 8, value.shape[3]), dtype) for name, value in past.items()}
        found += run_streamed(model, [call | caches])
    assert np.array_equal(found[0]["logits"], found[1]["logits"])


def test_a_model_that_onnxruntime_refuses_is_a_failed_build():
    model = model_from("g (float[n, 3] x) => (float[n, 3] y) { y = MatMul(x, w) }", w=np.eye(3, dtype=np.float32))
    with pytest.raises(BuildFailed, match="inputs of shape"):
        run_streamed(model, [{"x": np.ones((1, 4), np.float32)}])


def test_pages_of_mapped_weights_go_back_to_the_system_and_come_again(tmp_path):
    weight = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    model = model_from("g (float[n, 1024] x) => (float[n, 1024] y) { y = MatMul(x, w) }", w=weight)
    with publish(tmp_path / "out") as stage:
        save_onnx(model, stage, threshold=1)
    loaded = load_onnx(tmp_path / "out" / "model.onnx")
    mapped = loaded.graph.initializers["w"].const_value.numpy()
    assert np.array_equal(mapped, weight)
    before = resident(tmp_path / "out" / "model.onnx.data")
    release_pages(loaded)
    assert before >= 4096
    assert resident(tmp_path / "out" / "model.onnx.data") == 0
    assert np.array_equal(mapped, weight)


def resident(path):
    """Kilobytes of a mapped file that are in the memory of this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(" ")[0]:
            ours = line.rstrip().endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_inputs_without_axes_stay_so():
    model = model_from("g (float x, float[2] v) => (int64[n] s, float[2] y) { s = Shape(x) y = Mul(v, x) }")
    (found,) = run_streamed(model, [{"x": np.array(3, np.float32), "v": np.ones(2, np.float32)}])
    assert found["s"].shape == (0,)
    assert found["y"].tolist() == [3, 3]
