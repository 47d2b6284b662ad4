import itertools
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.passes.fuse_attention import FuseAttention

SIZES = {"B": 2, "S": 3, "T": 5, "N": 1}
INITIALIZERS = """float four = {4.0}, float quarter = {0.25}, float[1] half = {0.5}, float minus = {-0.25},
    float zero = {0.0}, float[1, 1, 1, 4] vector = {1, 2, 3, 4}, float one = {1.0},
    int64[4] split = {0, 0, 2, 4}, int64[3] merge = {0, 0, 8}"""
SCALES = {
    "none": ("q", "t", "r"),
    "mul_scores": ("q", "t", "Mul(r, quarter)"),
    "mul_scores_first": ("q", "t", "Mul(quarter, r)"),
    "div_scores": ("q", "t", "Div(r, four)"),
    "on_q": ("Mul(q, quarter)", "t", "r"),
    "on_k": ("q", "Mul(quarter, t)", "r"),
    "root_on_both": ("Mul(q, half)", "Mul(t, half)", "r"),
    "div_on_both": ("Div(q, four)", "Div(t, four)", "r"),
}
MASKS = {
    "no": None,
    "rows": "float[B, 1, S, T] mask",
    "heads": "float[B, 2, S, T] mask",
    "one_row": "float[B, 1, 1, T] mask",
    "one_row_for_all": "float[1, 1, 1, T] mask",
    "one_column": "float[B, 1, S, 1] mask",
    "two_axes": "float[S, T] mask",
    "three_axes": "float[2, 1, T] mask",
}
GUARD = "w = IsNaN(soft) p = Where(w, zero, soft)"
HEADS = "q = Identity(q4) k = Identity(k4) v = Identity(v4)"
FOUR = "float[B, 2, S, 4] q4, float[B, 2, T, 4] k4, float[B, 2, T, 4] v4"
DECLARED = {"q": "BS", "k": "BT", "v": "BT"}


def core(scale: str = "mul_scores", mask: bool = False, guard: bool = False) -> str:
    on_q, on_k, on_scores = (text if "(" in text else f"Identity({text})" for text in SCALES[scale])
    lines = [
        "t = Transpose<perm=[0, 1, 3, 2]>(k)",
        f"q_ = {on_q} k_ = {on_k} r = MatMul(q_, k_) c = {on_scores}",
        "b = Add(c, mask)" if mask else "b = Identity(c)",
        "soft = Softmax<axis=-1>(b)",
        GUARD if guard else "p = Identity(soft)",
        "o = MatMul(p, v)",
    ]
    return " ".join(lines)


def tidy(model: ir.Model) -> ir.Model:
    """Drop the Identity nodes that the builders write, and infer shapes."""
    from qexport.passes.cleanup import Cleanup

    Cleanup()(model)
    return model


