import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import Samples
from onnx.reference import ReferenceEvaluator

from qexport.calibration.extremes import Extremes, observe
from qexport.errors import DataInvalid
from qexport.exporter.recipe import instantiate, needs
from qexport.exporter.recipe_files import load_recipe, override
from qexport.passes.numbers.extreme import EXTREME_KEY, extreme_of
from qexport.passes.pipeline import run

RNG = np.random.default_rng(0)
TEXT = """g (float[n, s, 32] x, int64[n, s] m) => (float[n, s, 16] y) {
    h = MatMul(x, w)  r = Relu(h)  k = Neg(r)  f = Cast <to = 1> (m)  u = Unsqueeze(f, last)  p = Mul(k, u)
    y = MatMul(p, v) }"""


def model_from(text=TEXT, opset=20, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    given = weights or {"w": normal(32, 24), "v": normal(24, 16), "last": np.array([-1])}
    for name, array in given.items():
        if name in text:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def samples(count=20):
    lengths = RNG.integers(1, 12, count)
    return Samples({"x": normal(int(n), 32), "m": RNG.integers(0, 2, int(n))} for n in lengths)


def noted(model):
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    return {value.name: found for value in values if (found := extreme_of(value)) is not None}


def test_every_float_value_gets_the_largest_magnitude_of_the_reference():
    model, data = model_from(), samples()
    assert Extremes(data=data)(model).modified
    proto = ir.to_proto(model)
    names = [value.name for node in model.graph for value in node.outputs]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    reference = ReferenceEvaluator(proto)
    truth = dict.fromkeys(names, 0.0) | {"x": 0.0}
    for sample in data:
        feeds = {name: array[None] for name, array in sample.items()}
        found = dict(zip(names, reference.run(None, feeds), strict=True)) | {"x": feeds["x"]}
        truth = {name: max(peak, float(np.abs(found[name]).max())) for name, peak in truth.items()}
    assert noted(model) == pytest.approx(truth, rel=1e-5)
    assert "m" not in noted(model)


def test_the_model_computes_nothing_else_and_a_second_run_changes_nothing():
    model, data = model_from(), samples()
    before = ir.to_proto(model).SerializeToString()
    Extremes(data=data)(model)
    assert ir.to_proto(model).SerializeToString() == before
    assert not Extremes(data=data)(model).modified


def test_order_and_repetition_do_not_matter_and_only_the_first_samples_count():
    model, data = model_from(), samples()
    ahead, back, few = model.clone(), model.clone(), model.clone()
    Extremes(data=data)(ahead)
    Extremes(data=Samples([*reversed(data), *data]))(back)
    Extremes(data=data, samples=1)(few)
    assert noted(ahead) == noted(back)
    assert noted(few)["x"] == np.abs(data[0]["x"]).max()


def test_progress_is_told_once_per_sample():
    told = []
    Extremes(data=samples(7), advance=lambda: told.append(1))(model_from())
    assert len(told) == 7


def test_empty_values_are_left_out_and_zeros_are_not():
    text = "g (float[n, s] x) => (float[n, t] y, float[n, s] z) { y = Slice(x, zero, zero, one)  z = Mul(x, nil) }"
    model = model_from(text, zero=np.array([0]), one=np.array([1]), nil=np.float32(0))
    Extremes(data=Samples([{"x": normal(5)}, {"x": np.zeros(0, np.float32)}]))(model)
    assert noted(model).keys() == {"x", "z"}
    assert noted(model)["z"] == 0.0


@pytest.mark.parametrize("place", range(40))
def test_one_nan_anywhere_is_told_with_its_sample_and_value(place):
    text = "g (float[n, 40] x) => (float[n, 40] y) { r = Sqrt(x)  y = Neg(r) }"
    data = Samples({"x": np.abs(normal(40))} for _ in range(3))
    data[2]["x"][place] = -1
    with pytest.raises(DataInvalid, match="value 'r' holds NaN or infinity") as caught:
        Extremes(data=data)(model_from(text, none=0))
    assert caught.value.where == "sample 2"
    assert "extremes.enabled=false" in (caught.value.hint or "")


def test_infinity_is_told_unless_a_constant_put_it_there():
    with pytest.raises(DataInvalid, match="value 'y'"):
        Extremes(data=Samples([{"x": np.float32([1, 200])}]))(
            model_from("g (float[n, 2] x) => (float[n, 2] y) { y = Exp(x) }", none=0)
        )
    text = """g (float[n, 3] x) => (float[n, 3] y) {
        m = Less(x, zero)  b = Where(m, low, zero)  s = Add(x, b)  p = Softmax(s)  y = Mul(p, x) }"""
    model = model_from(text, zero=np.float32(0), low=np.float32(-np.inf))
    Extremes(data=Samples([{"x": np.float32([-1, 2, 3])}]))(model)
    assert {name: noted(model)[name] for name in "xsb"} == {"x": 3.0, "s": 3.0, "b": 0.0}
    bad = model_from(text.replace("Mul(p, x)", "Div(p, zero)"), zero=np.float32(0), low=np.float32(-np.inf))
    with pytest.raises(DataInvalid, match="value 'y'"):
        Extremes(data=Samples([{"x": np.float32([-1, 2, 3])}]))(bad)


def test_the_lowest_float32_is_no_infinity():
    low = np.finfo(np.float32).min
    model = model_from("g (float[n, 3] x) => (float[n, 3] y) { y = Min(x, low) }", low=low)
    Extremes(data=Samples([{"x": normal(3)}]))(model)
    assert noted(model)["y"] == -low


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_other_floats_are_looked_at_too(kind):
    text = f"g ({kind}[n, 3] x) => ({kind}[n, 3] y) {{ y = Mul(x, x) }}"
    dtype = np.float16 if kind == "float16" else np.float64
    model = model_from(text, none=0)
    Extremes(data=Samples([{"x": dtype([1, 2, -3])}]))(model)
    assert noted(model) == {"x": 3.0, "y": 9.0}


def test_values_in_bfloat16_are_looked_at_too():
    text = "g (float[n, 3] x) => (float[n, 3] y) { a = Cast <to = 16> (x)  b = Mul(a, a)  y = Cast <to = 1> (b) }"
    model = model_from(text, none=0)
    Extremes(data=Samples([{"x": np.float32([1, 2, -3.001])}]))(model)
    assert noted(model) == {"x": pytest.approx(3.001), "a": 3.0, "b": 9.0, "y": 9.0}


def test_memory_does_not_grow_with_the_samples():
    model = model_from("g (float[n, 50000] x) => (float[n, 50000] y) { a = Neg(x)  b = Exp(a)  y = Sqrt(b) }", none=0)

    def peak(count):
        tracemalloc.start()
        observe(model, ({"x": np.full(50000, 1 / (i + 1), np.float32)} for i in range(count)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(4)
    assert peak(64) < 1.5 * peak(8)


def test_without_data_nothing_is_noted_and_that_is_said():
    result = Extremes()(model_from())
    assert not result.modified
    assert [(d.action, d.reason) for d in result.decisions] == [("skipped", "no data: no extremes were observed")]


def test_a_target_that_computes_in_float32_is_not_looked_at():
    model = model_from()
    result = Extremes(data=samples(2), target="ort-cpu")(model)
    assert [d.reason for d in result.decisions] == ["target ort-cpu computes in float32"]
    assert noted(model) == {}


def test_a_recipe_may_do_without_data_and_gets_it_where_there_is_some():
    for name in ("float16", "bfloat16"):
        recipe = load_recipe(name)
        assert not needs(recipe, "data")
        assert dict(instantiate(recipe, {}))["extremes"] == Extremes()
        data = samples(1)
        assert dict(instantiate(override(recipe, ["extremes.samples=3"]), {"data": data}))["extremes"] == Extremes(
            data=data, samples=3
        )


def test_the_guard_reads_the_notes_of_a_pipeline():
    text = "g (float[n, 32] x) => (float[n, 32] y) { h = MatMul(x, w)  b = Mul(h, big)  y = Mul(b, little) }"
    model = model_from(text, w=np.eye(32, dtype=np.float32), big=np.float32(100), little=np.float32(0.01))
    data = Samples({"x": normal(32) * 1000} for _ in range(4))
    steps = [step for step in instantiate(load_recipe("float16"), {"data": data}) if step[0] in ("extremes", "half")]
    _, records = run(model, steps)
    told = [d.reason for d in records[-1].decisions]
    assert len(told) == 2
    assert all(reason.startswith("observed ") for reason in told)
    assert EXTREME_KEY not in model.graph[1].outputs[0].meta
