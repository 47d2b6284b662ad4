"""Heads, neurons and channels removed by passes: what goes, what that does to the outputs, and what is refused."""

import numpy as np
import onnx_ir as ir
import pytest
from channel_models import build
from cut_models import MODELS, bytes_of, check, copy_of, cuts
from cut_samples import data, made, run, same_numbers, tapped
from helpers import model_from
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.channels import Channels
from qexport.calibration.cutting.scores import CRITERIA, unmeasured
from qexport.calibration.heads import Heads
from qexport.calibration.neurons import Neurons
from qexport.calibration.prune import DONE, SPARED, UNREPAIRED
from qexport.errors import UsageError
from qexport.passes.match import array

STEPS = {"heads": Heads, "neurons": Neurons, "channels": Channels}
FIXED = ("group_query_attention", "rotary_operator")  # constants of theirs have the batch's size
SMALL = [name for name in MODELS if name not in FIXED]
SMOOTH = [
    "mlp",
    "mlp_of_gemms",
    "mha",
    "mha_with_biases",
    "grouped_queries",
    "convolutions",
    "residual_group",
    "pooled",
]


def step(name, samples, **options):
    kind = MODELS[name][0]
    least = {} if kind == "heads" else {"multiple": 1}
    return STEPS[kind](**{"data": samples, "keep": 0.7, "per": "layer", "criterion": "surgery"} | least | options)


def error_of(model, other, samples):
    pairs = [(run(model, sample)[0], run(other, sample)[0]) for sample in samples]
    return sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(a).sum() for a, _ in pairs)


def pruned(outcome):
    return [d for d in outcome.decisions if d.action == "pruned"]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", SMALL)
def test_every_criterion_cuts_every_model_it_can_measure_and_once_only(name, criterion):
    model, samples = made(name), data(made(name), 4, length=3)
    (space,) = cuts(model, MODELS[name][0])
    before, shapes = bytes_of(model), [value.shape for value in run(model, samples[0])]
    asked = step(name, samples, criterion=criterion)
    refused = unmeasured(space.cut, criterion)
    if (name, criterion) == ("resized", "gradient"):
        refused = "no gradient through ConvTranspose"
    if refused is not None:
        with pytest.raises(UsageError, match=refused):
            asked(model)
        assert bytes_of(model) == before
        return
    outcome = asked(model)
    assert outcome.modified
    (done,) = pruned(outcome)
    kept = min(max(round(0.7 * space.count), 1), space.count - 1)
    assert (done.node, done.op, done.units) == (space.name, MODELS[name][0], (kept, space.count))
    assert [value.shape for value in run(model, samples[0])] == shapes
    check(model)
    after, again = bytes_of(model), asked(model)
    assert not again.modified
    assert bytes_of(model) == after
    assert DONE in {d.reason for d in again.decisions}


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(SMALL),
    st.floats(0.3, 0.95),
    st.sampled_from(["layer", "model"]),
    st.sampled_from(["surgery", "magnitude", "change"]),
    st.booleans(),
    st.integers(0, 50),
)
def test_shapes_of_outputs_never_change(name, keep, per, criterion, repair, seed):
    model, samples = made(name, seed), data(made(name), 2, seed, 3)
    shapes = [value.shape for value in run(model, samples[0])]
    before, asked = bytes_of(model), step(name, samples, keep=keep, per=per, criterion=criterion, repair=repair)
    try:
        asked(model)
    except UsageError:
        assert bytes_of(model) == before
    assert [value.shape for value in run(model, samples[0])] == shapes
    check(model)


def steps_of(cls, samples, **options):
    return cls(data=samples, **{"keep": 0.5, "per": "layer"} | ({} if cls is Heads else {"multiple": 1}) | options)


@pytest.mark.parametrize("sign", [1.5, -1.0])
@pytest.mark.parametrize("options", [{"criterion": "surgery"}, {"criterion": "likeness", "repair": False}])
@pytest.mark.parametrize("kind", ["neurons", "channels"])
def test_duplicates_go_and_nothing_changes(kind, options, sign):
    same_numbers()
    if kind == "neurons":
        body = "y = MatMul(a, w1) x = Identity(y) o = MatMul(x, w2) out = Add(o, c)"
        model, samples = build(body, w1="8x6", w2="6x4", c="4"), None
    else:
        body = "y = Conv<pads=[1,1,1,1]>(a, w1) x = Identity(y) out = Conv<pads=[1,1,1,1]>(x, w2)"
        sizes = {"inputs": "float[b, 8, 5, 5] a", "outputs": "float[b, 4, 5, 5] out"}
        model = build(body, w1="6x8x3x3", w2="4x6x3x3", **sizes)
    samples = data(model, 20)
    first = array(model.graph.initializers["w1"]).copy()
    units = first.T if kind == "neurons" else first
    units[3:] = sign * units[:3]  # a view
    model.graph.initializers["w1"].const_value = ir.tensor(first, name="w1")
    before = copy_of(model)
    (done,) = pruned(steps_of(STEPS[kind], samples, **options)(model))
    assert done.units == (3, 6)
    assert error_of(before, model, samples) < 1e-4
    assert error_of(before, model, data(model, 4, seed=9)) < 1e-4


