from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.passes.fuse_gelu import FuseGelu

X = np.linspace(-6, 6, 48, dtype=np.float32).reshape(2, 3, 8)
CONSTANTS = """float root_two = {1.4142135}, float inverse = {0.70710678}, float one = {1.0}, float half = {0.5},
    float two = {2.0}, float three = {3.0}, float[1] cube = {0.044715}, float pi = {0.7978845608},
    float product = {0.0356774081}, float quick = {1.702}, float wrong = {1.4}"""
ERF = "a = Div(x, root_two) f = Erf(a) "
TANH = "x2 = Mul(x, x) x3 = Mul(x2, x) c = Mul(x3, cube) s = Add(x, c) a = Mul(pi, s) f = Tanh(a) "
REST = "p = Add(f, one) m = Mul(x, p) y = Mul(m, half)"
SPELLINGS = {
    "torch_script": ERF + REST,
    "torch_dynamo": ERF + "p = Add(f, one) h = Mul(half, p) y = Mul(x, h)",
    "half_of_x_first": ERF + "h = Mul(x, half) p = Add(one, f) y = Mul(p, h)",
    "times_inverse": "a = Mul(inverse, x) f = Erf(a) " + REST,
    "divided_by_two": ERF + "p = Add(f, one) m = Mul(p, x) y = Div(m, two)",
    "multiplied_out": ERF + "h = Mul(x, half) g = Mul(h, f) y = Add(h, g)",
    "half_inside": ERF + "g = Mul(f, half) p = Add(g, half) y = Mul(x, p)",
    "tanh_script": TANH + REST,
    "tanh_pow": "x3 = Pow(x, three) c = Mul(cube, x3) s = Add(c, x) a = Mul(s, pi) f = Tanh(a) " + REST,
    "tanh_factored": """x2 = Mul(x, x) c = Mul(x2, cube) s = Add(c, one) w = Mul(x, pi) a = Mul(w, s)
        f = Tanh(a) """
    + REST,
    "tanh_pow_two": "x2 = Pow(x, two) c = Mul(x2, product) s = Add(pi, c) a = Mul(x, s) f = Tanh(a) " + REST,
}
NEAR_MISSES = {
    "quick_gelu": "a = Mul(x, quick) f = Sigmoid(a) y = Mul(x, f)",
    "silu": "f = Sigmoid(x) y = Mul(x, f)",
    "wrong_root": (ERF + REST).replace("root_two", "wrong"),
    "wrong_cube": TANH.replace("cube", "one") + REST,
    "erf_of_x": "f = Erf(x) " + REST,
    "tanh_of_x": "f = Tanh(x) " + REST,
}
NEAR_RESTS = {
    "not_halved": "p = Add(f, one) y = Mul(x, p)",
    "one_third": "p = Add(f, one) m = Mul(x, p) y = Div(m, three)",
    "two_plus": "p = Add(f, two) m = Mul(x, p) y = Mul(m, half)",
    "of_another_value": "z = Neg(x) p = Add(f, one) m = Mul(z, p) y = Mul(m, half)",
    "divided": "p = Add(f, one) m = Div(p, x) y = Mul(m, half)",
}


def build(body: str, opset: int = 20, outputs: str = "float[B, S, 8] y") -> ir.Model:
    text = f"""<ir_version: 9, opset_import: ["": {opset}]>
    net (float[B, S, 8] x) => ({outputs}) <{CONSTANTS}> {{ {body} }}"""
    return ir.from_onnx_text(text)


def run(model: ir.Model) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})


def check_left(model: ir.Model, reasons: list[str]) -> None:
    before = str(model)
    result = FuseGelu()(model)
    assert not result.modified
    assert str(model) == before
    assert [decision.reason for decision in result.decisions] == reasons


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_node_with_the_same_numbers(name):
    model = build(SPELLINGS[name])
    model.graph[-1].name = "last"
    before = run(model)
    result = FuseGelu()(model)
    assert [(d.node, d.op, d.action) for d in result.decisions] == [("last", "Gelu", "fused")]
    (node,) = model.graph
    assert node.attributes.get_string("approximate") == ("tanh" if "tanh" in name else "none")
    assert (node.name, node.outputs[0].name) == ("last", "y")
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5, atol=1e-6)
    assert not FuseGelu()(model).modified