def build(body: str, inputs: str = FOUR, output: str = "float[B, 2, S, 4] o", opset: int = 23) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["": {opset}]>
    net ({inputs}) => ({output}) <{INITIALIZERS}> {{ {body} }}"""
    return tidy(ir.from_onnx_text(text))


def run(model: ir.Model, sizes: dict[str, int] = SIZES, seed: int = 0, fill: float | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape]
        inputs[value.name] = rng.standard_normal(shape).astype(np.float32)
        if value.name == "mask" and fill is not None:
            inputs[value.name] = np.where(inputs[value.name] > 1, fill, 0).astype(np.float32)
            inputs[value.name][..., 0] = 0
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def check_fused(model: ir.Model, count: int = 1) -> None:
    tries = [(SIZES, None), ({**SIZES, "S": 1}, -np.inf), ({**SIZES, "B": 1, "T": 2}, np.finfo(np.float32).min)]
    before = [run(model, sizes, fill=fill) for sizes, fill in tries]
    result = FuseAttention()(model)
    assert result.modified
    assert [(d.op, d.action) for d in result.decisions] == [("Attention", "fused")] * count
    assert ops(model)["Attention"] == count
    assert not {"Softmax", "IsNaN", "MatMul", "Add", "Mul", "Div"} & set(ops(model))
    for (sizes, fill), outputs in zip(tries, before, strict=True):
        for old, new in zip(outputs, run(model, sizes, fill=fill), strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    assert not FuseAttention()(model).modified


def check_left(model: ir.Model, reasons: list[str]) -> None:
    before = str(model)
    result = FuseAttention()(model)
    assert not result.modified
    assert str(model) == before
    assert [decision.reason for decision in result.decisions] == reasons


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("guard", [False, True], ids=["plain", "guarded"])
def test_every_place_of_the_scale_is_found(scale, guard):
    model = build(HEADS + core(scale, guard=guard))
    check_fused(model)
    expected = {"none": 1.0, "div_on_both": 1 / 16}.get(scale, 0.25)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert attention.attributes.get_float("scale") == pytest.approx(expected)


@pytest.mark.parametrize(("mask", "guard"), list(itertools.product(MASKS, [False, True])))
def test_every_shape_of_mask_gives_the_same_numbers(mask, guard):
    declared = MASKS[mask]
    body = HEADS + core("root_on_both", mask=declared is not None, guard=guard)
    check_fused(build(body, f"{FOUR}, {declared}" if declared else FOUR))


def test_a_mask_whose_sizes_fit_is_not_expanded():
    model = build(HEADS + core(mask=True), f"{FOUR}, {MASKS['rows']}")
    FuseAttention()(model)
    assert ops(model) == {"Attention": 1}


def test_layers_that_share_a_mask_share_its_expansion():
    second = core(mask=True)
    for name in ("t", "q_", "k_", "r", "c", "b", "soft", "p"):
        second = second.replace(f"{name} = ", f"{name}2 = ").replace(f"({name},", f"({name}2,")
        second = second.replace(f"({name})", f"({name}2)").replace(f" {name})", f" {name}2)")
    second = second.replace("q_2 = Identity(q)", "q_2 = Identity(o)").replace("o = MatMul", "y = MatMul")
    inputs = f"{FOUR}, {MASKS['one_row']}"
    model = build(HEADS + core(mask=True) + " " + second, inputs, "float[B, 2, S, 4] y")
    check_fused(model, 2)
    assert ops(model)["Expand"] == 1


def heads(name: str, perm: str = "0, 2, 1, 3") -> str:
    return f"{name}s = Reshape({name}3, split) {name} = Transpose<perm=[{perm}]>({name}s) "


THREE = "float[B, S, 8] q3, float[B, T, 8] k3, float[B, T, 8] v3"
MERGE = " back = Transpose<perm=[0, 2, 1, 3]>(o) y = Reshape(back, merge)"


@pytest.mark.parametrize("mask", ["no", "rows", "one_row"])
def test_heads_that_are_split_and_merged_around_it_go_into_the_operator(mask):
    body = heads("q") + heads("k") + heads("v") + core(mask=mask != "no") + MERGE
    model = build(body, THREE + (f", {MASKS[mask]}" if mask != "no" else ""), "float[B, S, 8] y")
    check_fused(model)
    assert not {"Transpose", "Reshape"} & set(ops(model))
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert attention.attributes.get_int("q_num_heads") == attention.attributes.get_int("kv_num_heads") == 2
    assert attention.outputs[0].name == "y"


def test_keys_that_are_transposed_in_one_go_are_found_in_both_forms():
    keys = "ks = Reshape(k3, split) t = Transpose<perm=[0, 2, 3, 1]>(ks) "
    rest = core().split("(k) ", 1)[1]
    three = build(heads("q") + heads("v") + keys + rest + MERGE, THREE, "float[B, S, 8] y")
    four = build(heads("q") + heads("v") + keys + rest, THREE, "float[B, 2, S, 4] o")
    check_fused(three)
    assert "Transpose" not in ops(three)
    check_fused(four)
    assert ops(four)["Transpose"] == 3


def test_heads_that_something_else_reads_are_fused_in_place_and_kept():
    body = heads("q") + heads("k") + heads("v") + core() + MERGE
    model = build(body, THREE, "float[B, S, 8] y, float[B, 2, T, 4] k")
    check_fused(model)
    assert ops(model) == {"Attention": 1, "Reshape": 1, "Transpose": 1}


PLAIN = HEADS + core()


def test_softmax_over_the_queries_is_not_touched():
    check_left(build(PLAIN.replace("axis=-1", "axis=2")), [])


def test_scores_of_keys_that_are_not_transposed_are_not_touched():
    inputs = FOUR.replace("[B, 2, T, 4] k4", "[B, 2, 4, T] k4")
    check_left(build(PLAIN.replace("t = Transpose<perm=[0, 1, 3, 2]>(k)", "t = Identity(k)"), inputs), [])


@pytest.mark.parametrize(("last", "found"), [("1, 2, 4, 4", True), ("1, 1, 4, 8", False)])
def test_keys_that_torch_transposes_between_two_reshapes_need_the_right_shapes(last, found):
    keys = "f = Reshape(k, flat) g = Transpose<perm=[0, 2, 1]>(f) t = Reshape(g, last)"
    body = PLAIN.replace("t = Transpose<perm=[0, 1, 3, 2]>(k)", keys)
    constants = f"int64[3] flat = {{-1, 4, 4}}, int64[4] last = {{{last}}}"
    inputs = f"float[1, 2, 3, 4] q4, float[1, 2, 4, 4] k4, float[1, 2, {last[-1]}, 4] v4"
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    net ({inputs}) => (float[1, 2, 3, 4] o) <{INITIALIZERS}, {constants}> {{ {body} }}"""
    model = tidy(ir.from_onnx_text(text))
    if found:
        check_fused(model)
    else:
        check_left(model, [])


