from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.passes.fold_batch_norm import FoldBatchNorm

RNG = np.random.default_rng(0)
ROOTS = {
    "conv": ("Conv(x, w{bias})", (6, 4, 3, 3)),
    "conv_grouped": ("Conv<group=2, pads=[1, 1, 1, 1], strides=[2, 2]>(x, w{bias})", (6, 2, 3, 3)),
    "conv_depthwise": ("Conv<group=4>(x, w{bias})", (8, 1, 3, 3)),
    "transposed": ("ConvTranspose<strides=[2, 2]>(x, w{bias})", (4, 6, 3, 3)),
    "transposed_grouped": ("ConvTranspose<group=2>(x, w{bias})", (4, 3, 3, 3)),
    "gemm": ("Gemm<alpha=0.5, beta=3.0>(x, w{bias})", (4, 6)),
    "gemm_transposed": ("Gemm<transB=1>(x, w{bias})", (6, 4)),
}
STATISTICS = ("gamma", "beta", "mean", "variance")


def channels(name: str) -> int:
    shape = ROOTS[name][1]
    axis = {"transposed": 1, "transposed_grouped": 1, "gemm": 1}.get(name, 0)
    return shape[axis] * (2 if name == "transposed_grouped" else 1)


def build(name: str = "conv", bias: bool = True, after: str = "", norm: str = "", extra: str = "") -> ir.Model:
    root, shape = ROOTS[name]
    given, made = ("B, 4", "B, C") if "gemm" in name else ("B, 4, 7, 7", "B, C, H, W")
    body = f"""r = {root.format(bias=", b" if bias else "")}
        y = BatchNormalization<epsilon=0.01{norm}>(r, gamma, beta, mean, variance) {after}"""
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["": 17]> net (float[{given}] x) => (float[{made}] y{extra}) {{ {body} }}'
    )
    numbers = {"w": RNG.standard_normal(shape), "b": RNG.standard_normal(channels(name))}
    numbers |= {key: RNG.random(channels(name)) + 0.1 for key in STATISTICS}
    attach(model, {key: numbers[key] for key in numbers if bias or key != "b"})
    return model


def attach(model: ir.Model, numbers: dict[str, np.ndarray]) -> None:
    """Make initializers of the names that the text leaves open."""
    for key, array in numbers.items():
        tensor = ir.tensor(array.astype(np.float32), name=key)
        value = ir.val(key, tensor.dtype, array.shape, const_value=tensor)
        for node in model.graph.all_nodes():
            for index, given in enumerate(node.inputs):
                if given is not None and given.name == key and given is not value:
                    node.replace_input_with(index, value)
        model.graph.register_initializer(value)


def run(model: ir.Model) -> list[np.ndarray]:
    (given,) = model.graph.inputs
    x = np.random.default_rng(1).standard_normal((2, *given.shape[1:])).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def check_left(model: ir.Model, reasons: list[str]) -> None:
    before = str(model)
    result = FoldBatchNorm()(model)
    assert not result.modified
    assert str(model) == before
    assert [decision.reason for decision in result.decisions] == reasons


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
def test_it_goes_into_the_weights_and_the_numbers_stay(name, bias):
    model = build(name, bias)
    model.graph[0].name, model.graph[1].name = "root", "norm"
    before = run(model)
    result = FoldBatchNorm()(model)
    assert result.modified
    (node,) = model.graph
    assert (node.name, node.outputs[0].name, result.decisions[0].node) == ("root", "y", "norm")
    assert len(model.graph.initializers) == 2
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-4, atol=1e-4)
    assert not FoldBatchNorm()(model).modified


def test_weights_that_another_convolution_reads_are_copied():
    model = build(after="z = Conv(x, w)", extra=", float[B, C, H, W] z")
    weights = model.graph.initializers["w"].const_value.numpy().copy()
    before = run(model)
    assert FoldBatchNorm()(model).modified
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weights)
    for old, new in zip(before, run(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


def test_two_convolutions_that_share_weights_get_their_own():
    second = "s = Conv(x, w) z = BatchNormalization(s, beta, gamma, variance, mean)"
    model = build(after=second, extra=", float[B, C, H, W] z")
    before = run(model)
    assert FoldBatchNorm()(model).modified
    assert ops(model) == {"Conv": 2}
    for old, new in zip(before, run(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("after", "extra"),
    [("z = Neg(r)", ", float[B, C, H, W] z"), ("", ", float[B, C, H, W] r")],
    ids=["another_node", "the_graph"],
)
def test_a_convolution_that_is_read_elsewhere_is_left_alone(after, extra):
    check_left(build(after=after, extra=extra), ["an intermediate is used elsewhere"])


@pytest.mark.parametrize("name", ["w", "b", "gamma", "variance"])
def test_numbers_that_a_caller_can_override_are_left_alone(name):
    model = build()
    model.graph.inputs.append(model.graph.initializers[name])
    check_left(model, ["weights or statistics are not constant"])


def test_training_mode_is_left_alone():
    check_left(build(norm=", training_mode=1"), ["training mode"])


def test_a_variance_below_zero_is_left_alone():
    model = build()
    variance = model.graph.initializers["variance"]
    variance.const_value = ir.tensor(np.full(6, -1, np.float32), name="variance")
    check_left(model, ["the shapes or the variance do not allow it"])


@pytest.mark.parametrize("shape", [(2, 6), (6, 1)])
def test_a_bias_that_differs_from_row_to_row_is_left_alone(shape):
    model = build("gemm")
    model.graph.initializers["b"].const_value = ir.tensor(RNG.random(shape).astype(np.float32), name="b")
    check_left(model, ["the shapes or the variance do not allow it"])


def test_a_normalization_of_something_else_is_not_looked_at():
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]> net (float[B, 2, 4] x) => (float[B, 2, 4] y)
        <float[2] g = {1, 2}> { r = Relu(x) y = BatchNormalization(r, g, g, g, g) }"""
    )
    check_left(model, [])


def test_it_is_folded_in_a_branch():
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]> net (float[B, 1, 3, 3] x) => (float[B, 2, 3, 3] y)
        <float[2, 1, 1, 1] w = {1, 2}, float[2] g = {3, 4}, int64 zero = {0}> {
            size = Size(x) some = Greater(size, zero) y = If(some) <
            then_branch = yes () => (float[B, 2, 3, 3] a) { r = Conv(x, w) a = BatchNormalization(r, g, g, g, g) },
            else_branch = no () => (float[B, 2, 3, 3] c) { c = Conv(x, w) }>
        }"""
    )
    before = run(model)
    assert FoldBatchNorm()(model).modified
    assert "BatchNormalization" not in ops(model)
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5, atol=1e-5)
    assert not FoldBatchNorm()(model).modified
