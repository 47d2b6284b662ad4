import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import Samples
from hypothesis import given
from hypothesis import strategies as st

from qexport.calibration.reading.tasks import Top1
from qexport.errors import DataInvalid, GateFailed
from qexport.exporter.proof.latency import measure
from qexport.exporter.proof.marks import without_marks
from qexport.exporter.proof.quality import Judge, compare, layer_quality
from qexport.passes.target import find_target

RNG = np.random.default_rng(0)
TARGET = find_target("ort-cpu")


def model_from(text, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def product(w):
    return model_from("g (float[n, 4] x) => (float[n, 4] y) { y = MatMul(x, w) }", w=w)


def pictures(count=70):
    return Samples({"x": RNG.standard_normal(4).astype(np.float32)} for _ in range(count))


def test_cosine_noise_and_error_are_those_of_numpy():
    w, v, data = np.eye(4), np.eye(4) + 0.05 * RNG.standard_normal((4, 4)), pictures()
    quality = compare(product(w), product(v), Judge(data, None, held_out=True), TARGET)
    x = np.stack([sample["x"] for sample in data]).astype(np.float64)
    a, b = x @ w, x @ v
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert quality.samples == 70
    assert quality.cosine_mean == pytest.approx(cosines.mean(), abs=1e-6)
    assert quality.cosine_worst == pytest.approx(cosines.min(), abs=1e-6)
    assert quality.worst_sample == cosines.argmin()
    assert quality.max_error == pytest.approx(np.abs(a - b).max(), rel=1e-5)
    assert quality.sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-3)


MASKED = """g (float[n, 4] x, bool[n, 4] mask) => (float[n, 4] y) { h = MatMul(x, w)  y = Where(mask, h, low) }"""


def test_what_a_mask_put_there_on_both_sides_does_not_count():
    w, v, low = np.eye(4), np.eye(4) + 0.5 * RNG.standard_normal((4, 4)), np.float32(-1e9)
    masks = RNG.random((40, 4)) < 0.7
    masks[:, 0] = True
    masks[7] = False  # of this one nothing is left to compare
    x = RNG.standard_normal((40, 4)).astype(np.float32)
    data = Samples({"x": row, "mask": mask} for row, mask in zip(x, masks, strict=True))
    judge = Judge(data, Top1(np.arange(40) % 4), held_out=True)
    found = compare(model_from(MASKED, w=w, low=low), model_from(MASKED, w=v, low=low), judge, TARGET)
    a, b = (np.where(masks, x.astype(np.float64) @ m, 0) for m in (w, v))
    products, norms = (a * b).sum(1), np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = np.where(norms > 0, products / np.maximum(norms, 1e-30), 1)
    assert found.cosine_mean == pytest.approx(cosines.mean(), abs=1e-6)
    assert found.cosine_worst == pytest.approx(cosines.min(), abs=1e-6) != pytest.approx(1, abs=1e-3)
    assert found.sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-3)
    labels = np.where(masks, x @ w, low).argmax(axis=1)
    assert found.task.reference == pytest.approx(100 * np.mean(labels == np.arange(40) % 4))


def test_a_mask_that_the_result_lost_counts_in_full():
    low, data = np.float32(-1e9), Samples({"x": np.ones(4, np.float32), "mask": np.arange(4) < 3} for _ in range(3))
    judge = Judge(data, None, held_out=True)
    found = compare(model_from(MASKED, w=np.eye(4), low=low), model_from(MASKED, w=np.eye(4), low=-low), judge, TARGET)
    assert found.sqnr == pytest.approx(10 * np.log10(0.25), abs=1e-3)
    assert found.cosine_worst == pytest.approx(-1)


@given(st.integers(0, 1000), st.floats(1e-4, 9e3))
def test_numbers_without_masks_are_the_very_same_arrays(seed, size):
    a, b = np.random.default_rng(seed).uniform(-size, size, (2, 3, 5))
    b[0] = a[0]
    one, other = without_marks(a, b)
    assert one is a
    assert other is b


