"""Centred channels: offsets go into biases, a Sub stays only where it may, and the model computes the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.calibration.observe import Observe
from qexport.calibration.running.execute import open_model
from qexport.errors import UsageError
from qexport.exporter.load import load_model
from qexport.exporter.proof.equality import distance
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import load_recipe, override
from qexport.passes.folding.activation import activation_of
from qexport.passes.pipeline import run
from qexport.passes.shift import Shift

RNG = np.random.default_rng(0)
HEAD = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, s, 32] x) => '
NORM = HEAD + "(float[n, s, 24] y) { h = LayerNormalization(x, g, c)  m = MatMul(h, w)  y = Add(m, b) }"
GELU = HEAD + "(float[n, s, 24] y) { h = Gelu(x)  m = MatMul(h, w)  y = Add(m, b) }"
SIZES = {"g": 32, "c": 32, "w": (32, 24), "b": 24}


def build(text, dtype=np.float32, **sizes):
    proto = onnx.parser.parse_model(text if dtype == np.float32 else text.replace("float[", "float16["))
    for name, size in sizes.items():
        numbers = RNG.standard_normal(size) + (3 * RNG.standard_normal(size) if name == "c" else 0)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers.astype(dtype), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.fixture
def data(outlier_model):
    """Sequences with a mean, so that even a Gelu has channels that are not centred."""
    return outlier_model.Samples({"x": (RNG.standard_normal((6, 32)) + 2).astype(np.float32)} for _ in range(12))


def named(model, name):
    return {value.name: value for node in model.graph for value in node.outputs}[name]


def answers(model, data):
    session = open_model(model)
    return [session.run({name: array[None] for name, array in sample.items()}) for sample in data]


def apart(one, other):
    return max(distance(a, b) for a, b in zip(one, other, strict=True))


def shifted(model, data, **options):
    before = answers(model, data)
    target = options.get("target", "tensorrt-rtx")
    Observe(data=data, target=target)(model)
    outcome = Shift(**options)(model)
    assert apart(before, answers(model, data)) < 1e-5
    return outcome


def wanted(low, high):
    """The least offset that lets every channel end where the widest centred one does."""
    reach = (high - low).max() / 2
    return np.where(high > reach, high - reach, np.where(low < -reach, low + reach, 0.0))


def test_the_offset_of_a_norm_goes_into_its_bias_and_behind_the_product(data):
    model = build(NORM, **SIZES)
    bias, kernel, behind = (model.graph.initializers[name].const_value.numpy() for name in "cwb")
    observed = model.clone()
    Observe(data=data)(observed)
    known = activation_of(named(observed, "h"))
    outcome = shifted(model, data)
    assert [(d.node, d.action) for d in outcome.decisions] == [("m", "folded")]
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "MatMul", "Add"]
    offset = wanted(known.low, known.high)
    assert np.abs(offset).max() > 1
    assert np.allclose(bias - model.graph.initializers["c/shifted"].const_value.numpy(), offset, atol=1e-5)
    assert np.allclose(model.graph.initializers["b/shifted"].const_value.numpy() - behind, offset @ kernel, atol=1e-4)
    after = activation_of(named(model, "h"))
    assert after.reach.max() == pytest.approx((known.high - known.low).max() / 2, rel=1e-5)


@pytest.mark.parametrize(("target", "subs"), [("tensorrt-rtx", 1), ("tensorrt", 1), ("ort-cuda", 1), ("ort-cpu", 0)])
def test_a_sub_stays_behind_an_activation_function_where_there_are_no_zero_points(data, target, subs):
    model = build(GELU, w=(32, 24), b=24)
    outcome = shifted(model, data, target=target)
    assert Counter(node.op_type for node in model.graph)["Sub"] == subs
    (decision,) = outcome.decisions
    assert decision.action == ("folded" if subs else "skipped")
    assert decision.reason == ("one Sub left: " if subs else "") + "Gelu makes it, which has no bias"
    assert outcome.modified == bool(subs)


def test_no_sub_is_left_if_none_is_allowed(data):
    outcome = shifted(build(GELU, w=(32, 24), b=24), data, sub=False)
    assert not outcome.modified


def test_the_sub_is_read_by_the_products_alone(data):
    text = GELU.replace("}", " z = Mul(h, h) k = MatMul(h, v) o = Add(k, b) }").replace(
        "(float[n, s, 24] y)", "(float[n, s, 24] y, float[n, s, 32] z, float[n, s, 24] o)"
    )
    model = build(text, w=(32, 24), v=(32, 24), b=24)
    shifted(model, data)
    assert {node.name for node in named(model, "h").consumers()} == {"h/Sub", "z"}
    assert {node.name for node in named(model, "h/centred").consumers()} == {"m", "k"}


@pytest.mark.parametrize("text", [NORM, GELU])
def test_what_is_known_of_the_values_is_what_is_seen_of_them_afterwards(data, text):
    model = build(text, **SIZES)
    shifted(model, data)
    followed = activation_of(next(node for node in model.graph if node.op_type == "MatMul").inputs[0])
    Observe(data=data)(model)
    seen = activation_of(next(node for node in model.graph if node.op_type == "MatMul").inputs[0])
    for name in ("low", "high", "rows"):
        assert np.allclose(getattr(followed, name), getattr(seen, name), atol=1e-5)


@pytest.mark.parametrize("text", [NORM, GELU])
@pytest.mark.parametrize("again", [False, True], ids=["at_once", "observed_again"])
def test_a_second_run_changes_nothing(data, text, again):
    model = build(text, **SIZES)
    shifted(model, data)
    if again:
        Observe(data=data)(model)
    assert not Shift()(model).modified


def test_channels_that_are_centred_stay(outlier_model):
    rows = RNG.standard_normal((4, 16, 32)).astype(np.float32)
    data = outlier_model.Samples({"x": np.concatenate([x, -x])} for x in rows)
    model = build(NORM.replace(", c)", ")"), g=32, w=(32, 24), b=24)
    assert [d.reason for d in shifted(model, data).decisions] == ["its channels are centred already"]


@pytest.mark.parametrize("text", [NORM, GELU])
def test_half_precision_keeps_its_type(outlier_model, text):
    data = outlier_model.Samples({"x": (RNG.standard_normal((6, 32)) + 2).astype(np.float16)} for _ in range(8))
    model = build(text, np.float16, **SIZES)
    before = answers(model, data)
    Observe(data=data)(model)
    assert Shift()(model).modified
    assert apart(before, answers(model, data)) < 5e-3
    floats = {value.dtype for value in model.graph.initializers.values()}
    assert floats == {ir.DataType.FLOAT16}


@pytest.mark.parametrize(("pads", "action"), [([0, 0, 0, 0], "folded"), ([1, 1, 1, 1], "skipped")])
def test_images_are_centred_in_front_of_convolutions_without_padding(outlier_model, pads, action):
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float[n, 16, 9, 9] x) => (float[n, 16, p, q] y)
    {{ h = Relu(x)  y = Conv<pads={pads}>(h, w, b) }}"""
    model = build(text, w=(16, 16, 3, 3), b=16)
    data = outlier_model.Samples({"x": RNG.standard_normal((16, 9, 9)).astype(np.float32)} for _ in range(4))
    (decision,) = shifted(model, data).decisions
    assert decision.action == action
    if action == "folded":
        sub = next(node for node in model.graph if node.op_type == "Sub")
        assert sub.inputs[1].shape == (16, 1, 1)
    else:
        assert decision.reason == "Relu makes it, which has no bias"


