"""What is lost without each unit: gates against silenced models, differences of outputs and loops."""

import numpy as np
import onnx_ir as ir
import pytest
from channel_models import build
from cut_models import MODELS, copy_of, cuts, silence
from cut_samples import data, evidence, made, run, same_numbers, tapped
from helpers import Samples, session

from qexport.calibration.cutting.gates import gate_gradients, gated, output_change
from qexport.calibration.cutting.scores import CRITERIA, unmeasured
from qexport.calibration.reading.data import sample_digest
from qexport.errors import DataInvalid, UsageError
from qexport.passes.match import array


def feeds_of(model, seed=1):
    return {name: np.stack([value] * 2) for name, value in data(model, 1, seed, 3)[0].items()}


def signs_of(sample, shape):
    """As the docstring of ``gradients`` has them."""
    return np.random.default_rng([0, *sample_digest(sample)[:16]]).integers(0, 2, shape) * 2 - 1


GATES = [name for name in MODELS if name not in ("group_query_attention",)]


@pytest.mark.parametrize("name", GATES)
def test_open_gates_change_nothing_and_a_shut_one_is_a_unit_that_nobody_reads(name):
    model = made(name)
    before = copy_of(model)
    (space,) = cuts(model, MODELS[name][0])
    work, (gate,) = gated(model, [space])
    assert ir.to_proto(model) == ir.to_proto(before)
    feeds = feeds_of(model)
    numbers = np.ones(space.count + 1, np.float32)
    truth = session(model).run(None, feeds)[0]
    assert session(work).run(None, feeds | {gate: numbers})[0] == pytest.approx(truth, rel=1e-5, abs=1e-5)
    moved = 0.0
    for unit in range(space.count):
        silent = made(name)
        silence(cuts(silent, MODELS[name][0])[0].cut, np.arange(space.count) != unit)
        wanted = session(silent).run(None, feeds)[0]
        numbers = (np.arange(space.count + 1) != unit).astype(np.float32)
        assert session(work).run(None, feeds | {gate: numbers})[0] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        moved = max(moved, np.abs(wanted - truth).max())
    assert moved > 1e-3


def test_gates_of_a_model_in_half_precision_are_cast_for_it():
    text = MODELS["mlp"][2]
    same_numbers()
    model = build(text, "float16[b, s, 8] a", "float16[b, s, n] out", w1="8x6", c1="6", w2="6x4", c2="4")
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(array(value).astype(np.float16), name=value.name)
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    model = ir.from_proto(ir.to_proto(model))
    samples = Samples({"a": sample["a"].astype(np.float16)} for sample in data(model, 2))
    (found,) = output_change(model, cuts(model, "neurons"), samples)
    assert (found > 0).all()


@pytest.mark.parametrize("name", ["mlp", "mha_with_biases", "grouped_queries", "residual_group", "convolutions"])
def test_the_change_of_outputs_is_that_of_the_silenced_model(name):
    model, samples = made(name), data(made(name), 3)
    (space,) = cuts(model, MODELS[name][0])
    (found,) = output_change(model, [space], samples)
    wanted = np.zeros(space.count)
    for unit in range(space.count):
        silent = made(name)
        silence(cuts(silent, MODELS[name][0])[0].cut, np.arange(space.count) != unit)
        for sample in samples:
            truth, other = run(model, sample)[0], run(silent, sample)[0]
            wanted[unit] += np.square(truth - other).sum() / np.square(truth).sum() / 3
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["mlp_of_gemms", "mha_with_biases", "grouped_queries", "residual_group", "depthwise"])
def test_gradients_of_gates_are_differences_of_outputs(name):
    model = made(name)
    for node in model.graph:
        node.op_type = "Tanh" if node.op_type == "Relu" else node.op_type  # no kinks
    spaces, samples = cuts(model, MODELS[name][0]), data(model, 2)
    (found,) = gate_gradients(model, spaces, samples)
    work, (gate,) = gated(model, spaces)
    engine, wanted = session(work), np.zeros(spaces[0].count)
    for sample in samples:
        feeds = {key: value[None] for key, value in sample.items()}
        signs = signs_of(sample, run(model, sample)[0].shape)
        for unit in range(spaces[0].count):
            ends = []
            for step in (0.02, -0.02):
                numbers = np.ones(spaces[0].count + 1, np.float32)
                numbers[unit] += step
                ends.append(float(np.sum(signs * engine.run(None, feeds | {gate: numbers})[0].astype(np.float64))))
            wanted[unit] += ((ends[0] - ends[1]) / 0.04) ** 2 / 2
    assert found == pytest.approx(wanted, rel=0.02, abs=1e-3 * wanted.max())
    assert wanted.max() > 1.5 * wanted.min()