def test_the_task_is_scored_before_and_after_with_the_share_of_equal_predictions():
    data = pictures(100)
    labels = np.array([sample["x"].argmax() for sample in data])
    swapped = np.eye(4)[[1, 0, 2, 3]]
    quality = compare(product(np.eye(4)), product(swapped), Judge(data, Top1(labels), held_out=True), TARGET)
    kept = float(np.mean(labels >= 2))
    assert quality.task.reference == 100
    assert quality.task.result == pytest.approx(100 * kept)
    assert quality.task.drop == pytest.approx(100 - 100 * kept)
    assert quality.task.unchanged == pytest.approx(kept)


def test_padding_does_not_count_in_outputs_with_a_sequence_axis():
    text = """g (int64[n, s] ids, int64[n, s] attention_mask) => (float[n, s, 4] y) {
        t = Gather(table, ids)  y = Add(t, c) }"""
    table = RNG.standard_normal((8, 4))
    table[0] = 0  # what padding reads
    reference = model_from(text, table=table, c=np.zeros(4))
    spoiled = table.copy()
    spoiled[0] = 1000
    result = model_from(text, table=spoiled, c=np.zeros(4))
    data = Samples({"ids": np.full(n, 1 + n % 7), "attention_mask": np.ones(n, np.int64)} for n in (2, 5, 3, 9, 4))
    quality = compare(reference, result, Judge(data, None, held_out=True), TARGET)
    assert quality.cosine_worst == pytest.approx(1)
    assert quality.max_error == 0


def test_a_result_that_is_not_finite_fails_the_gate():
    text = "g (float[n, 4] x) => (float[n, 4] y) { h = Mul(x, w)  y = Log(h) }"
    sound = model_from("g (float[n, 4] x) => (float[n, 4] y) { y = Mul(x, w) }", w=np.ones(4))
    with pytest.raises(GateFailed, match="NaN or infinity"):
        compare(sound, model_from(text, w=np.ones(4)), Judge(pictures(), None, held_out=True), TARGET)


def test_layers_are_compared_under_their_names_with_all_earlier_noise():
    text = "g (float[n, 4] x) => (float[n, 4] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    w, v = RNG.standard_normal((2, 4, 4))
    plain, result = model_from(text, w=w, v=v), model_from(text, w=w * 1.01, v=v)
    for model in (plain, result):
        model.graph[0].name, model.graph[2].name = "first", "second"
    layers = layer_quality(plain, result, ["first", "second"], pictures(), TARGET)
    assert [layer.node for layer in layers] == ["first", "second"]
    assert [layer.sqnr for layer in layers] == pytest.approx([40, 40], abs=0.01)  # 1 % of everything


def test_layers_that_have_lost_units_are_not_compared():
    text = "g (float[n, 4] x) => (float[n, 4] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    w, v = RNG.standard_normal((2, 4, 4))
    v[3] = 0
    plain, result = model_from(text, w=w, v=v), model_from(text, w=w[:, :3], v=v[:3] * 1.01)
    for model in (plain, result):
        model.graph[0].name, model.graph[1].name = "first", "second"
    (layer,) = layer_quality(plain, result, ["first", "second"], pictures(), TARGET)
    assert (layer.node, layer.sqnr) == ("second", pytest.approx(40, abs=0.01))