def test_the_exact_function_and_its_approximation_are_not_mistaken_for_each_other():
    exact, tanh = build(SPELLINGS["torch_script"]), build(SPELLINGS["tanh_script"])
    FuseGelu()(exact)
    FuseGelu()(tanh)
    assert np.abs(run(exact)[0] - run(tanh)[0]).max() > 1e-4


def test_a_scaled_input_is_taken_as_it_is():
    model = build("x2 = Mul(x, two) " + SPELLINGS["torch_script"].replace("(x,", "(x2,"))
    before = run(model)
    assert FuseGelu()(model).modified
    assert Counter(node.op_type for node in model.graph) == {"Mul": 1, "Gelu": 1}
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5, atol=1e-6)


def test_a_gate_after_it_stays():
    model = build(SPELLINGS["torch_script"].replace("y =", "g =") + " y = Mul(g, x)")
    before = run(model)
    assert FuseGelu()(model).modified
    assert Counter(node.op_type for node in model.graph) == {"Mul": 1, "Gelu": 1}
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("body", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_other_functions_are_not_touched(body):
    check_left(build(body), [])


@pytest.mark.parametrize("body", NEAR_RESTS.values(), ids=NEAR_RESTS)
def test_an_inner_function_without_the_rest_is_refused(body):
    check_left(build(ERF + body), ["not the rest of a GELU"])


@pytest.mark.parametrize("inner", ["a", "f", "p", "m"])
def test_an_inner_value_that_the_graph_returns_keeps_it_apart(inner):
    model = build(SPELLINGS["torch_script"], outputs=f"float[B, S, 8] y, float[B, S, 8] {inner}")
    check_left(model, ["an intermediate is used elsewhere"])


def test_an_inner_value_that_another_node_reads_keeps_it_apart():
    model = build(SPELLINGS["torch_script"] + " z = Neg(p)", outputs="float[B, S, 8] y, float[B, S, 8] z")
    check_left(model, ["an intermediate is used elsewhere"])


def test_an_opset_without_gelu_is_a_decision():
    check_left(build(SPELLINGS["torch_script"], opset=19), ["needs opset 20, model has 19"])


def test_it_is_found_in_a_branch_and_not_across_one():
    branch = SPELLINGS["torch_script"].replace("y =", "b =")
    across = REST.replace("y =", "b =")
    for then, before, fused in ((branch, "", 1), (across, ERF, 0)):
        model = build(
            f"""{before} size = Size(x) big = Greater(size, size) no = Not(big) y = If(no) <
            then_branch = yes () => (float[B, S, 8] b) {{ {then} }},
            else_branch = other () => (float[B, S, 8] c) {{ c = Neg(x) }}>"""
        )
        old = run(model)
        assert FuseGelu()(model).modified == bool(fused)
        assert sum(node.op_type == "Gelu" for node in model.graph.all_nodes()) == fused
        np.testing.assert_allclose(run(model)[0], old[0], rtol=1e-5, atol=1e-6)


def test_it_is_found_in_a_function():
    text = f"""<ir_version: 10, opset_import: ["": 20, "local": 1]>
    net (float[B, S, 8] x) => (float[B, S, 8] y) {{ y = local.act(x) }}
    <domain: "local", opset_import: ["": 20]> act (x) => (y)
    {{ root_two = Constant<value_float = 1.4142135>() one = Constant<value_float = 1.0>()
       half = Constant<value_float = 0.5>() {SPELLINGS["torch_script"]} }}"""
    model = ir.from_onnx_text(text)
    before = run(model)
    assert FuseGelu()(model).modified
    (function,) = model.functions.values()
    assert [node.op_type for node in function] == ["Gelu"]
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5, atol=1e-6)