def test_a_guard_that_writes_something_else_than_zero_is_not_touched():
    check_left(build((HEADS + core(guard=True)).replace("zero", "one")), [])


def test_weights_on_the_right_of_the_product_are_not_touched():
    inputs = FOUR.replace("T, 4] v4", "4, S] v4")
    model = build(PLAIN.replace("MatMul(p, v)", "MatMul(v, p)"), inputs, "float[B, 2, 4, T] o")
    check_left(model, [])


def test_a_scale_that_comes_after_the_mask_is_not_touched():
    body = HEADS + core("none", mask=True).replace("b = Add(c, mask)", "u = Add(c, mask) b = Mul(u, quarter)")
    check_left(build(body, f"{FOUR}, {MASKS['rows']}"), [])


def test_a_scale_per_channel_stays_on_the_queries():
    model = build(PLAIN.replace("q_ = Identity(q)", "q_ = Mul(q, vector)"))
    before = run(model)
    assert FuseAttention()(model).modified
    assert ops(model) == {"Mul": 1, "Attention": 1}
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5, atol=1e-5)


def test_a_negative_scale_is_refused():
    check_left(build(PLAIN.replace("quarter", "minus")), ["the scale is not positive"])


@pytest.mark.parametrize("inner", ["r", "c", "b", "soft"])
def test_scores_or_weights_that_the_graph_returns_keep_it_apart(inner):
    body = HEADS + core(mask=True)
    model = build(body, f"{FOUR}, {MASKS['rows']}", f"float[B, 2, S, 4] o, float[B, 2, S, T] {inner}")
    check_left(model, ["an intermediate is used elsewhere"])


def test_weights_that_another_node_reads_keep_it_apart():
    model = build(PLAIN + " z = Neg(p)", output="float[B, 2, S, 4] o, float[B, 2, S, T] z")
    check_left(model, ["an intermediate is used elsewhere"])


def test_keys_of_another_batch_are_refused():
    inputs = FOUR.replace("float[B, 2, T, 4] k4", "float[N, 2, T, 4] k4")
    check_left(build(PLAIN, inputs), ["batch and heads are not known to agree"])


def test_three_axes_without_heads_are_refused():
    inputs = "float[B, S, 4] q4, float[B, T, 4] k4, float[B, T, 4] v4"
    body = PLAIN.replace("[0, 1, 3, 2]", "[0, 2, 1]")
    check_left(build(body, inputs, "float[B, S, 4] o"), [])


def test_a_mask_that_widens_the_scores_is_refused():
    inputs = "float[1, 2, 1, 4] q4, float[1, 2, 5, 4] k4, float[1, 2, 5, 4] v4, float[1, 1, 3, 5] mask"
    model = build(HEADS + core(mask=True), inputs, "float[1, 2, 3, 4] o")
    check_left(model, ["the mask is larger than the scores"])


def test_an_opset_without_the_operator_is_a_decision():
    check_left(build(PLAIN, opset=22), ["needs opset 23, model has 22"])


def test_it_is_found_in_a_branch():
    body = PLAIN.replace("o = MatMul", "y = MatMul")
    model = build(
        f"""size = Size(q4) big = Greater(size, size) no = Not(big) o = If(no) <
        then_branch = yes () => (float[B, 2, S, 4] y) {{ {body} }},
        else_branch = other () => (float[B, 2, S, 4] c) {{ c = Neg(q4) }}>"""
    )
    check_fused(model)


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
def test_targets_that_find_attention_by_themselves_keep_the_small_operators(target: str) -> None:
    model = build(HEADS + core())
    assert not FuseAttention(target=target)(model).modified
    assert FuseAttention(target="ort-cpu")(model).modified