def test_what_says_nothing_of_units_is_refused():
    text = "y = MatMul(a, w1) x = Relu(y) z = MatMul(x, w2) out = ArgMax<axis=-1>(z)"
    model = build(text, outputs="int64[b, s, n] out", w1="8x6", w2="6x4")
    for measure in (output_change, gate_gradients):
        with pytest.raises(UsageError, match="no float output"):
            list(measure(model, cuts(model, "neurons"), data(model, 1)))


def test_outputs_that_are_no_numbers_are_refused_with_the_sample():
    model = build("y = MatMul(a, w1) x = Exp(y) out = MatMul(x, w2)", w1="8x6", w2="6x4")
    samples = data(model, 2)
    samples[1]["a"] = samples[1]["a"] * np.float32(1e6)
    with pytest.raises(DataInvalid, match="NaN or infinite") as caught:
        output_change(model, cuts(model, "neurons"), samples)
    assert caught.value.where == "sample 1"


def matrices(model, samples):
    """What the last product of an MLP reads, by rows, and its weight."""
    x = np.concatenate([tapped(model, sample, "x")[0].reshape(-1, 6) for sample in samples])
    return x.astype(np.float64), array(model.graph.initializers["w2"]).astype(np.float64)


def test_scores_of_neurons_are_what_their_names_say():
    model = made("mlp")
    spaces, samples = cuts(model, "neurons"), data(model, 12)
    x, w2 = matrices(model, samples)
    scores = {name: CRITERIA[name](spaces, evidence(model, samples))[0] for name in CRITERIA}
    y = np.square(x @ w2).sum()
    energy = [np.square(np.outer(x[:, unit], w2[unit])).sum() / y for unit in range(6)]
    assert scores["activation"] == pytest.approx(energy, rel=1e-3)
    w1 = array(model.graph.initializers["w1"])
    norms = np.square(w1).sum(axis=0) / np.square(w1).sum() + np.square(w2).sum(axis=1) / np.square(w2).sum()
    assert scores["magnitude"] == pytest.approx(norms, rel=1e-5)
    size = np.linalg.norm(x, axis=0)
    near = np.abs(x.T @ x / np.outer(size, size)) - 2 * np.eye(6)
    assert scores["likeness"].min() == pytest.approx(1 - near.max(), rel=1e-3)
    first = scores["surgery"].argmin()
    others = np.arange(6) != first
    gap = x @ w2 - x[:, others] @ np.linalg.lstsq(x[:, others], x @ w2, rcond=None)[0]
    assert scores["surgery"][first] == pytest.approx(np.square(gap).sum() / y, rel=1e-2)


def test_the_energy_of_a_head_is_that_of_all_its_numbers_together():
    model = made("mha")
    spaces, samples = cuts(model, "heads"), data(model, 12)
    rows = np.concatenate([tapped(model, sample, "cm")[0].reshape(-1, 8) for sample in samples]).astype(np.float64)
    wo = array(model.graph.initializers["wo"])
    parts = [np.square(rows[:, 2 * head : 2 * head + 2] @ wo[2 * head : 2 * head + 2]).sum() for head in range(4)]
    (found,) = CRITERIA["activation"](spaces, evidence(model, samples))
    assert found == pytest.approx(np.array(parts) / np.square(rows @ wo).sum(), rel=1e-3)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("group_query_attention", "rotary_operator")])
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "gradient"])
def test_every_criterion_tells_a_number_for_every_unit_or_why_it_does_not(criterion, name):
    model = made(name)
    (space,) = cuts(model, MODELS[name][0])
    if unmeasured(space.cut, criterion) is None:
        (found,) = CRITERIA[criterion]([space], evidence(model, data(model, 2, length=3)))
        assert found.shape == (space.count,)
        assert np.isfinite(found).all()
        assert (found >= 0).all()


REFUSED = {
    ("resized", "surgery"): "what reads it cannot be measured: choose another criterion",
    ("residual_group", "likeness"): "units that several values hold cannot be merged",
    ("residual_group", "surgery"): None,
    ("packed_attention", "surgery"): None,
    ("resized", "change"): None,
    ("convolutions", "likeness"): None,
}


@pytest.mark.parametrize(("name", "criterion"), REFUSED)
def test_criteria_that_look_at_readers_need_to_measure_all_of_them(name, criterion):
    (space,) = cuts(made(name), MODELS[name][0])
    assert unmeasured(space.cut, criterion) == REFUSED[name, criterion]
