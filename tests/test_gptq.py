import tracemalloc
from itertools import islice

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import Samples
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.few_bits import UNSEEN, every
from qexport.calibration.gptq import ROUNDING_KEY, Gptq
from qexport.calibration.reading.data import open_dataset
from qexport.calibration.reading.spec import DataSpec, input_specs
from qexport.calibration.statistics.gram import by_tap, grams
from qexport.errors import UsageError
from qexport.exporter.load import load_source
from qexport.passes.numbers.gptq import Rounding, gptq, inverse_factor
from qexport.passes.numbers.groups import Grid, as_matrix, codes_of, decode, encode, quantize_groups, scales_for
from qexport.passes.weight_only import WeightOnly
from qexport.passes.writing.lowbit import Choice
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions

RNG = np.random.default_rng(0)
CHAIN = "g (float[n, s, 64] x) => (float[n, s, 32] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
GRIDS = [Grid(4, 8), Grid(3, 4, symmetric=False), Grid(3), Grid(8, 12)]


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def correlated(rows, columns, seed=0):
    """Rows whose columns depend on each other and differ in size, as those of real activations do."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns // 3, columns)) + 0.3 * rng.standard_normal((columns // 3, columns))
    x = rng.standard_normal((rows, columns // 3)) @ mix + 0.2 * rng.standard_normal((rows, columns))
    return (x * rng.lognormal(0, 1, columns)).astype(np.float32)


def dataset(count=30, columns=64):
    return Samples({"x": correlated(10, columns, seed)} for seed in range(count))


def model_from(text=CHAIN, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for name, array in (weights or {"w": normal(64, 48), "v": normal(48, 32)}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def output(model, x):
    literal = SessionOptions(optimize=False)  # what int4 weights are fused with may round the activations as well
    return OrtSession(ir.to_proto(model).SerializeToString(), literal).run({"x": x[None]})["y"][0]


def damped(hessian, share=0.01):
    return hessian + share * np.diag(hessian).mean() * np.eye(len(hessian))


def by_least_squares(weight, hessian, grid, act_order):
    """GPTQ from its definition: whenever an input is rounded, the others are solved for anew, from the float weight.

    With the gap D_q of the rounded inputs fixed, the least tr(D^T H D) is at D_r = -H_rr^-1 H_rq D_q.
    """
    k, n = weight.shape
    size = grid.rows(k)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(k)
    now, found = weight.astype(np.float64), np.zeros((k, n))
    static = [scales_for(weight[i : i + size], grid) for i in range(0, k, size)]
    values = np.zeros((k, n), np.int8)
    for step, row in enumerate(order):
        group = row // size
        if not act_order and row % size == 0:
            static[group] = scales_for(now[row : row + size].astype(np.float32), grid)
        scale, zero = static[group]
        values[row] = encode(now[row].astype(np.float32), scale, zero, grid)
        found[row] = decode(values[row], scale, zero)
        fixed, rest = order[: step + 1], order[step + 1 :]
        gap = weight[fixed] - found[fixed]
        now[rest] = weight[rest] + np.linalg.solve(hessian[np.ix_(rest, rest)], hessian[np.ix_(rest, fixed)] @ gap)
    return values


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(GRIDS), st.booleans(), st.sampled_from([1, 5, 8, 128]))
def test_codes_are_those_of_solving_for_all_other_inputs_anew(seed, grid, act_order, block):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((24, 6)).astype(np.float32)
    x = correlated(200, 24, seed).astype(np.float64)
    found = gptq(weight, x.T @ x, grid, Rounding(act_order=act_order, block=block))
    wanted = by_least_squares(weight, damped(x.T @ x), grid, act_order)
    assert (found.values != wanted).mean() < 0.02  # a tie may fall either way


def test_the_factor_is_that_of_the_inverse():
    x = correlated(100, 20).astype(np.float64)
    factor = inverse_factor(x.T @ x, 0.01)
    assert np.array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ damped(x.T @ x), np.eye(20), atol=1e-6)


def test_without_correlations_every_weight_is_rounded_to_the_nearest():
    weight = normal(32, 8)
    found = gptq(weight, np.diag(RNG.random(32) + 0.1), Grid(4, 16))
    assert np.array_equal(found.values, quantize_groups(weight, Grid(4, 16)).values)


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, 16, symmetric=False), Grid(4)])
@pytest.mark.parametrize("act_order", [True, False])
def test_fewer_bits_cost_less_than_half_of_what_the_nearest_codes_do(grid, act_order):
    x, weight = correlated(500, 64).astype(np.float64), normal(64, 24)
    found = gptq(weight, x.T @ x, grid, Rounding(act_order=act_order))
    errors = [np.square(x @ (weight - c.dequantize())).sum() for c in (found, quantize_groups(weight, grid))]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_hessian_is_damped_until_it_can_be_factorized(damping):
    x, weight = normal(5, 32).astype(np.float64), normal(32, 8)
    found = gptq(weight, x.T @ x, Grid(4, 16), Rounding(damping=damping))
    nearest = quantize_groups(weight, Grid(4, 16))
    errors = [np.square(x @ (weight - c.dequantize())).sum() for c in (found, nearest)]
    assert errors[0] < errors[1]


def test_inputs_that_nothing_went_through_are_rounded_to_the_nearest_and_move_no_other():
    x, weight = correlated(300, 32).astype(np.float64), normal(32, 8)
    dead = np.isin(np.arange(32), [0, 7, 31])
    x[:, dead] = 0
    weight[dead] *= 0.1  # so that they do not decide the scales
    found = gptq(weight, x.T @ x, Grid(4), Rounding(damping=0.0))
    assert np.array_equal(found.values[dead], quantize_groups(weight, Grid(4)).values[dead])
    alone = gptq(weight[~dead], x[:, ~dead].T @ x[:, ~dead], Grid(4), Rounding(damping=0.0))
    assert np.array_equal(found.values[~dead], alone.values)
    assert np.isfinite(gptq(weight, np.zeros((32, 32)), Grid(4)).dequantize()).all()


def test_half_precision_scales_are_numbers_of_float16():
    x = correlated(100, 32).astype(np.float64)
    found = gptq(normal(32, 8), x.T @ x, Grid(4, 16), Rounding(half=True))
    assert np.array_equal(found.scale, found.scale.astype(np.float16))


def test_every_layer_of_a_decoder_loses_less_than_by_rounding_to_the_nearest(samples):
    source = load_source(samples / "decoder/stories260k")
    spec = DataSpec(max_length=128)
    text = samples / "decoder/calibration.txt"
    data = list(islice(open_dataset(text, input_specs(source.model), spec, tokenizer=source.tokenizer), 6))
    sites, _ = Choice().linears(source.model)
    taps, _ = by_tap(sites)
    assert len(sites) == 36
    for tap, gram in grams(source.model, taps, data):
        for site in taps[tap]:
            weight, grid = as_matrix(site), Grid(4)
            found = gptq(weight, gram.hessian, grid)
            nearest = quantize_groups(weight, grid)
            assert gram.error(weight - found.dequantize()) < 0.9 * gram.error(weight - nearest.dequantize())


def test_the_model_keeps_its_weights_and_weight_only_stores_the_codes():
    model, data = model_from(), dataset()
    before = output(model, data[0]["x"])
    assert Gptq(data=data, target="ort-cpu", group=16)(model).modified
    assert np.array_equal(output(model, data[0]["x"]), before)
    first, second = (codes_of(node.inputs[1]) for node in model.graph if node.op_type == "MatMul")
    WeightOnly(target="ort-cpu", format="dequantize", group=32)(model)
    wanted = np.maximum(data[0]["x"] @ first.dequantize(), 0) @ second.dequantize()
    np.testing.assert_allclose(output(model, data[0]["x"]), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sequential", [True, False])
def test_later_products_are_measured_behind_rounded_ones_only_if_asked(sequential):
    model, data = model_from(), dataset()
    Gptq(data=data, group=16, bits=3, sequential=sequential)(model)
    first, second = (codes_of(node.inputs[1]) for node in model.graph if node.op_type == "MatMul")
    w, v = (model.graph.initializers[name].const_value.numpy() for name in "wv")
    x = np.concatenate([sample["x"] for sample in data])
    read = {
        mode: np.maximum(x @ kernel, 0).astype(np.float64) for mode, kernel in ((True, first.dequantize()), (False, w))
    }
    same = {
        mode: gptq(v, r.T @ r, Grid(3, 16), Rounding(half=True)).values == second.values for mode, r in read.items()
    }
    assert same[sequential].mean() > 0.98
    assert same[not sequential].mean() < 0.98


def test_a_second_run_changes_nothing_and_other_options_do():
    model, data = model_from(), dataset()
    assert Gptq(data=data, group=16)(model).modified
    assert not Gptq(data=data, group=16)(model).modified
    assert Gptq(data=data, group=16, act_order=False)(model).modified


def test_products_of_one_value_are_rounded_together_as_they_would_be_alone():
    text = "g (float[n, 64] x) => (float y, float z) { y = MatMul(x, w)  z = Gemm <transB = 1> (x, v) }"
    weights, data = {"w": normal(64, 48), "v": normal(32, 64)}, Samples({"x": row} for row in correlated(120, 64))
    both = model_from(text, **weights)
    Gptq(data=data, group=16)(both)
    for name in weights:
        (site,) = [s for s in Choice().linears(both)[0] if s.node.inputs[1].name == name]
        ((_, gram),) = grams(both, by_tap([site])[0], data)
        alone = gptq(as_matrix(site), gram.hessian, Grid(4, 16), Rounding(half=True))
        assert np.array_equal(codes_of(site.node.inputs[1]).values, alone.values)


def test_the_gain_is_told_for_every_product():
    model, data = model_from(), dataset()
    decisions = Gptq(data=data, group=16)(model).decisions
    assert [d.action for d in decisions] == ["rounded", "rounded"]
    x, node = np.concatenate([sample["x"] for sample in data]), model.graph[0]
    w, error = as_matrix(Choice().linears(model)[0][0]), node.meta[ROUNDING_KEY]
    for codes, told in (
        (codes_of(node.inputs[1]), error.chosen),
        (quantize_groups(w, Grid(4, 16), half=True), error.nearest),
    ):
        assert told == pytest.approx(np.square(x @ (w - codes.dequantize())).sum() / np.square(x @ w).sum(), rel=1e-3)
    assert f"{10 * np.log10(error.nearest / error.chosen):.0f} dB" in decisions[0].reason


def test_what_cannot_be_measured_is_left_to_rounding_to_the_nearest_with_a_reason():
    text = """g (float[n, 64] x, bool[n] keep) => (float y, float z, float u) {
        y = MatMul(x, w)  z = MatMul(y, w)  k = Compress <axis = 0> (x, keep)  u = MatMul(k, v) }"""
    model = model_from(text, w=normal(64, 64), v=normal(64, 32))
    data = Samples({"x": normal(64), "keep": np.array(False)} for _ in range(3))
    reasons = [d.reason for d in Gptq(data=data, group=16)(model).decisions]
    assert sorted(reasons) == sorted(["several products read its weight"] * 2 + [UNSEEN])


def test_a_group_that_does_not_divide_is_refused_or_made_smaller_before_anything_is_measured():
    model = model_from()
    with pytest.raises(UsageError, match="does not divide the 48 inputs of node"):
        Gptq(data=Samples([{"x": np.full((1, 64), np.nan, np.float32)}]), group=32)(model)
    Gptq(data=dataset(), group=32, fit=True)(model)
    assert [codes_of(node.inputs[1]).grid.group for node in model.graph if node.op_type == "MatMul"] == [32, 16]


def test_no_data_and_bad_options_are_usage_errors():
    with pytest.raises(UsageError, match="calibration data"):
        Gptq()(model_from())
    for wrong in ({"damping": -0.1}, {"damping": float("nan")}, {"samples": 0}, {"group": -1}):
        with pytest.raises((UsageError, ValueError), match=next(iter(wrong))):
            Gptq(**wrong)
    with pytest.raises(UsageError, match="no node is called"):
        Gptq(data=dataset(), keep=("nothing",))(model_from())


def test_progress_counts_samples_once_however_many_rounds_there_are():
    calls = []
    Gptq(data=dataset(6), group=16, advance=lambda: calls.append(1))(model_from())
    assert len(calls) == 6
    tick = every(3, lambda: calls.append(1))
    for _ in range(8):
        tick()
    assert len(calls) == 8


def test_memory_is_flat_in_the_number_of_samples():
    class Stream(Samples):
        def __init__(self, count):
            self.count = count

        def __iter__(self):
            return ({"x": correlated(40, 64, seed)} for seed in range(self.count))

    def peak(count):
        tracemalloc.start()
        Gptq(data=Stream(count), group=16, samples=count)(model_from())
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(10)
    assert peak(120) < 1.3 * peak(40)


def test_weight_only_halves_a_group_until_it_divides_if_asked():
    model = model_from(w=normal(64, 176), v=normal(176, 48))
    WeightOnly(target="ort-cpu", format="dequantize", group=128, fit=True)(model)
    blocks = [n.attributes["block_size"].value for n in model.graph if n.op_type == "DequantizeLinear"]
    assert sorted(blocks) == [16, 64]
    odd = model_from(w=normal(64, 40), v=normal(40, 48))
    with pytest.raises(UsageError, match="does not divide the 40 inputs"):
        WeightOnly(target="ort-cpu", group=16, fit=True)(odd)
    with pytest.raises(UsageError, match="group 24 does not divide the 64 inputs"):
        WeightOnly(target="ort-cpu", group=24, fit=True)(odd)


def test_few_inputs_that_no_group_divides_share_a_scale_if_asked():
    model = model_from(w=normal(64, 172), v=normal(172, 48))
    WeightOnly(target="tensorrt-rtx", format="dequantize", group=128, fit=True)(model)
    scales = {n.inputs[0].name: tuple(n.inputs[1].shape) for n in model.graph if n.op_type == "DequantizeLinear"}
    assert sorted(scales.values()) == [(1, 172), (48,)]  # groups of 64 for 64 inputs, one for each column of 172
