import itertools
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.passes.base import Pass
from qexport.passes.fuse_layer_norm import FuseLayerNorm
from qexport.passes.fuse_rms_norm import FuseRMSNorm

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
CONSTANTS = """float two = {2.0}, float one = {1.0}, float half = {0.5}, float minus_half = {-0.5},
    float eps = {0.00001}, int64[1] last = {-1}, int64[1] middle = {1},
    float[8] gamma = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] beta = {8, 7, 6, 5, 4, 3, 2, 1}, float[1] narrow = {3.0}"""
INVERSES = {
    "div": "s = Sqrt(e) n = Div({d}, s)",
    "reciprocal": "s = Sqrt(e) r = Reciprocal(s) n = Mul({d}, r)",
    "one_over": "s = Sqrt(e) r = Div(one, s) n = Mul(r, {d})",
    "pow": "r = Pow(e, minus_half) n = Mul({d}, r)",
    "pow_root": "p = Pow(e, half) n = Div({d}, p)",
}
SQUARES = {"pow": "q = Pow({d}, two)", "mul": "q = Mul({d}, {d})"}
AFFINES = {
    "plain": "y = Identity(n)",
    "gamma": "y = Mul(n, gamma)",
    "gamma_first": "y = Mul(gamma, n)",
    "both": "g = Mul(n, gamma) y = Add(g, beta)",
    "both_first": "g = Mul(gamma, n) y = Add(beta, g)",
    "beta": "y = Add(n, beta)",
}


