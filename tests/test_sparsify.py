"""Zeros in weights: which layers get them, where, what stays, and that they outlive quantization."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import Samples, model_from, session

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.sparsify import SPARED, SPARSITY_KEY, Sparsify
from qexport.calibration.statistics.gram import by_tap, measure
from qexport.calibration.statistics.halves import measure_halves
from qexport.calibration.zeros.choice import DENSE, DONE, SHARED
from qexport.calibration.zeros.kernels import Kernel
from qexport.errors import DataInvalid, UsageError
from qexport.exporter.recipe import Recipe, instantiate
from qexport.exporter.recipe_files import override
from qexport.passes.numbers.masks import Pattern, keep_mask, wanda
from qexport.passes.numbers.refit import refit
from qexport.passes.numbers.sparse_gpt import sparse_gpt
from qexport.passes.placement import plan
from qexport.passes.quantize import Quantize
from qexport.passes.target import find_target

CHAIN = "g (float[n, 64] x) => (float[n, 32] y) { h = MatMul(x, w)  r = Relu(h)  y = Gemm <transB = 1> (r, v, b) }"
CONV = """g (float[n, 16, 6, 6] x) => (float[n, 24, 3, 3] y) {
    h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
    y = Conv <kernel_shape = [2, 2], strides = [2, 2]> (h, v) }"""
TWO = Pattern.parse("2:4")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns // 3)) @ np.random.default_rng(99).standard_normal((columns // 3, columns))
    return ((x + 0.2 * rng.standard_normal((rows, columns))) * np.linspace(0.2, 3, columns)).astype(np.float32)


def chain():
    return model_from(CHAIN, w=normal(64, 48), v=normal(32, 48, seed=1), b=normal(32, seed=2))


def rows():
    return Samples({"x": row} for row in correlated(300, 64))


def convs():
    return model_from(CONV, w=normal(20, 16, 3, 3), v=normal(24, 20, 2, 2, seed=1))


def images():
    return Samples({"x": correlated(36, 16, seed).T.reshape(16, 6, 6)} for seed in range(12))


def weight(model, name):
    return model.graph.initializers[name].const_value.numpy()


def output(model, x):
    return session(model).run(None, {"x": x})[0]


def two_of_four(numbers, axis):
    return (np.moveaxis(numbers, axis, -1).reshape(-1, 4) == 0).sum(axis=-1)


def actions(outcome):
    return {d.node or d.op: (d.action, d.reason) for d in outcome.decisions}


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "gradient", "sparsegpt"])
@pytest.mark.parametrize("repair", [True, False])
def test_two_of_every_four_inputs_are_zero_whatever_the_layout_of_the_weight(criterion, repair):
    model = chain()
    assert Sparsify(data=rows(), criterion=criterion, repair=repair, min_dim=0)(model).modified
    assert (two_of_four(weight(model, "w"), 0) == 2).all()
    assert (two_of_four(weight(model, "v"), 1) == 2).all()
    pictures = convs()
    Sparsify(data=images(), criterion=criterion, repair=repair, min_dim=0)(pictures)
    assert (two_of_four(weight(pictures, "w"), 1) == 2).all()  # input channels, at every position of the kernel
    assert (two_of_four(weight(pictures, "v"), 1) == 2).all()


@pytest.mark.parametrize(("per", "criterion"), [(None, "sparsegpt"), ("output", "wanda"), ("layer", "magnitude")])
def test_a_share_of_zeros_is_kept_to_the_number(per, criterion):
    model = chain()
    Sparsify(data=rows(), pattern=0.3, per=per, criterion=criterion)(model)
    for name, inputs in (("w", 64), ("v", 48)):
        zero = weight(model, name) == 0
        assert zero.sum() == (zero.size // inputs * round(0.3 * inputs) if per == "output" else round(0.3 * zero.size))


def test_layers_of_a_model_compete_where_asked_and_need_no_data_without_repair():
    model = chain()
    model.graph.initializers["v"].const_value = ir.tensor(0.1 * weight(model, "v"))
    asked = Sparsify(pattern=0.4, per="model", criterion="magnitude", repair=False)
    assert asked(model).modified
    zeros = [(weight(model, name) == 0).sum() for name in "wv"]
    assert sum(zeros) == round(0.4 * (64 * 48 + 48 * 32))
    assert zeros[1] / (48 * 32) > 2 * zeros[0] / (64 * 48)
    again = asked(model)
    assert not again.modified
    assert {d.reason for d in again.decisions} == {DONE}


def test_a_layer_of_large_numbers_is_left_alone_where_layers_compete():
    model = chain()
    model.graph.initializers["v"].const_value = ir.tensor(100 + np.abs(weight(model, "v")))
    before = weight(model, "v").copy()
    found = Sparsify(data=rows(), pattern=0.5, per="model", criterion="magnitude")(model)
    assert found.modified
    assert [(d.op, d.reason) for d in found.decisions if d.action == "skipped"] == [("Gemm", SPARED)]
    assert np.array_equal(weight(model, "v"), before)


def test_storing_what_is_stored_changes_nothing():
    for model in (chain(), convs()):
        for site in plan(model, find_target("tensorrt-rtx")).roots:
            kernel = Kernel(site)
            before = site.kernel.numpy().copy()
            assert not kernel.store(kernel.matrix())
            assert kernel.store(2 * kernel.matrix())
            assert np.array_equal(site.kernel.numpy(), 2 * before)


def test_what_is_stored_is_what_the_method_says_of_the_rows_that_each_layer_reads():
    model, x = chain(), np.concatenate([sample["x"][None] for sample in rows()]).astype(np.float64)
    dense = {name: np.array(weight(model, name), np.float64) for name in "wv"}
    Sparsify(data=rows(), min_dim=0, ridge=0.01)(model)
    mask, _ = sparse_gpt(dense["w"], x.T @ x, TWO)
    np.testing.assert_allclose(weight(model, "w"), refit(dense["w"], x.T @ x, mask), rtol=1e-3, atol=3e-3)
    read = np.maximum(x @ weight(model, "w"), 0)  # behind the pruned layer
    mask, _ = sparse_gpt(dense["v"].T, read.T @ read, TWO)
    assert (mask == (weight(model, "v").T != 0)).mean() > 0.99
    wanted = refit(dense["v"].T, read.T @ read, weight(model, "v").T != 0)
    np.testing.assert_allclose(weight(model, "v").T, wanted, rtol=1e-3, atol=3e-3)


def test_a_convolution_is_fitted_to_its_output():
    model, data = convs(), images()
    x = np.stack([sample["x"] for sample in data])
    before = output(model, x)
    errors = {}
    for repair in (True, False):
        work = model.clone()
        Sparsify(data=data, criterion="wanda", repair=repair, min_dim=0, keep=("second",))(named(work))
        told = work.graph[0].meta[SPARSITY_KEY]
        hidden = [output(cut(m), x) for m in (model, work)]
        errors[repair] = np.square(hidden[1] - hidden[0]).sum() / np.square(hidden[0]).sum()
        assert told.left == pytest.approx(errors[repair], rel=1e-3)
        assert np.abs(output(work, x) - before).max() > 0
    assert errors[True] < 0.5 * errors[False]


def named(model):
    model.graph[0].name, model.graph[1].name = "first", "second"
    return model


def cut(model):
    """The model up to its first node."""
    work = model.clone()
    work.graph.outputs[0] = work.graph[0].outputs[0]
    work.graph.remove(work.graph[1], safe=False)
    return work


@pytest.mark.parametrize("sequential", [True, False])
def test_later_layers_are_measured_behind_pruned_ones_only_if_asked(sequential):
    model, x = chain(), np.stack([sample["x"] for sample in rows()]).astype(np.float64)
    dense = {name: np.array(weight(model, name), np.float64) for name in "wv"}
    Sparsify(data=rows(), criterion="wanda", repair=False, sequential=sequential, min_dim=0)(model)
    read = {mode: np.maximum(x @ w, 0) for mode, w in ((True, weight(model, "w")), (False, dense["w"]))}
    same = {
        mode: (keep_mask(wanda(dense["v"].T, r.T @ r), TWO, "output") == (weight(model, "v").T != 0)).mean()
        for mode, r in read.items()
    }
    assert same[sequential] > 0.999
    assert same[not sequential] < 0.99


def test_a_second_run_changes_nothing():
    for pattern, criterion, per in (("2:4", "sparsegpt", None), (0.5, "wanda", None), (0.5, "magnitude", "model")):
        model = chain()
        asked = Sparsify(data=rows(), pattern=pattern, criterion=criterion, per=per, min_dim=0)
        assert asked(model).modified
        before = {name: weight(model, name).copy() for name in "wv"}
        again = asked(model)
        assert not again.modified
        assert {d.reason for d in again.decisions} == {DONE}
        assert all(np.array_equal(weight(model, name), before[name]) for name in "wv")


def test_what_stays_dense_says_why():
    text = """g (float[n, 64] x, float[n, 64] z) => (float[n, 64] y) {
        a = MatMul(x, kept)   b = MatMul(a, twice)  c = MatMul(b, twice)  d = MatMul(c, odd)  e = MatMul(d, back)
        f = MatMul(e, small)  h = MatMul(f, wide)   t = Transpose(z)      k = MatMul(h, t)    i = MatMul(k, z)
        y = MatMul(i, bad) }"""
    square, bad = normal(64, 64), normal(64, 64)
    bad[3, 3] = np.inf
    shapes = {"odd": normal(64, 66), "back": normal(66, 64), "small": normal(64, 32), "wide": normal(32, 64)}
    model = model_from(text, kept=square, twice=normal(64, 64, seed=1), bad=bad, **shapes)
    for node in model.graph:
        node.name = node.inputs[-1].name
    found = Sparsify(criterion="magnitude", repair=False, min_dim=32, keep=("kept",))(model)
    reasons = {name: reason for name, (action, reason) in actions(found).items() if action == "skipped"}
    few = "at most 32 inputs or outputs: sparse kernels gain nothing"
    assert reasons == {
        "kept": DENSE,
        "twice": SHARED,
        "back": "its inputs are no multiple of 4",
        "small": few,
        "wide": few,
        "t": "both inputs are computed (attention product)",
        "z": "both inputs are computed (attention product)",
        "bad": "weights are not finite",
    }
    assert (two_of_four(weight(model, "odd"), 0) == 2).all()


def test_few_inputs_or_outputs_are_dense_by_default_for_groups_alone():
    model = chain()
    assert not Sparsify(data=rows())(model).modified
    assert Sparsify(criterion="magnitude", repair=False, pattern=0.5)(model).modified


def test_convolutions_in_groups_and_single_rows_stay_dense():
    text = "g (float[n, 16, 6, 6] x) => (float[n, 16, 6, 6] y) { y = Conv <group = 4, kernel_shape = [1, 1]> (x, w) }"
    (found,) = Sparsify(data=images(), min_dim=0)(model_from(text, w=normal(16, 4, 1, 1))).decisions
    assert found.reason == "a convolution in groups has a Gram matrix for each of them"
    vector = model_from("g (float[1, 64] x) => (float[1, 32] y) { y = MatMul(x, w) }", w=normal(64, 32))
    (found,) = Sparsify(data=rows(), min_dim=0)(vector).decisions
    assert found.reason == "matrix-vector product"


def test_a_layer_that_no_sample_reaches_stays_dense_with_a_reason():
    text = """g (float[n, 64] x, bool[n] keep) => (float y, float z) {
        y = MatMul(x, w)  k = Compress <axis = 0> (x, keep)  z = MatMul(k, v) }"""
    model = model_from(text, w=normal(64, 64), v=normal(64, 32))
    data = Samples({"x": row, "keep": np.array(False)} for row in correlated(40, 64))
    found = Sparsify(data=data, min_dim=0)(model)
    assert [d.reason for d in found.decisions if d.action == "skipped"] == ["not calibrated: no sample reached it"]
    assert not (weight(model, "v") == 0).any()


def test_half_precision_weights_stay_half_and_constants_of_nodes_are_taken_too():
    text = "g (float16[n, 64] x) => (float16[n, 32] y) { y = MatMul(x, w) }"
    model = model_from(text, w=normal(64, 32).astype(np.float16))
    node = ir.node("Constant", [], {"value": model.graph.initializers["w"].const_value})
    held = model.graph.initializers["w"]
    model.graph.insert_before(model.graph[0], node)
    held.replace_all_uses_with(node.outputs[0])
    model.graph.initializers.pop("w")
    data = Samples({"x": row.astype(np.float16)} for row in correlated(100, 64))
    assert Sparsify(data=data, min_dim=0)(model).modified
    (product,) = [node for node in model.graph if node.op_type == "MatMul"]
    stored = product.inputs[1].const_value.numpy()
    assert stored.dtype == np.float16
    assert (two_of_four(stored, 0) == 2).all()


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_the_pattern_is_in_what_is_stored_in_int8(target):
    for model, data, axes in ((chain(), rows(), (0, 1)), (convs(), images(), (1, 1))):
        Sparsify(data=data, min_dim=0)(model)
        Calibrate(data=data, target=target)(model)
        assert Quantize(target=target, min_sqnr=0)(model).modified
        layers = [node for node in model.graph if node.op_type in ("MatMul", "Gemm", "Conv")]
        for node, axis in zip(layers, axes, strict=True):
            numbers = node.inputs[1].producer().inputs[0].const_value.numpy()
            assert numbers.dtype == np.int8
            assert (two_of_four(numbers, axis) >= 2).all()


def test_ranges_behind_a_pruned_layer_are_forgotten_and_those_before_are_not():
    model, data = chain(), rows()
    Calibrate(data=data)(model)
    first, second = (node.inputs[0] for node in model.graph if node.op_type != "Relu")
    assert {"qexport.range"} <= first.meta.keys() & second.meta.keys()
    Sparsify(data=data, min_dim=0)(model)
    assert "qexport.range" in first.meta
    assert "qexport.range" not in second.meta
    assert all(key not in node.meta for node in model.graph for key in ("qexport.kernel", "qexport.sqnr"))


def test_a_quantized_model_is_left_alone():
    model, data = chain(), rows()
    Calibrate(data=data)(model)
    Quantize(min_sqnr=0)(model)
    found = Sparsify(data=data)(model)
    assert not found.modified
    assert [d.reason for d in found.decisions] == ["already quantized"]


def test_bad_samples_are_told_before_anything_is_edited():
    model, data = chain(), rows()
    before = {name: weight(model, name).copy() for name in "wv"}
    data[7] = {"x": np.full(64, np.nan, np.float32)}
    with pytest.raises(DataInvalid, match="sample 7"):
        Sparsify(data=data, min_dim=0)(model)
    assert all(np.array_equal(weight(model, name), before[name]) for name in "wv")
    assert all(SPARSITY_KEY not in node.meta for node in model.graph)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"pattern": "4:2"}, "sparsify.pattern"),
        ({"pattern": "half"}, "sparsify.pattern"),
        ({"pattern": 0.0}, "sparsify.pattern"),
        ({"pattern": 1.0}, "sparsify.pattern"),
        ({"per": "output"}, "sparsify.per"),
        ({"pattern": 0.5, "per": "model"}, "sparsify.per"),
        ({"samples": 0}, "sparsify.samples"),
        ({"min_dim": -1}, "sparsify.min_dim"),
        ({"ridge": -1.0}, "sparsify.ridge"),
        ({"ridge": float("nan")}, "sparsify.ridge"),
    ],
)
def test_bad_options_are_usage_errors_that_say_where_and_what_to_do(options, where):
    with pytest.raises(UsageError) as error:
        Sparsify(**options)
    assert error.value.where == where
    assert error.value.hint


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "needs calibration data"),
        ({"data": [], "keep": ("nothing",)}, "no node is called 'nothing'"),
        ({"data": [], "pattern": 0.9999}, "leave none of 3072 numbers at node"),
        ({"data": [], "pattern": 0.99, "per": "output"}, "leave none of 48 numbers at node"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_sample_runs(options, what):
    model = chain()
    with pytest.raises(UsageError, match=what):
        Sparsify(**options)(model)
    assert not (weight(model, "w") == 0).any()


def test_a_share_of_the_model_that_would_empty_a_layer_is_refused():
    model = chain()
    model.graph.initializers["v"].const_value = ir.tensor(1e-3 * weight(model, "v"))
    with pytest.raises(UsageError, match="leave nothing of node"):
        Sparsify(pattern=0.5, per="model", criterion="magnitude", repair=False)(model)
    assert not (weight(model, "w") == 0).any()


def test_a_recipe_takes_the_pass_and_its_options_as_text():
    bare = Recipe(name="one", step=[{"pass": "sparsify"}])
    recipe = override(bare, ["sparsify.pattern=1:4", "sparsify.repair=false"])
    ((name, step),) = instantiate(recipe, {"data": rows()})
    assert (name, step.wanted, step.repair) == ("sparsify", Pattern(0.75, 4), False)
    share = override(recipe, ["sparsify.pattern=0.6"])
    assert instantiate(share, {"data": rows()})[0][1].wanted == Pattern(0.6)
    with pytest.raises(UsageError, match="above 0 and below 1"):
        instantiate(override(recipe, ["sparsify.pattern=1.5"]), {"data": rows()})


def test_progress_counts_samples_once_however_many_rounds_there_are():
    calls = []
    Sparsify(data=rows(), min_dim=0, advance=lambda: calls.append(1))(chain())
    assert len(calls) == 300


def test_few_samples_are_not_fitted_closer_than_they_are_worth():
    text = "g (float[n, 64] x) => (float[n, 32] y) { y = MatMul(x, w) }"
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((1000, 20)) @ rng.standard_normal((20, 64)) + rng.standard_normal((1000, 64)) * 2).astype(
        "f"
    )
    lost = {}
    for ridge in (None, 1e-6):
        model = model_from(text, w=normal(64, 32))
        before = output(model, x[80:])
        Sparsify(data=Samples({"x": row} for row in x[:80]), ridge=ridge, min_dim=0)(model)
        lost[ridge] = np.square(output(model, x[80:]) - before).mean()
    assert lost[None] < 0.8 * lost[1e-6]


def test_two_halves_of_the_samples_are_measured_in_one_run():
    model, data, calls = chain(), rows(), []
    taps, _ = by_tap(plan(model, find_target("tensorrt-rtx")).roots)
    whole = measure(model, list(taps), data)
    for tap, halves in measure_halves(model, list(taps), data, lambda: calls.append(1)).items():
        assert [half.rows for half in halves] == [150, 150]
        both = halves[0].hessian + halves[1].hessian
        np.testing.assert_allclose(both, whole[tap].hessian, rtol=1e-4, atol=1e-4 * np.abs(both).max())
        assert not np.allclose(halves[0].hessian, halves[1].hessian, rtol=1e-3)
    assert len(calls) == 300


def test_a_share_that_leaves_outputs_empty_but_no_layer_is_done():
    model = chain()
    assert Sparsify(data=rows(), pattern=0.99)(model).modified
    assert (weight(model, "w") == 0).sum() == round(0.99 * 64 * 48)
