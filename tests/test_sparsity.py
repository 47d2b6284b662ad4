"""Zeros are found in what is stored, however it is stored, and groups of 4 lie along the inputs."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import Samples, call, model_from, session
from hypothesis import given, settings
from hypothesis import strategies as st

import qexport
from qexport.calibration.calibrate import Calibrate
from qexport.calibration.sparsify import Sparsify
from qexport.errors import BuildFailed
from qexport.exporter.looking.sparsity import zeros_of
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import load_recipe, override
from qexport.passes.pipeline import run
from qexport.passes.quantize import Quantize
from qexport.passes.weight_only import WeightOnly

PRODUCT = "g (float[n, 16] x) => (float[n, 8] y) { y = MatMul(x, w) }"


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sparse(*shape, axis, seed=0):
    """Numbers of which the first and third of every 4 along ``axis`` are zero."""
    numbers = normal(*shape, seed=seed)
    np.moveaxis(numbers, axis, 0)[0::2] = 0
    return numbers


def one(model):
    (found,) = zeros_of(model)
    return found


LAYERS = {
    "MatMul": ("g (float[n, 16] x) => (float y) { y = MatMul(x, w) }", (16, 8), 0),
    "Gemm": ("g (float[n, 16] x) => (float y) { y = Gemm(x, w) }", (16, 8), 0),
    "transB": ("g (float[n, 16] x) => (float y) { y = Gemm <transB = 1> (x, w) }", (8, 16), 1),
    "batched": ("g (float[2, n, 16] x) => (float y) { y = MatMul(x, w) }", (2, 16, 8), 1),
    "Conv": ("g (float[n, 16, 6, 6] x) => (float y) { y = Conv(x, w) }", (8, 16, 3, 3), 1),
    "ConvTranspose": ("g (float[n, 16, 6, 6] x) => (float y) { y = ConvTranspose(x, w) }", (16, 8, 3, 3), 0),
    "Transpose": ("g (float[n, 16] x) => (float y) { t = Transpose(w)  y = MatMul(x, t) }", (8, 16), 1),
    "Reshape": ("g (float[n, 16] x) => (float y) { t = Reshape(w, s)  y = MatMul(x, t) }", (4, 4, 8), 1),
    "Cast": ("g (float16[n, 16] x) => (float16 y) { t = Cast <to = 10> (w)  y = MatMul(x, t) }", (16, 8), 0),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_groups_lie_along_the_inputs_of_every_layer(kind):
    text, shape, axis = LAYERS[kind]
    more = {"s": np.array([-1, 8])} if kind == "Reshape" else {}
    found = one(model_from(text, w=sparse(*shape, axis=axis), **more))
    assert (found.tensor, found.zeros, found.groups, found.two_of_four) == ("w", 0.5, 1.0, True)
    other = next(i for i in range(len(shape)) if i != axis)
    crossed = np.zeros(shape, np.float32)
    np.moveaxis(crossed, other, 0)[: shape[other] // 2] = normal(*np.moveaxis(crossed, other, 0).shape)[
        : shape[other] // 2
    ]
    if kind != "Reshape":
        assert not one(model_from(text, w=crossed, **more)).two_of_four


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_shares_are_those_of_counting_by_hand(seed, ratio):
    weight = np.where(np.random.default_rng(seed).random((16, 8)) < ratio, 0, 1).astype(np.float32)
    found = one(model_from(PRODUCT, w=weight))
    columns = [weight[start : start + 4, n] for n in range(8) for start in range(0, 16, 4)]
    assert found.zeros == pytest.approx((weight == 0).mean())
    assert found.groups == pytest.approx(np.mean([(part == 0).sum() >= 2 for part in columns]))


def test_one_number_too_many_breaks_the_pattern():
    weight = sparse(400, 400, axis=0)
    weight[0, 0] = 1e-20
    found = one(model_from("g (float[n, 400] x) => (float y) { y = MatMul(x, w) }", w=weight))
    assert not found.two_of_four
    assert found.groups == 1 - 1 / 40000


def test_inputs_that_4_does_not_divide_have_no_groups():
    text = "g (float[n, 6] x) => (float y) { y = MatMul(x, w) }"
    found = one(model_from(text, w=np.zeros((6, 8), np.float32)))
    assert (found.zeros, found.groups, found.two_of_four) == (1.0, None, False)


@pytest.mark.parametrize("zero", [0, 7])
def test_integers_are_zero_where_they_are_their_zero_point(zero):
    codes = np.where(sparse(16, 8, axis=0) == 0, zero, 50).astype(np.int8)
    text = "g (float[n, 16] x) => (float y) { d = DequantizeLinear <axis = 1> (w, s, z)  y = MatMul(x, d) }"
    found = one(model_from(text, w=codes, s=np.ones(8, np.float32), z=np.full(8, zero, np.int8)))
    assert (found.tensor, found.stored, found.zeros, found.two_of_four) == ("w", "int8", 0.5, True)
    other = one(model_from(text, w=codes, s=np.ones(8, np.float32), z=np.arange(8, dtype=np.int8) + 10))
    assert other.zeros == 0


def test_zero_points_of_blocks_count_for_their_block():
    codes = np.repeat(np.array([3, 3, 9, 9], np.uint8), 4)[:, None] * np.ones((1, 8), np.uint8)
    text = (
        "g (float[n, 16] x) => (float y) { d = DequantizeLinear <axis = 0, block_size = 8> (w, s, z) y = MatMul(x, d) }"
    )
    origin = np.stack([np.full(8, 3, np.uint8), np.full(8, 4, np.uint8)])
    found = one(model_from(text, opset=21, w=codes, s=np.ones((2, 8), np.float32), z=origin))
    assert (found.zeros, found.groups) == (0.5, 0.5)


@pytest.mark.parametrize("name", ["MatMulInteger", "QLinearMatMul", "ConvInteger"])
def test_integer_operators_are_looked_into(name):
    texts = {
        "MatMulInteger": "g (uint8[n, 16] x) => (int32 y) { y = MatMulInteger(x, w, p, z) }",
        "QLinearMatMul": "g (uint8[n, 16] x) => (uint8 y) { y = QLinearMatMul(x, s, p, w, s, z, s, p) }",
        "ConvInteger": "g (uint8[n, 16, 4, 4] x) => (int32 y) { y = ConvInteger(x, w, p, z) }",
    }
    shape, axis = ((8, 16, 3, 3), 1) if "Conv" in name else ((16, 8), 0)
    codes = np.where(sparse(*shape, axis=axis) == 0, 128, 3).astype(np.uint8)
    found = one(model_from(texts[name], w=codes, s=np.float32(1), p=np.uint8(5), z=np.uint8(128)))
    assert (found.op, found.stored, found.zeros, found.two_of_four) == (name, "uint8", 0.5, True)


def test_weights_that_are_computed_or_given_are_not_told_of():
    text = (
        "g (float[n, 16] x, float[16, 8] w) => (float y, float z) { r = Relu(v)  y = MatMul(x, w)  z = MatMul(x, r) }"
    )
    assert zeros_of(model_from(text, v=normal(16, 8))) == []


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_a_sparse_model_is_still_sparse_in_int8(target):
    text = "g (float[n, 64] x) => (float[n, 32] y) { h = MatMul(x, w)  r = Relu(h)  y = Gemm <transB = 1> (r, v) }"
    model = model_from(text, w=normal(64, 48), v=normal(32, 48, seed=1))
    data = Samples({"x": row} for row in normal(200, 64, seed=2))
    Sparsify(data=data, min_dim=0)(model)
    steps = override(load_recipe("int8"), [f"export.target={target}", "quantize.min_sqnr=0", "triage.enabled=false"])
    model, _ = run(model, instantiate(steps, {"data": data}))
    found = zeros_of(model)
    assert [row.stored for row in found] == ["int8", "int8"]
    assert all(row.two_of_four and row.zeros >= 0.5 for row in found)
    assert np.isfinite(session(model).run(None, {"x": normal(3, 64)})[0]).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sparse_model_is_still_sparse_in_4_bits(symmetric):
    model = model_from(PRODUCT.replace("8]", "32]").replace("16]", "64]"), opset=21, w=sparse(64, 32, axis=0))
    WeightOnly(target="ort-cpu", format="dequantize", group=32, symmetric=symmetric)(model)
    found = one(model)
    assert found.stored in ("int4", "uint4")
    assert found.two_of_four


def test_dense_models_are_not_sparse():
    model = model_from(PRODUCT, w=normal(16, 8))
    data = Samples({"x": row} for row in normal(50, 16, seed=2))
    Calibrate(data=data)(model)
    Quantize(min_sqnr=0)(model)
    found = one(model)
    assert not found.two_of_four
    assert found.groups < 0.1


@pytest.fixture
def path(tmp_path):
    text = "g (float[n, 16] x) => (float[n, 8] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    model = model_from(text, w=sparse(16, 6, axis=0), v=normal(6, 8))
    model.graph[0].name, model.graph[1].name = "first", "second"
    path = tmp_path / "model.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(str(path))
    return str(path)


def test_the_command_lists_every_weight_and_counts_those_that_are_2_of_4(capsys, path):
    code, out, _ = call(capsys, "inspect", path, "--sparsity")
    assert code == 0
    (first,) = [line.split() for line in out.splitlines() if line.strip().startswith("w ")]
    assert first == ["w", "first", "MatMul", "float32", "[16,", "6]", "50.0", "%", "100.0", "%", "yes"]
    (second,) = [line.split() for line in out.splitlines() if line.strip().startswith("v ")]
    assert second[-5:] == ["4", "does", "not", "divide", "no"]
    assert "1 of 2 weights are 2:4" in out
    assert "2:4" not in call(capsys, "inspect", path)[1]


def test_json_has_the_same(capsys, path):
    told = json.loads(call(capsys, "inspect", path, "--sparsity", "--json")[1])
    assert told["schema"] == "qexport.inspect/1"
    assert told["sparsity"][0] == {
        "tensor": "w",
        "node": "first",
        "op": "MatMul",
        "stored": "float32",
        "shape": [16, 6],
        "zeros": 0.5,
        "groups": 1.0,
        "two_of_four": True,
    }
    assert told["sparsity"][1]["groups"] is None
    assert "sparsity" not in json.loads(call(capsys, "inspect", path, "--json")[1])


@pytest.mark.parametrize("pattern", [True, False])
def test_an_engine_may_use_sparse_kernels_where_a_stored_weight_is_2_4(tmp_path, monkeypatch, pattern):
    w = normal(64, 64)
    if pattern:
        w[0::4] = w[1::4] = 0
    model = model_from("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul(x, w) }", opset=21, w=w)
    ir.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "x.npz", x=normal(40, 64, seed=1))
    asked = []

    def engine(_model, _module, options, _plan):
        asked.append(options.sparse)
        raise BuildFailed("enough is known")

    monkeypatch.setattr("qexport.exporter.build.build_in_child", engine)
    with pytest.raises(BuildFailed, match="enough"):
        qexport.build(
            tmp_path / "model.onnx",
            calib=tmp_path / "x.npz",
            target="tensorrt-rtx",
            options=qexport.BuildOptions(output=tmp_path / "out"),
        )
    assert asked == [pattern]