def build(body: str, opset: int = 23, outputs: str = "float[B, S, 8] y") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["": {opset}]>
    net (float[B, S, 8] x) => ({outputs}) <{CONSTANTS}> {{ {body.strip()} }}"""
    return ir.from_onnx_text(text)


def center(d: str = "d") -> str:
    return f"m = ReduceMean(x, last) {d} = Sub(x, m) "


def core(d: str, square: str = "mul", inverse: str = "div") -> str:
    body = f"{SQUARES[square]} v = ReduceMean(q, last) e = Add(v, eps) {INVERSES[inverse]} "
    return body.format(d=d)


def run(model: ir.Model) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def check_fused(model: ir.Model, step: Pass, op: str, count: int = 1) -> None:
    before = run(model)
    result = step(model)
    assert result.modified
    assert [decision.action for decision in result.decisions].count("fused") == count
    assert ops(model)[op] == count
    assert "ReduceMean" not in ops(model)
    for old, new in zip(before, run(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    assert not step(model).modified


def check_left(model: ir.Model, step: Pass, reason: str | None) -> None:
    before = str(model)
    result = step(model)
    assert not result.modified
    assert str(model) == before
    assert [decision.reason for decision in result.decisions] == ([] if reason is None else [reason])
    assert all(decision.action == "skipped" for decision in result.decisions)


@pytest.mark.parametrize(("square", "inverse", "affine"), list(itertools.product(SQUARES, INVERSES, AFFINES)))
def test_every_spelling_of_layer_norm_is_fused(square, inverse, affine):
    body = center() + core("d", square, inverse) + AFFINES[affine]
    check_fused(build(body), FuseLayerNorm(), "LayerNormalization")


@pytest.mark.parametrize(
    ("square", "inverse", "affine"), list(itertools.product(SQUARES, INVERSES, ("gamma", "gamma_first")))
)
def test_every_spelling_of_rms_norm_is_fused(square, inverse, affine):
    check_fused(build(core("x", square, inverse) + AFFINES[affine]), FuseRMSNorm(), "RMSNormalization")


def test_the_fused_node_and_its_output_keep_the_names_of_the_last_ones():
    model = build(center() + core("d") + AFFINES["both"])
    model.graph[-1].name = "encoder/norm"
    FuseLayerNorm()(model)
    (node,) = model.graph
    assert (node.name, node.outputs[0].name, node.op_type) == ("encoder/norm", "y", "LayerNormalization")
    assert set(model.graph.initializers) >= {"gamma", "beta"}
    assert "eps" not in model.graph.initializers


def test_axes_as_an_attribute_and_a_positive_axis_are_read():
    body = (center() + core("d")).replace("ReduceMean(x, last)", "ReduceMean<axes=[2]>(x)")
    body = body.replace("ReduceMean(q, last)", "ReduceMean<axes=[-1], keepdims=1>(q)") + "y = Identity(n)"
    check_fused(build(body, opset=17), FuseLayerNorm(), "LayerNormalization")


def test_a_norm_over_the_last_two_axes_needs_both_sizes():
    two = "int64[2] both = {-2, -1}, float eps = {0.00001}"
    body = core("d").replace("last", "both").replace("y = ", "")
    text = f"""<ir_version: 10, opset_import: ["": 23]> net (float[2, S, 8] x) => (float[2, S, 8] n) <{two}>
    {{ m = ReduceMean(x, both) d = Sub(x, m) {body} }}"""
    check_fused(ir.from_onnx_text(text.replace("S,", "3,")), FuseLayerNorm(), "LayerNormalization")
    check_left(ir.from_onnx_text(text), FuseLayerNorm(), "the normalized sizes are not known")


LAYER_NORM = center() + core("d") + "y = Identity(n)"
NEAR_MISSES = {
    "mean_over_another_axis": LAYER_NORM.replace("ReduceMean(x, last)", "ReduceMean(x, middle)"),
    "both_means_over_another_axis": LAYER_NORM.replace("last", "middle"),
    "variance_without_its_axis": LAYER_NORM.replace("ReduceMean(q, last)", "ReduceMean(q)"),
    "mean_without_its_axis": LAYER_NORM.replace("ReduceMean(x, last)", "ReduceMean<keepdims=0>(x, last)"),
    "cubed": LAYER_NORM.replace("q = Mul(d, d)", "q = Pow(d, eps)"),
    "square_of_x": LAYER_NORM.replace("q = Mul(d, d)", "q = Mul(x, x)"),
    "epsilon_outside_the_root": LAYER_NORM.replace("e = Add(v, eps) s = Sqrt(e)", "e = Sqrt(v) s = Add(e, eps)"),
    "epsilon_not_constant": LAYER_NORM.replace("Add(v, eps)", "Add(v, m)"),
    "no_epsilon": LAYER_NORM.replace("e = Add(v, eps) s = Sqrt(e)", "s = Sqrt(v)"),
    "two_over_the_root": center() + core("d", inverse="one_over").replace("Div(one", "Div(two") + "y = Identity(n)",
    "upside_down": LAYER_NORM.replace("Div(d, s)", "Div(s, d)"),
    "mean_minus_x": LAYER_NORM.replace("Sub(x, m)", "Sub(m, x)"),
    "not_centered": core("x") + "y = Identity(n)",
}


@pytest.mark.parametrize("body", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_what_only_looks_like_layer_norm_is_not_touched(body):
    check_left(build(body), FuseLayerNorm(), None)


@pytest.mark.parametrize("inner", ["m", "d", "q", "v", "e", "s"])
def test_an_inner_value_that_the_graph_returns_keeps_layer_norm_apart(inner):
    model = build(LAYER_NORM, outputs=f"float[B, S, 8] y, float[B, S, K] {inner}")
    check_left(model, FuseLayerNorm(), "an intermediate is used elsewhere")


def test_an_inner_value_that_another_node_reads_keeps_layer_norm_apart():
    model = build(LAYER_NORM + " z = Neg(d)", outputs="float[B, S, 8] y, float[B, S, 8] z")
    check_left(model, FuseLayerNorm(), "an intermediate is used elsewhere")


def test_a_shared_normalized_value_is_fused_without_the_affine_parts():
    body = center() + core("d") + "y = Mul(n, gamma) z = Mul(n, beta)"
    model = build(body, outputs="float[B, S, 8] y, float[B, S, 8] z")
    check_fused(model, FuseLayerNorm(), "LayerNormalization")
    assert ops(model)["Mul"] == 2


def test_a_factor_of_another_width_stays_outside():
    model = build(center() + core("d") + "y = Mul(n, narrow)")
    check_fused(model, FuseLayerNorm(), "LayerNormalization")
    assert ops(model) == {"LayerNormalization": 1, "Mul": 1}


def test_an_epsilon_that_a_caller_can_override_is_no_constant():
    model = build(LAYER_NORM)
    model.graph.inputs.append(model.graph.initializers["eps"])
    check_left(model, FuseLayerNorm(), None)


@pytest.mark.parametrize(("step", "need"), [(FuseLayerNorm(), 17), (FuseRMSNorm(), 23)], ids=["layer", "rms"])
def test_an_opset_that_lacks_the_operator_is_a_decision(step, need):
    body = (LAYER_NORM if need == 17 else core("x") + AFFINES["gamma"]).replace(", last)", ")")
    body = body.replace("ReduceMean(", "ReduceMean<axes=[-1]>(")
    check_left(build(body, opset=16), step, f"needs opset {need}, model has 16")


@pytest.mark.parametrize(("dtype", "epsilon"), [("float16", 1), ("double", 0.001)])
def test_another_precision_than_float32_is_left_as_it_was_computed(dtype, epsilon):
    text = f"""<ir_version: 10, opset_import: ["": 23]> net ({dtype}[B, 8] x) => ({dtype}[B, 8] n)
    <{dtype} eps = {{{epsilon}}}, int64[1] last = {{-1}}> {{ {center()} {core("d")} }}"""
    check_left(ir.from_onnx_text(text), FuseLayerNorm(), f"computed in {dtype}")


def half(inside: str, gamma: str, outputs: str = "float16[B, 8] y") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["": 23]> net (float16[B, 8] h) => ({outputs})
    <float eps = {{0.00001}}, int64[1] last = {{-1}}, float16[8] gamma = {{1, 2, 3, 4, 5, 6, 7, 8}}>
    {{ x = Cast<to=1>(h) {inside} c = Cast<to=10>(n) {gamma} }}"""
    return ir.from_onnx_text(text)