def test_layers_of_a_file_for_an_engine_are_compared_with_their_quantizers_taken_literally():
    text = """g (float[n, 64] x) => (float[n, 64] y) {
        q = QuantizeLinear(x, s, z)  a = DequantizeLinear(q, s, z)
        b = Add(a, a)
        r = QuantizeLinear(b, t, z)  c = DequantizeLinear(r, t, z)
        y = Mul(c, w) }"""
    plain = model_from("g (float[n, 64] x) => (float[n, 64] y) { b = Add(x, x)  y = Mul(b, w) }", w=np.ones(64))
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    constants = {"s": np.float32(0.02), "t": np.float32(0.08), "z": np.uint8(0), "w": np.ones(64, np.float32)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(a), name) for name, a in constants.items())
    result = ir.from_proto(proto)
    plain.graph[1].name = "last"
    data = Samples({"x": RNG.uniform(0, 0.4, 64).astype(np.float32)} for _ in range(16))
    x = np.stack([sample["x"] for sample in data])
    a = np.clip(np.rint(x / np.float32(0.02)), 0, 255).astype(np.float32) * np.float32(0.02)
    y = np.clip(np.rint((a + a) / np.float32(0.08)), 0, 255).astype(np.float32) * np.float32(0.08)
    literal = 10 * np.log10(np.square(2.0 * x).sum() / np.square(2.0 * x - y).sum())
    found = [layer_quality(plain, result, ["last"], data, find_target(t))[0].sqnr for t in ("tensorrt", "ort-cpu")]
    assert found[0] == pytest.approx(literal, abs=1e-4)
    assert abs(found[1] - literal) > 1e-3  # the integer Add of onnxruntime breaks ties another way


def judged(text, data, spoil=1.01, task=None, **weights):
    """Quality of a model whose weight ``w`` is off by ``spoil``."""
    spoiled = weights | {"w": weights["w"] * np.asarray(spoil)}
    judge = Judge(data, task, held_out=True)
    return compare(model_from(text, **weights), model_from(text, **spoiled), judge, TARGET)


def test_the_output_to_judge_by_is_the_first_one_that_is_a_vector():
    text = """g (float[n, s, 4] x) => (float[n, s, 4] y, float[n, 4] z) {
        y = Mul(x, w)  a = Constant <value_ints = [1]> ()  z = ReduceMean <keepdims = 0> (y, a) }"""
    data = Samples({"x": RNG.standard_normal((3, 4)).astype(np.float32)} for _ in range(3))
    quality = judged(text, data, w=np.ones(4))
    assert quality.output == "z"
    assert list(quality.outputs) == ["y", "z"]


@pytest.mark.parametrize("static", [1, 4, 32, 100])
def test_a_model_of_a_fixed_batch_size_is_judged_as_one_that_takes_any(static):
    w, v, data = np.eye(4), np.eye(4) + 0.05 * RNG.standard_normal((4, 4)), pictures(70)
    judge = Judge(data, Top1(np.arange(70) % 4), held_out=True)
    text = f"g (float[{static}, 4] x) => (float[{static}, 4] y) {{ y = MatMul(x, w) }}"
    free = compare(product(w), product(v), judge, TARGET)
    fixed = compare(model_from(text, w=w), model_from(text, w=v), judge, TARGET)
    assert fixed.samples == 70
    for name in ("cosine_mean", "cosine_worst", "sqnr", "max_error"):
        assert getattr(fixed, name) == pytest.approx(getattr(free, name), rel=1e-6)
    assert fixed.worst_sample == free.worst_sample
    assert fixed.task == free.task
    assert judge.typical_batch(static)["x"].shape == (static, 4)


def test_layers_of_a_model_of_a_fixed_batch_size_are_compared():
    text = "g (float[4, 4] x) => (float[4, 4] y) { y = MatMul(x, w) }"
    plain, result = model_from(text, w=np.eye(4)), model_from(text, w=np.eye(4) * 1.01)
    for model in (plain, result):
        model.graph[0].name = "only"
    assert layer_quality(plain, result, ["only"], pictures(3), TARGET)[0].sqnr == pytest.approx(40, abs=0.01)


@pytest.mark.parametrize("rows", ["n", "3"])
@pytest.mark.parametrize(
    ("shape", "operator"),
    [
        ("", "y = ReduceSum <keepdims = 0> (h)"),
        ("[4, {rows}]", "y = Transpose <perm = [1, 0]> (h)"),
        ("[1, 4]", "a = Constant <value_ints = [0]> ()  y = ReduceMean <keepdims = 1> (h, a)"),
        ("[4]", "a = Constant <value_ints = [0]> ()  y = ReduceMean <keepdims = 0> (h, a)"),
    ],
)
def test_an_output_without_a_batch_axis_is_judged_sample_by_sample(shape, operator, rows):
    shape = shape.format(rows=rows)
    text = f"g (float[{rows}, 4] x) => (float{shape} y) {{ h = Mul(x, w)  {operator} }}"
    quality = judged(text, pictures(5), w=np.ones(4))
    assert quality.samples == 5
    assert quality.sqnr == pytest.approx(40, abs=0.01)
    assert quality.cosine_worst == pytest.approx(1)