DATA = [name for name in CRITERIA if name != "magnitude"]


@pytest.mark.parametrize("criterion", ["activation", "surgery", "change", "gradient"])
@pytest.mark.parametrize("name", ["mha", "qkv_split", "grouped_queries", "mha_with_biases"])
def test_heads_that_the_projection_does_not_read_go_first(name, criterion):
    model, samples = made(name), data(made(name), 6)
    weight, count = array(model.graph.initializers["wo"]).copy(), MODELS[name][1]
    weight[: 8 // count] = 0
    model.graph.initializers["wo"].const_value = ir.tensor(weight, name="wo")
    before = copy_of(model)
    (done,) = pruned(Heads(data=samples, keep=1 - 1 / count, criterion=criterion)(model))
    assert done.units == (count - 1, count)
    assert done.detail.endswith("; without 0")
    assert error_of(before, model, samples) < 1e-6


@pytest.mark.parametrize("criterion", DATA)
def test_neurons_that_are_never_on_go_first(criterion):
    model, samples = made("mlp"), data(made("mlp"), 6)
    for node in model.graph:
        node.op_type = "Relu" if node.op_type == "Gelu" else node.op_type
    bias = array(model.graph.initializers["c1"]).copy()
    bias[[1, 4]] = -1000
    model.graph.initializers["c1"].const_value = ir.tensor(bias, name="c1")
    before = copy_of(model)
    (done,) = pruned(Neurons(data=samples, keep=0.66, multiple=1, criterion=criterion, repair=False)(model))
    assert done.detail.endswith("; without 1, 4")
    assert error_of(before, model, samples) < 1e-9


@pytest.mark.parametrize("name", SMOOTH)
def test_repair_comes_nearer_to_the_model_as_it_was(name):
    samples, errors = data(made(name), 30), {}
    for repair in (True, False):
        model = made(name)
        (done,) = pruned(step(name, samples, repair=repair)(model))
        errors[repair] = error_of(made(name), model, samples)
        assert ("made up for" in done.detail) == repair
        assert (done.reason == UNREPAIRED) != repair
    assert errors[True] < errors[False] * 1.001


def test_decisions_say_what_was_cut_and_how_many_parameters_that_was():
    model, samples = made("mlp"), data(made("mlp"), 4)
    count = sum(value.const_value.size for value in model.graph.initializers.values())
    (done,) = pruned(step("mlp", samples)(model))
    left = sum(value.const_value.size for value in model.graph.initializers.values())
    assert (done.node, done.op, done.units) == ("MatMul/y", "neurons", (4, 6))
    assert done.detail.startswith(f"{count - left} parameters fewer, error -")
    assert count - left == 2 * (8 + 1 + 4)


def test_widths_are_multiples_of_16_and_of_64_on_request():
    same_numbers()
    body = "y = MatMul(a, w1) x = Relu(y) out = MatMul(x, w2)"
    for multiple, kept in ((16, 112), (64, 128), (1, 115)):
        model = build(body, w1="8x192", w2="192x4")
        (done,) = pruned(Neurons(data=data(model, 4), keep=0.6, multiple=multiple)(model))
        assert done.units == (kept, 192)
        assert array(model.graph.initializers["w2"]).shape == (kept, 4)


def refusal(model, asked):
    before = bytes_of(model)
    with pytest.raises(UsageError) as caught:
        asked(model)
    assert bytes_of(model) == before
    return caught.value


def test_samples_are_asked_for_where_they_are_needed_alone():
    model = made("mha")
    assert "needs calibration data" in refusal(model, Heads(criterion="magnitude")).what
    assert "needs calibration data" in refusal(model, Heads(criterion="gradient", repair=False)).what
    assert Heads(criterion="magnitude", repair=False, keep=0.5)(model).modified


def test_a_model_without_such_units_is_an_error_or_a_decision():
    model, samples = made("convolutions"), data(made("convolutions"), 2)
    error = refusal(model, Heads(data=samples))
    assert (error.what, error.where) == ("the model has no heads", "heads")
    assert "heads.missing=skip" in error.hint
    outcome = Heads(data=samples, missing="skip")(model)
    assert not outcome.modified
    assert [(d.action, d.reason) for d in outcome.decisions] == [("skipped", "the model has no heads")]


def test_attention_that_cannot_be_proven_is_refused_with_the_reason():
    same_numbers()
    body = "q = MatMul(a, wq) k = MatMul(a, wk) t = Transpose<perm=[0,2,1]>(k) p0 = MatMul(q, t) p = Softmax(p0) "
    model = build(body + "v = MatMul(a, wv) out = MatMul(p, v)", wq="8x8", wk="8x8", wv="8x6")
    error = refusal(model, Heads(data=data(model, 2)))
    told = "the heads of an attention have no axis of a known size (at 'Softmax/p')"
    assert error.what == f"no heads of the model can be removed: {told}"


def test_layers_that_an_option_leaves_out_are_told_as_the_reason():
    model = made("mlp")
    error = refusal(model, Neurons(data=data(model, 2)))
    assert error.what == "no neurons of the model can be removed: no more than 16 neurons (at 'MatMul/y')"


def test_spared_layers_stay_whole_and_a_misspelt_one_is_told():
    model, samples = made("mha"), data(made("mha"), 2)
    error = refusal(model, Heads(data=samples, spare=("Softmax/q",)))
    assert (error.what, error.where, error.hint) == (
        "no heads are called 'Softmax/q'", "heads.spare", "did you mean 'Softmax/p'?",
    )  # fmt: skip
    before, outcome = bytes_of(model), Heads(data=samples, spare=("Softmax/p",))(model)
    assert not outcome.modified
    assert [d.reason for d in outcome.decisions] == [SPARED]
    assert bytes_of(model) == before


@pytest.mark.parametrize(
    ("cls", "options", "where"),
    [
        (Heads, {"keep": 0.0}, "heads.keep"),
        (Heads, {"keep": 1.0}, "heads.keep"),
        (Neurons, {"keep": float("nan")}, "neurons.keep"),
        (Channels, {"keep": -0.2}, "channels.keep"),
        (Channels, {"multiple": 0}, "channels.multiple"),
        (Heads, {"samples": 0}, "heads.samples"),
        (Heads, {"ridge": -1.0}, "heads.ridge"),
        (Neurons, {"ridge": float("nan")}, "neurons.ridge"),
    ],
)
def test_options_that_make_no_sense_are_errors_at_once(cls, options, where):
    with pytest.raises(UsageError) as caught:
        cls(data=[], **options)
    assert caught.value.where == where


@pytest.mark.parametrize(("name", "keep"), [("mha", 0.1), ("convolutions", 0.02)])
def test_a_budget_that_empties_a_layer_is_an_error_and_nothing_is_touched(name, keep):
    model, samples = made(name), data(made(name), 2)
    error = refusal(model, step(name, samples, keep=keep))
    assert "would leave nothing" in error.what
    assert error.where == f"{MODELS[name][0]}.keep"


def test_a_quantized_model_is_left_alone():
    text = """g (float[n, 8] a) => (float[n, 4] out) { q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z)
        y = MatMul(d, w1) x = Relu(y) out = MatMul(x, w2) }"""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((8, 32)).astype("f"), "w2": rng.standard_normal((32, 4)).astype("f")}
    model = model_from(text, s=np.float32(0.1), z=np.int8(0), **weights)
    outcome = Neurons(data=data(model, 2))(model)
    assert not outcome.modified
    assert [d.reason for d in outcome.decisions] == ["already quantized"]