@pytest.mark.parametrize(
    ("inside", "step", "op"),
    [
        (center() + core("d"), FuseLayerNorm(), "LayerNormalization"),
        (core("x"), FuseRMSNorm(), "RMSNormalization"),
    ],
    ids=["layer", "rms"],
)
def test_casts_to_float32_and_back_go_into_the_operator(inside, step, op):
    model = half(inside, "y = Mul(c, gamma)")
    feeds = {"h": X[0].astype(np.float16)}
    before = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]
    assert step(model).modified
    assert ops(model) == {op: 1}
    after = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]
    np.testing.assert_allclose(after.astype(np.float32), before.astype(np.float32), rtol=2e-3, atol=2e-3)
    assert not step(model).modified


def test_a_cast_that_something_else_reads_stays_outside():
    model = half(center() + core("d"), "y = Mul(c, gamma) z = Neg(x)", "float16[B, 8] y, float[B, 8] z")
    for value in (node.outputs[0] for node in model.graph):
        if value.name == "x":
            value.shape = ir.Shape(["B", 8])
    assert FuseLayerNorm()(model).modified
    assert ops(model) == {"Cast": 2, "LayerNormalization": 1, "Mul": 1, "Neg": 1}


def test_a_cast_to_another_precision_than_it_came_from_stays_outside():
    model = half(center() + core("d"), "y = Cast<to=11>(n)", "float16[B, 8] c, double[B, 8] y")
    model.graph.outputs.pop(0)
    model.graph.remove(model.graph[-2], safe=True)
    for node in model.graph:
        if node.outputs[0].name == "x":
            node.outputs[0].shape = ir.Shape(["B", 8])
    assert FuseLayerNorm()(model).modified
    assert ops(model) == {"Cast": 2, "LayerNormalization": 1}


def test_rms_norm_leaves_layer_norm_to_the_other_pass():
    check_left(build(center() + core("d") + AFFINES["gamma"]), FuseRMSNorm(), None)


RMS_NORM = core("x") + AFFINES["gamma"]
RMS_NEAR_MISSES = {
    "another_axis": (RMS_NORM.replace("last", "middle"), "no scale of the normalized shape follows"),
    "no_gamma": (core("x") + AFFINES["plain"], "no scale of the normalized shape follows"),
    "narrow_gamma": (core("x") + "y = Mul(n, narrow)", "no scale of the normalized shape follows"),
    "epsilon_outside_the_root": (RMS_NORM.replace("e = Add(v, eps) s = Sqrt(e)", "e = Sqrt(v) s = Add(e, eps)"), None),
    "wrong_power": (RMS_NORM.replace("q = Mul(x, x)", "q = Pow(x, half)"), None),
    "shared_mean": (RMS_NORM, "an intermediate is used elsewhere"),
}


@pytest.mark.parametrize(("body", "reason"), RMS_NEAR_MISSES.values(), ids=RMS_NEAR_MISSES)
def test_what_only_looks_like_rms_norm_is_not_touched(body, reason, request):
    outputs = "float[B, S, 8] y, float[B, S, 1] v" if "shared" in request.node.name else "float[B, S, 8] y"
    if "another_axis" in request.node.name:
        reason = None  # not over trailing axes, so it is not even looked at
    check_left(build(body, outputs=outputs), FuseRMSNorm(), reason)


@pytest.mark.parametrize(
    ("body", "step", "op"),
    [
        (center() + core("d") + AFFINES["both"], FuseLayerNorm(), "LayerNormalization"),
        (center() + core("d") + AFFINES["plain"], FuseLayerNorm(), "LayerNormalization"),
        (RMS_NORM, FuseRMSNorm(), "RMSNormalization"),
    ],
    ids=["layer", "layer_plain", "rms"],
)
def test_norms_in_a_branch_are_fused(body, step, op):
    model = build(
        f"""size = Size(x) big = Greater(size, zero)
        y = If(big) <then_branch = yes () => (float[B, S, 8] a) {{ {body.replace("y =", "a =")} }},
                     else_branch = no () => (float[B, S, 8] b) {{ b = Neg(x) }}>"""
    )
    model.graph.register_initializer(ir.val("zero", const_value=ir.tensor(np.array(0, np.int64), name="zero")))
    check_fused(model, step, op)
