"""Smoothed channels: scales go into the parameters around a value, no Mul stays, and the model computes the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.observe import Observe
from qexport.calibration.running.execute import open_model
from qexport.errors import UsageError
from qexport.exporter.load import load_model
from qexport.exporter.proof.equality import distance
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import load_recipe, override
from qexport.passes.folding.activation import activation_of
from qexport.passes.folding.trial import Trial
from qexport.passes.pipeline import run
from qexport.passes.quantize import Quantize
from qexport.passes.smooth import ALPHAS, Smooth, migrate, search

RNG = np.random.default_rng(0)
HEAD = '<ir_version: 10, opset_import: ["" : 23]> g (float[n, s, 32] x) => '
NORM = (
    HEAD + "(float[n, s, 24] y, float[n, s, 32] z) { h = RMSNormalization(x, g)  y = MatMul(h, w)  z = MatMul(h, v) }"
)
POST = HEAD + "(float[n, s, 32] y) { h = LayerNormalization(x, g, c)  m = MatMul(h, v)  y = Add(h, m) }"
GELU = HEAD + "(float[n, s, 24] y) { h = Gelu(x)  y = MatMul(h, w) }"
SIZES = {"g": 32, "c": 32, "w": (32, 24), "v": (32, 32)}


def build(text, **sizes):
    proto = onnx.parser.parse_model(text)
    for name, size in (SIZES | sizes).items():
        if f" {name})" in text or f" {name}," in text:
            numbers = RNG.standard_normal(size)
            if name in "gwv":  # an outlier that matters no more than the other channels
                numbers[3] *= 100.0 if name == "g" else 0.01
            proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers.astype(np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.fixture(scope="module")
def data(outlier_model):
    return outlier_model.Samples({"x": RNG.standard_normal((6, 32)).astype(np.float32)} for _ in range(12))


def named(model, name):
    return {value.name: value for node in model.graph for value in node.outputs}[name]


def ops(model):
    return Counter(node.op_type for node in model.graph)


def answers(model, data):
    session = open_model(model)
    return [session.run({name: array[None] for name, array in sample.items()}) for sample in data]


def apart(one, other):
    return max(distance(a, b) for a, b in zip(one, other, strict=True))


def smoothed(model, data, **options):
    before = answers(model, data)
    Observe(data=data)(model)
    outcome = Smooth(**options)(model)
    assert apart(before, answers(model, data)) < 1e-5
    return outcome


def numbers_of(model, name):
    return model.graph.initializers[name].const_value.numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scales_are_those_of_the_paper_up_to_a_common_factor(data, alpha):
    model = build(NORM)
    g, w, v = (numbers_of(model, name) for name in "gwv")
    outcome = smoothed(model, data, alpha=alpha, floor=0)
    assert [(d.node, d.action, d.reason) for d in outcome.decisions] == [("y", "folded", f"alpha {alpha:g}")]
    rows = np.concatenate([sample["x"] for sample in data]).astype(np.float64)
    h = rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + 1e-5) * g
    most = np.abs(np.hstack([w, v])).max(axis=1)
    scale = np.abs(h).max(axis=0) ** alpha / most ** (1 - alpha)
    scale /= np.exp(np.log(scale).mean())
    assert np.allclose(numbers_of(model, "g/scaled"), g / scale, rtol=1e-4)
    assert np.allclose(numbers_of(model, "w/scaled"), w * scale[:, None], rtol=1e-4)
    assert np.allclose(numbers_of(model, "v/scaled"), v * scale[:, None], rtol=1e-4)
    assert ops(model) == {"RMSNormalization": 1, "MatMul": 2}


def test_scales_have_a_geometric_mean_of_one_and_dead_channels_keep_theirs():
    scale = migrate(np.array([4.0, 1.0, 0.0, 9.0]), np.array([1.0, 0.0, 1.0, 1.0]), 0.5)
    assert scale[[1, 2]].tolist() == [1, 1]
    assert np.allclose(scale[[0, 3]], [(2 / 3) ** 0.5, (3 / 2) ** 0.5])
    assert migrate(np.zeros(3), np.ones(3), 0.5).tolist() == [1, 1, 1]


def test_small_channels_count_as_a_share_of_the_largest(data):
    model = build(NORM)
    model.graph.initializers["g"].const_value = ir.tensor(
        np.where(np.arange(32) == 5, 1e-6, numbers_of(model, "g")).astype(np.float32), name="g"
    )
    smoothed(model, data, alpha=1.0, floor=0.5)
    reach = activation_of(named(model, "h")).reach
    assert np.isclose(reach.max(), np.delete(reach, 5).max())
    assert np.log10(reach[3] / reach[5]) > 3  # scaled as if it were half as large as the largest


def test_search_finds_what_a_fine_grid_finds(data):
    model = build(NORM)
    Observe(data=data)(model)
    known = activation_of(named(model, "h"))
    kernels = [numbers_of(model, "w"), numbers_of(model, "v")]
    most = np.abs(np.hstack(kernels)).max(axis=1).astype(np.float64)
    trial = Trial(known, kernels, 1.1)

    def rated(alpha):
        return trial.error(lambda reach: migrate(reach.astype(np.float64), most, alpha))

    found, error = search(rated)
    every = [rated(alpha) for alpha in ALPHAS]
    assert error <= min(every) * 1.05
    assert found in ALPHAS
    assert error < trial.error(np.ones_like) / 4


@pytest.mark.parametrize("valley", [0.2, 0.41, 0.65, 0.9])
def test_search_finds_the_bottom_of_a_valley_in_few_steps(valley):
    tried = []
    found, error = search(lambda alpha: tried.append(alpha) or (alpha - valley) ** 2)
    assert abs(found - valley) < 0.026
    assert error == (found - valley) ** 2
    assert len(tried) == len(set(tried)) <= 9


def test_outliers_that_ruin_even_steps_stay_where_floating_numbers_read_them(data):
    source = build(NORM)
    gains = np.where(np.arange(32) == 3, 100, 1).astype(np.float32)
    source.graph.initializers["g"].const_value = ir.tensor(gains, name="g")
    actions = {}
    for numbers in (None, "fp8"):
        (decision,) = smoothed(source.clone(), data, format=numbers, gain=0.5).decisions
        actions[numbers] = decision.action
    assert actions == {None: "folded", "fp8": "skipped"}
    with pytest.raises(UsageError, match="target ort-cpu does not read fp8") as caught:
        Smooth(target="ort-cpu", format="fp8")(build(NORM))
    assert caught.value.where == "smooth.format"


@pytest.mark.parametrize(("recipe", "numbers"), [("int8", {None}), ("fp8", {"fp8"})])
def test_every_step_of_a_recipe_works_for_the_same_numbers(data, recipe, numbers):
    steps = instantiate(load_recipe(recipe), {"data": data})
    formats = {name: step.format for name, step in steps if "format" in step.options()}
    assert formats.keys() == {"smooth", "calibrate", "triage", "quantize"}
    assert set(formats.values()) == numbers


def test_a_search_needs_rows_and_a_gain(data, outlier_model):
    few = outlier_model.Samples(data[:1])
    model = build(NORM)
    Observe(data=few)(model)
    assert [d.reason for d in Smooth()(model).decisions] == ["too few samples to search alpha"]
    model = build(NORM)
    model.graph.initializers["g"].const_value = ir.tensor(np.ones(32, np.float32), name="g")
    assert [d.reason for d in smoothed(model, data, gain=0.9).decisions] == ["smoothing would not lower its error"]


OPTIONS = [{}, {"alpha": 0.3}, {"alpha": 1.0, "floor": 0.2}, {"split": True}, {"alpha": 0.5, "mul": True}]


@pytest.mark.parametrize("text", [NORM, POST, GELU])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["at_once", "observed_again"])
def test_a_second_run_changes_nothing(data, text, options, again):
    model = build(text)
    smoothed(model, data, **options)
    if again:
        Observe(data=data)(model)
    before = ir.to_proto(model).SerializeToString()
    outcome = Smooth(**options)(model.clone())
    assert not outcome.modified
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(("text", "options"), [(NORM, {}), (POST, {"split": True}), (POST, {"mul": True})])
def test_what_is_known_of_the_values_is_what_is_seen_of_them_afterwards(data, text, options):
    model = build(text)
    assert smoothed(model, data, **options).modified

    def known():
        return activation_of(next(node for node in model.graph if node.op_type == "MatMul").inputs[0])

    followed = known()
    Observe(data=data)(model)
    for name in ("low", "high", "rows"):
        assert np.allclose(getattr(followed, name), getattr(known(), name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(POST, "it is an output of the model"), (GELU, "Gelu makes it, which no scale goes through")],
)
def test_what_cannot_be_folded_is_left_alone_with_a_reason(data, text, reason):
    model = build(text)
    outcome = smoothed(model, data, split=False)
    assert [(d.action, d.reason) for d in outcome.decisions] == [("skipped", reason)]
    assert not outcome.modified


@pytest.mark.parametrize(
    ("text", "options", "more"),
    [
        (POST, {"split": True}, {"LayerNormalization": 1}),
        (POST, {}, {"LayerNormalization": 1}),
        (POST, {"target": "ort-cpu"}, {"LayerNormalization": 1}),
        (POST, {"mul": True, "split": False}, {"Mul": 1}),
        (POST, {"split": True, "mul": True}, {"LayerNormalization": 1}),
        (GELU, {"split": True}, {}),
        (GELU, {"mul": True}, {"Mul": 1}),
    ],
)
def test_options_allow_for_a_copy_of_the_norm_or_a_mul(data, text, options, more):
    model = build(text)
    before = ops(model)
    outcome = smoothed(model, data, alpha=0.5, **options)
    assert ops(model) - before == more
    assert outcome.modified == bool(more)


def test_a_norm_with_computed_parameters_is_not_copied(data):
    text = POST.replace("{ h =", "{ k = ReduceMean<keepdims=0>(x, axes) h =").replace("x, g, c", "x, k, c")
    model = build(text)
    axes = ir.val("axes", ir.DataType.INT64, (2,), const_value=ir.tensor(np.array([0, 1]), name="axes"))
    model.graph.register_initializer(axes)
    named(model, "k").producer().replace_input_with(1, axes)
    outcome = smoothed(model, data, alpha=0.5, split=True)
    assert not outcome.modified


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.01}, "alpha is 1.01, expected a number from 0 to 1"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"headroom": 0.9}, "headroom is 0.9"),
        ({"headroom": float("inf")}, "headroom is inf"),
        ({"floor": 1.5}, "floor is 1.5"),
        ({"gain": -1.0}, "gain is -1"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(UsageError) as caught:
        Smooth(**options)
    assert message in caught.value.what
    assert caught.value.where == f"smooth.{next(iter(options))}"


def test_unknown_nodes_and_targets_are_told_and_kept_ones_left_alone(data):
    model = build(NORM)
    assert [d.reason for d in Smooth()(model).decisions] == ["no sample was observed at its input"]
    Observe(data=data)(model)
    assert Smooth(keep=("z",))(model).decisions == ()
    with pytest.raises(UsageError, match="no node is called"):
        Smooth(keep=("q",))(model)
    with pytest.raises(UsageError, match="unknown target"):
        Smooth(target="abacus")(model)
    with pytest.raises(UsageError, match="alpha is 2"):
        instantiate(override(load_recipe("smoothquant-o3"), ["smooth.alpha=2.0"]), {"data": data})


@pytest.fixture(scope="module")
def wide(outlier_model):
    model = outlier_model.transformer()
    outlier_model.widen_norms(model)
    return model


@pytest.fixture(scope="module")
def sqnr(outlier_model, wide):
    """Output SQNR of a recipe on the model with outliers, on samples that it has not seen."""
    calibration, unseen = outlier_model.sentences(32, seed=1), outlier_model.sentences(8, seed=2)
    truth = outlier_model.outputs(wide, unseen)

    def measure(recipe, *settings):
        chosen = override(load_recipe(recipe), settings)
        model, _ = run(wide, instantiate(chosen, {"data": calibration, "advance": lambda: None}))
        return outlier_model.decibel(truth, outlier_model.outputs(model, unseen)), model

    return measure


OFF = [f"{step}.enabled=false" for step in ("observe", "shift", "smooth", "triage", "correct-bias")]
OFF.append("calibrate.method=minmax")  # plain int8 as in textbooks
ALL = "quantize.min_sqnr=-100.0"  # nothing may stay in float because it is bad


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_the_int8_recipe_recovers_from_outliers_by_smoothing(sqnr, target):
    plain, model = sqnr("int8", *OFF, ALL, f"export.target={target}")
    assert plain < 10
    count = ops(model)["DequantizeLinear"]
    found, model = sqnr("int8", ALL, f"export.target={target}")
    assert found >= 35
    assert ops(model)["DequantizeLinear"] >= count


@pytest.mark.parametrize(("recipe", "least"), [("smoothquant-o1", 38), ("smoothquant-o2", 35), ("smoothquant-o3", 35)])
def test_every_level_recovers(sqnr, recipe, least):
    settings = [ALL] if recipe == "smoothquant-o3" else []
    found, model = sqnr(recipe, *settings)
    assert found >= least
    off, _ = sqnr(recipe, "smooth.enabled=false", *settings)
    assert off < found - 15
    other, _ = sqnr(recipe, "smooth.alpha=0.6", *settings)
    assert other >= least - 2
    assert other != found
    if recipe == "smoothquant-o3":
        assert ops(model)["Mul"] == 2  # the two of attention


def test_levels_differ_in_how_activations_are_quantized():
    steps = {level: load_recipe(f"smoothquant-{level}").step for level in ("o1", "o2", "o3")}
    found = {level: {s.pass_: s.options for s in step if s.enabled} for level, step in steps.items()}
    assert found["o1"]["dynamic"] == {"granularity": "token"}
    assert found["o2"]["dynamic"] == {"granularity": "tensor"}
    assert {"calibrate", "quantize"} <= set(found["o3"])
    assert all(options["smooth"] == {"alpha": 0.5} and "shift" not in options for options in found.values())


def pipeline(source, data, target, *settings):
    """The model before and after ``smooth`` in the recipe int8 without ``shift``, and what ``smooth`` decided."""
    recipe = override(load_recipe("int8"), [f"export.target={target}", "shift.enabled=false", *settings])
    steps = dict(instantiate(recipe, {"data": data, "advance": lambda: None}))
    names = list(steps)
    before, _ = run(load_model(source), [(name, steps[name]) for name in names[: names.index("observe") + 1]])
    after = before.clone()
    outcome = steps["smooth"](after)
    assert apart(answers(before, data[:4]), answers(after, data[:4])) < 1e-5
    assert not steps["smooth"](after).modified
    return before, after, outcome.decisions


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_minilm_is_smoothed_with_no_mul_left(minilm, outlier_model, target):
    with np.load(Path(__file__).with_name("golden") / "minilm-16.npz") as file:
        rows = [ids[mask > 0] for ids, mask in zip(file["input_ids"], file["attention_mask"], strict=True)]
    data = outlier_model.Samples(
        {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)} for ids in rows
    )
    before, after, decisions = pipeline(minilm, data, target, "smooth.alpha=0.5", "smooth.split=false")
    assert ops(before) == ops(after)
    folded = [d.node for d in decisions if d.action == "folded"]
    assert len(folded) == 6
    assert all("attention.output" in name for name in folded)
    assert {d.reason for d in decisions if d.action == "skipped"} == {
        "LayerNormalization reads it, which no scale goes through",
        "Gelu makes it, which no scale goes through",
    }


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_every_product_of_a_llama_decoder_is_smoothed_with_no_mul_left(samples, outlier_model, target):
    data = outlier_model.Samples(
        {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for ids in (RNG.integers(3, 500, size) for size in (5, 9, 12, 16))
    )
    before, after, decisions = pipeline(samples / "decoder/stories260k", data, target, "smooth.alpha=0.5")
    assert ops(before) == ops(after)
    assert {d.action for d in decisions} == {"folded"}
    kinds = Counter(d.node.split("/")[0].split(".")[-1] for d in decisions)
    assert kinds == {"q_proj": 5, "o_proj": 5, "gate_proj": 5, "down_proj": 5, "lm_head": 1}
    changed = {
        value.name.removesuffix("/scaled")
        for value in after.graph.initializers.values()
        if value.name.endswith("/scaled")
    }
    assert len(changed) == 5 * (7 + 2) + 2  # every kernel and every norm


def test_smoothing_helps_a_quantizer_on_rows_it_has_not_seen(data, outlier_model):
    unseen = outlier_model.Samples({"x": RNG.standard_normal((6, 32)).astype(np.float32)} for _ in range(8))
    source, errors = build(NORM), []
    truth = answers(source, unseen)
    for steps in ((), (Observe(data=data), Smooth())):
        model = source.clone()
        for step in (*steps, Calibrate(data=data), Quantize(min_sqnr=-100.0)):
            step(model)
        errors.append(apart(truth, answers(model, unseen)))
    assert errors[1] < errors[0] / 3
