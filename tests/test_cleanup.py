import tracemalloc
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers import model_from

from qexport.passes.cleanup import Cleanup

ENDS = "(float[B, 4] x) => (float[B, 4] y)"


def build(body: str, ends: str = ENDS, opset: int = 17, more: str = "") -> ir.Model:
    imports = f'["": {opset}, "local": 1]' if more else f'["": {opset}]'
    model = ir.from_onnx_text(f"<ir_version: 8, opset_import: {imports}> net {ends} {body} {more}")
    for number, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{number}"
    return model


def run(model: ir.Model) -> list[np.ndarray]:
    rng, inputs = np.random.default_rng(0), {}
    for value in model.graph.inputs:
        if value.name not in model.graph.initializers:
            shape = [dim if isinstance(dim, int) else 2 for dim in value.shape]
            inputs[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


CLEANUP = Cleanup()


def check(model: ir.Model, expected: dict[str, int], step: Cleanup = CLEANUP) -> None:
    before = run(model)
    ends = [[value.name for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    assert step(model).modified
    assert ops(model) == expected
    assert [[value.name for value in values] for values in (model.graph.inputs, model.graph.outputs)] == ends
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for old, new in zip(before, run(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6)
    after = str(model)
    assert not step(model).modified
    assert str(model) == after


CASES = {
    "constants": ("<float[4] a = {1, 2, 3, 4}> { b = Add(a, a) c = Sqrt(b) y = Mul(x, c) }", {"Mul": 1}),
    "no_ops": (
        "<float one = {1.0}, float zero = {0.0}> { a = Mul(x, one) b = Add(zero, a) c = Div(b, one) y = Neg(c) }",
        {"Neg": 1},
    ),
    "identity": ("{ a = Identity(x) b = Neg(a) y = Identity(b) }", {"Neg": 1}),
    "identity_from_end_to_end": ("{ a = Neg(x) y = Identity(x) }", {"Identity": 1}),
    "dropout": ("{ a, m = Dropout(x) y = Neg(a) }", {"Neg": 1}),
    "casts_and_transposes": (
        "{ a = Cast<to=1>(x) b = Transpose<perm=[1, 0]>(a) c = Transpose<perm=[1, 0]>(b) y = Neg(c) }",
        {"Neg": 1},
    ),
    "common_subexpressions": ("{ a = Exp(x) b = Exp(x) y = Mul(a, b) }", {"Exp": 1, "Mul": 1}),
    "unused": ("<float[4] w = {1, 2, 3, 4}> { a = Exp(x) b = Mul(a, w) y = Neg(x) }", {"Neg": 1}),
    "constant_branch": (
        """<float[4] w = {1, 2, 3, 4}> { s = Size(x) big = Greater(s, s) y = If(big) <
        then_branch = t () => (float[B, 4] a) { v = Add(w, w) a = Mul(x, v) },
        else_branch = e () => (float[B, 4] c) { v = Add(w, w) u = Identity(v) c = Div(x, u) }> }""",
        {"Size": 1, "Greater": 1, "If": 1, "Mul": 1, "Div": 1},
    ),
}


@pytest.mark.parametrize("opset", [13, 17, 23])
@pytest.mark.parametrize("name", CASES)
def test_what_computes_nothing_goes_and_the_numbers_stay(name, opset):
    body, expected = CASES[name]
    check(build(body, opset=opset), expected)


def test_a_clean_model_is_not_modified():
    model = build("<float[4] w = {1, 2, 3, 4}> { y = Mul(x, w) }")
    before = str(model)
    result = Cleanup()(model)
    assert not result.modified
    assert result.decisions == ()
    assert str(model) == before


def test_equal_weights_become_one():
    model = build("<float[4] a = {1, 2, 3, 4}, float[4] b = {1, 2, 3, 4}> { c = Mul(x, a) y = Sub(c, b) }")
    check(model, {"Mul": 1, "Sub": 1})
    assert len(model.graph.initializers) == 1


def test_functions_are_inlined():
    more = '<domain: "local", opset_import: ["": 17]> twice (x) => (y) { a = Neg(x) y = Neg(a) }'
    model = build("{ a = local.twice(x) y = Exp(a) }", more=more)
    check(model, {"Neg": 2, "Exp": 1})
    assert not model.functions
    assert "local" not in model.opset_imports


def test_an_initializer_that_a_caller_can_override_is_neither_folded_nor_merged():
    ends = "(float[B, 4] x, float[4] a, float[4] b) => (float[B, 4] y)"
    model = build("<float[4] a = {1, 2, 3, 4}, float[4] b = {1, 2, 3, 4}> { c = Add(a, b) y = Mul(x, c) }", ends)
    Cleanup()(model)
    assert ops(model) == {"Add": 1, "Mul": 1}
    assert [value.name for value in model.graph.inputs] == ["x", "a", "b"]


def test_an_output_that_is_constant_keeps_its_name_and_value():
    model = build(
        "<float[4] a = {1, 2, 3, 4}> { y = Neg(x) z = Add(a, a) }", "(float[B, 4] x) => (float[4] z, float[B, 4] y)"
    )
    before = run(model)
    Cleanup()(model)
    assert [value.name for value in model.graph.outputs] == ["z", "y"]
    np.testing.assert_array_equal(run(model)[0], before[0])
    assert not Cleanup()(model).modified


@pytest.mark.parametrize("count", [2, 3])
def test_outputs_of_one_value_stay_apart(count):
    names = ["y", "z", "w"][:count]
    ends = ", ".join(f"float[B, 4] {name}" for name in names)
    body = " ".join(f"{name} = Identity(a)" for name in names)
    model = build(f"{{ a = Neg(x) {body} }}", f"(float[B, 4] x) => ({ends})")
    before = run(model)
    assert Cleanup()(model).modified
    assert [value.name for value in model.graph.outputs] == names
    np.testing.assert_array_equal(run(model), before)
    assert not Cleanup()(model).modified


def test_a_branch_that_passes_an_outer_value_through_keeps_it():
    body = """{ v = Exp(x) s = Size(x) big = Greater(s, s) y = If(big) <
        then_branch = t () => (float[B, 4] a) { a = Identity(v) },
        else_branch = e () => (float[B, 4] b) { c = Identity(v) b = Neg(c) }> z = Neg(v) }"""
    check(
        build(body, "(float[B, 4] x) => (float[B, 4] y, float[B, 4] z)"),
        {"Exp": 1, "Size": 1, "Greater": 1, "If": 1, "Identity": 1, "Neg": 2},
    )


def test_random_numbers_are_neither_folded_nor_merged():
    model = build("{ a = RandomNormal<shape=[4]>() b = RandomNormal<shape=[4]>() c = Sub(a, b) y = Add(x, c) }")
    Cleanup()(model)
    assert ops(model)["RandomNormal"] == 2


def test_sizes_cut_out_of_a_shape_are_folded_where_they_are_known():
    body = """<int64[1] last = {-1}, int64[1] end = {9223372036854775807}, int64[1] zero = {0}> {
        s = Shape(x) d = Slice(s, last, end, zero) f = Cast<to=1>(d) r = Sqrt(f) y = Div(x, r) }"""
    check(build(body), {"Div": 1})
    unknown = build(body, "(float[B, D] x) => (float[B, D] y)")
    Cleanup()(unknown)
    assert ops(unknown)["Slice"] == 1


BOMBS = {
    "expand": "e = Expand(one, big) ",
    "tile": "v = Reshape(one, unit) e = Tile(v, big) ",
    "constant_of_shape": "e = ConstantOfShape(big) ",
    "range": "n = Squeeze(big) o = Sub(n, n) u = Div(n, n) e = Range(o, n, u) ",
    "one_hot": "d = Squeeze(big) v = Concat<axis=0>(unit, big) i = Sub(unit, unit) e = OneHot(i, d, v) ",
    "through_a_cast": "h = Cast<to=10>(one) e = Expand(h, big) ",
}


@pytest.mark.parametrize("size", [1 << 26, 1 << 40])
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("slim", [False, True])
def test_a_few_bytes_that_would_expand_to_gigabytes_stay_a_few_bytes(name, size, slim):
    body = f"""<float one = {{1.0}}, int64[1] unit = {{1}}, int64[1] big = {{{size}}}> {{
        {BOMBS[name]} s = Shape(e) f = Cast<to=1>(s) y = Add(x, f) m = ReduceMax<keepdims=0>(e) z = Cast<to=1>(m) }}"""
    model = build(body, "(float[B, 4] x) => (float[B, 4] y, float z)")
    tracemalloc.start()
    Cleanup(slim=slim)(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20
    assert sum(value.const_value.size for value in model.graph.initializers.values()) < 1 << 20


def test_an_outer_product_of_small_constants_is_not_stored():
    model = build("{ a = Mul(r, c) m = ReduceMax<keepdims=0>(a) y = Mul(x, m) }".replace("r, c", "x, x"))
    for index, (name, shape) in enumerate((("r", (4096, 1)), ("c", (1, 4096)))):
        tensor = ir.tensor(np.ones(shape, np.float32), name=name)
        value = ir.val(name, tensor.dtype, shape, const_value=tensor)
        model.graph.register_initializer(value)
        model.graph[0].replace_input_with(index, value)
    Cleanup()(model)
    assert ops(model) == {"Mul": 2, "ReduceMax": 1}
    assert sorted(value.const_value.size for value in model.graph.initializers.values()) == [4096, 4096]


def test_a_large_transposed_weight_is_folded_because_it_does_not_grow():
    model = build("{ t = Exp(x) y = MatMul(x, t) }", "(float[600, 600] x) => (float[600, 600] y)")
    tensor = ir.tensor(np.random.default_rng(0).standard_normal((600, 600)).astype(np.float32), name="w")
    weight = ir.val("w", tensor.dtype, (600, 600), const_value=tensor)
    model.graph.register_initializer(weight)
    transpose = ir.node("Transpose", [weight], {"perm": [1, 0]}, name="transpose")
    model.graph.insert_before(model.graph[0], transpose)
    model.graph[2].replace_input_with(1, transpose.outputs[0])
    check(model, {"MatMul": 1})


def test_slim_finds_more_and_keeps_the_ends():
    body = "<float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[4] b = {1, 2, 3, 4}>"
    body += " { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }"
    check(build(body, "(float[2, 4] x) => (float[2, 4] y)"), {"Gemm": 1, "Relu": 1}, Cleanup(slim=True))


def test_slim_that_finds_nothing_changes_nothing():
    model = build("<float[4] w = {1, 2, 3, 4}> { y = Mul(x, w) }")
    before = str(model)
    result = Cleanup(slim=True)(model)
    assert not result.modified
    assert str(model) == before
    assert [d.reason for d in result.decisions] == ["onnxslim found nothing"]


def test_amounts_of_padding_become_constants_and_large_fillings_do_not():
    model = model_from(
        """g (float[n, 3] x) => (float[n, 5] y, float[4096] z)
        <int64[1] one = {1}, int64[1] large = {4096}> {
        some = ConstantOfShape <value = int64[1] {1}> (one) none = ConstantOfShape <value = int64[1] {0}> (one)
        amounts = Concat <axis = 0> (none, some, none, some)
        y = Pad (x, amounts) z = ConstantOfShape <value = float[1] {0}> (large) }"""
    )
    Cleanup()(model)
    pad = next(node for node in model.graph if node.op_type == "Pad")
    assert pad.inputs[1].const_value.numpy().tolist() == [0, 1, 0, 1]
    assert [node.op_type for node in model.graph] == ["Pad", "ConstantOfShape"]


def test_what_only_a_removed_branch_has_read_is_removed_with_it():
    model = model_from("""g (float[n, 2] x, bool c) => (float[n, 2] y) {
        a = Abs(x) unused = If(c) <then_branch = t () => (float[n, 2] u) { u = Relu(a) },
        else_branch = e () => (float[n, 2] v) { v = Neg(a) }> y = Exp(x) }""")
    assert Cleanup()(model).modified
    assert [node.op_type for node in model.graph] == ["Exp"]
    assert not Cleanup()(model.clone()).modified