IMAGES = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 16, 9, 9] x) => '
TURNED = IMAGES + "(float[n, 16, p, q] y) { h = Relu(x)  y = ConvTranspose<strides=[2, 2]>(h, w, b) }"
BOTH = TURNED.replace("y)", "y, float[n, 16, r, s] z)").replace(" }", "  z = Conv(h, v, b) }")


@pytest.mark.parametrize(("text", "read"), [(TURNED, {}), (BOTH, {"z": "centred"})], ids=["alone", "beside_a_conv"])
def test_a_transposed_convolution_reads_what_it_read(outlier_model, text, read):
    model = build(text, w=(16, 16, 3, 3), v=(16, 16, 3, 3), b=16)
    data = outlier_model.Samples({"x": RNG.standard_normal((16, 9, 9)).astype(np.float32)} for _ in range(4))
    (decision,) = shifted(model, data).decisions
    reason = "Relu makes it, which has no bias"
    told = ("folded", f"one Sub left: {reason}") if read else ("skipped", reason)
    assert (decision.action, decision.reason) == told
    readers = {node.name: node.inputs[0].name for node in model.graph if node.op_type.startswith("Conv")}
    assert readers == {"y": "h"} | {name: f"h/{what}" for name, what in read.items()}


def test_nodes_that_are_kept_and_values_that_nobody_saw_are_left_alone(data):
    model = build(NORM, **SIZES)
    assert [d.reason for d in Shift()(model).decisions] == ["no sample was observed at its input"]
    Observe(data=data)(model)
    assert Shift(keep=("m",))(model).decisions == ()
    with pytest.raises(UsageError, match="no node is called 'q'"):
        Shift(keep=("q",))(model)
    with pytest.raises(UsageError, match="unknown target"):
        Shift(target="abacus")(model)


@pytest.fixture(scope="module")
def sentences(outlier_model):
    with np.load(Path(__file__).with_name("golden") / "minilm-16.npz") as file:
        pairs = [
            (ids[mask > 0], mask[mask > 0]) for ids, mask in zip(file["input_ids"], file["attention_mask"], strict=True)
        ]
    return outlier_model.Samples(
        {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)} for ids, mask in pairs
    )


@pytest.mark.parametrize(("target", "subs"), [("tensorrt-rtx", 6), ("ort-cpu", 0)])
def test_minilm_computes_the_same_with_centred_channels(minilm, sentences, target, subs):
    recipe = override(load_recipe("int8"), [f"export.target={target}"])
    steps = dict(instantiate(recipe, {"data": sentences, "advance": lambda: None}))
    names = list(steps)
    model, _ = run(load_model(minilm), [(name, steps[name]) for name in names[: names.index("observe") + 1]])
    count = Counter(node.op_type for node in model.graph)
    before = answers(model, sentences[:4])
    outcome = steps["shift"](model)
    assert apart(before, answers(model, sentences[:4])) < 1e-5
    assert Counter(node.op_type for node in model.graph) - count == (Counter(Sub=subs) if subs else Counter())
    folded = [d for d in outcome.decisions if d.action == "folded"]
    assert sum("one Sub" in d.reason for d in folded) == subs
    assert len(folded) - subs >= 12
    assert not steps["shift"](model).modified
