import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.calibration.spec import sample_digest
from qexport.calibration.tasks import Top1
from qexport.errors import GateFailed
from qexport.exporter.latency import measure
from qexport.exporter.quality import Judge, compare, layer_quality, main_output
from qexport.passes.target import find_target

RNG = np.random.default_rng(0)
TARGET = find_target("ort-cpu")


class Samples(list):
    """Samples in memory."""

    name = "memory"
    digest = "sha256:0"
    warnings = ()

    @property
    def digests(self):
        return tuple(sample_digest(sample) for sample in self)


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
    layers = layer_quality(plain, result, ["first", "second"], pictures())
    assert [layer.node for layer in layers] == ["first", "second"]
    assert [layer.sqnr for layer in layers] == pytest.approx([40, 40], abs=0.01)  # 1 % of everything


def test_the_output_to_judge_by_is_the_first_one_that_is_a_vector():
    text = """g (float[n, s, 4] x) => (float[n, s, 4] y, float[n, 4] z) {
        y = Relu(x)  z = ReduceMean <keepdims = 0> (x, axes) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
    assert main_output(ir.from_proto(proto)) == "z"


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