def test_layers_are_fitted_to_what_they_read_behind_those_that_are_cut_already():
    same_numbers()
    body = "y = MatMul(a, w1) x = Relu(y) o = MatMul(x, w2) h = Add(o, a) z = MatMul(h, w3) t = Tanh(z) "
    model = build(body + "out = MatMul(t, w4)", w1="8x12", w2="12x8", w3="8x12", w4="12x4")
    samples, ticks = data(model, 60), []
    work, first = copy_of(model), copy_of(model)
    options = {"keep": 0.5, "multiple": 1, "ridge": 0.0}
    outcome = Neurons(data=samples, advance=lambda: ticks.append(1), **options)(work)
    assert [d.units for d in pruned(outcome)] == [(6, 12)] * 2
    assert len(ticks) == 60
    Neurons(data=samples, spare=("MatMul/z",), **options)(first)
    rows = np.concatenate([tapped(first, sample, "t")[0].reshape(-1, 12) for sample in samples]).astype(np.float64)
    old, new = (array(m.graph.initializers["w3"]) for m in (model, work))
    keep = [column.tolist() in new.T.tolist() for column in old.T]
    wanted = np.linalg.lstsq(rows[:, keep], rows @ array(model.graph.initializers["w4"]), rcond=None)[0]
    assert array(work.graph.initializers["w4"]) == pytest.approx(wanted, rel=1e-2, abs=1e-2)


def test_layers_that_lose_nothing_count_among_all_units():
    body = "y = MatMul(a, w1) x = Relu(y) o = MatMul(x, w2) h = Add(o, a) z = MatMul(h, w3) t = Tanh(z) "
    shapes = {"w1": "8x12", "w2": "12x8", "w3": "8x12", "w4": "12x4"}
    for options, reason in (({"per": "layer", "spare": ("MatMul/z",)}, SPARED), ({"per": "model"}, "all of it stays")):
        model = build(body + "out = MatMul(t, w4)", **shapes)
        weight = array(model.graph.initializers["w2"]).copy()
        weight[:6] = 0  # the neurons that a budget for the whole model takes
        model.graph.initializers["w2"].const_value = ir.tensor(weight, name="w2")
        keep = 0.5 if options["per"] == "layer" else 0.75
        outcome = Neurons(data=data(model, 6), keep=keep, multiple=1, criterion="activation", **options)(model)
        told = {d.node: (d.units, d.reason) for d in outcome.decisions if d.units is not None}
        assert told["MatMul/y"][0] == (6, 12)
        assert told["MatMul/z"] == ((12, 12), reason)