def test_an_output_without_a_batch_axis_is_left_out_where_another_has_one():
    text = "g (float[n, 4] x) => (float[4, n] t, float[n, 4] y) { y = Mul(x, w)  t = Transpose(y) }"
    data = pictures(36)  # a batch of 32 and one of 4, which a transposed output could be taken for
    assert list(judged(text, data, w=np.ones(4)).outputs) == ["y"]


def test_every_output_of_numbers_is_compared_and_the_worst_one_is_told():
    text = """g (float[n, 4] x) => (float[n, 4] y, int64[n] best, float[n, 4] z) {
        y = Mul(x, c)  best = ArgMax <axis = 1, keepdims = 0> (y)  z = Mul(y, w) }"""
    quality = judged(text, pictures(), spoil=[1, 1, 1, -1], c=np.ones(4), w=np.ones(4))
    assert list(quality.outputs) == ["y", "z"]
    assert quality.outputs["y"].cosine_worst == pytest.approx(1)
    assert quality.worst_output == "z"
    assert quality.least == quality.outputs["z"].cosine_worst < 0.5
    assert quality.least_mean == quality.outputs["z"].cosine_mean < 0.99


def test_a_main_output_that_the_result_leaves_alone_does_not_hide_what_it_changed():
    text = "g (float[n, 4] x) => (float[n, 4] same, float[n, 4] y) { same = Identity(x)  y = Mul(x, w) }"
    data = pictures(50)
    labels = np.array([sample["x"].argmax() for sample in data])
    for task in (None, Top1(labels)):
        quality = judged(text, data, spoil=[1, 1, -1, -1], task=task, w=np.ones(4))
        assert quality.output == "y"
        assert quality.cosine_worst < 0
    assert quality.task.reference == 100
    assert quality.task.result < 90


def test_another_output_that_is_not_finite_is_compared_where_it_is():
    text = "g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) { y = Mul(x, w)  z = Log(y) }"
    quality = judged(text, pictures(), w=np.ones(4))
    assert quality.output == "y"
    assert quality.outputs["z"].max_error == pytest.approx(np.log(1.01), rel=1e-3)
    with pytest.raises(GateFailed, match="output 'z' of the result"):
        judged(text, pictures(), spoil=-1, w=np.ones(4))


def test_labels_for_outputs_of_different_sizes_are_refused():
    text = """g (float[n, s] x) => (float[n, s, 1] y) {
        a = Constant <value_ints = [2]> ()  h = Unsqueeze(x, a)  y = Mul(h, w) }"""
    data = Samples({"x": np.ones(n, np.float32)} for n in (3, 5))
    with pytest.raises(DataInvalid, match="from 3 to 5 numbers"):
        judged(text, data, task=Top1(np.zeros(2, np.int64)), w=np.ones(1))


def test_a_model_with_much_more_work_is_measured_slower():
    small = product(np.eye(4))
    text = "g (float[n, 4] x) => (float[n, 4] y) { h = MatMul(x, u)  k = MatMul(h, t)  y = MatMul(k, v) }"
    large = model_from(text, u=np.ones((4, 1500)), t=np.ones((1500, 1500)), v=np.ones((1500, 4)))
    feeds = {"x": RNG.standard_normal((64, 4)).astype(np.float32)}
    latency = measure(small, large, feeds, TARGET)
    assert latency.speedup < 0.5
    assert latency.note == "slower than float on this machine"
    assert measure(large, small, feeds, TARGET).speedup > 2
    assert "laid out for tensorrt" in measure(small, small, feeds, find_target("tensorrt")).note
