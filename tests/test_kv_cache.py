"""Decoders of exporters in the portable layout: the same logits, by decoding with both graphs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import model_from, session

from qexport.errors import ModelInvalid
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.passes.half import Half
from qexport.passes.kv_cache import KvCache, to_portable

MODELS = Path(__file__).parent / "models"
EXPORTS = (
    "llama_past_optimum",
    "mistral_past_optimum",
    "gpt2_past_optimum",
    "opt_past_optimum",
    "llama_past_dynamo18",
    "llama_past_dynamo23",
    "gpt2_past_script17",
)
VOCABULARY, LENGTH = 16, 40
CALLS = ((13, True), (1, True), (1, True), (5, False), (5, True), (1, True))
"""Tokens of a call, and whether they are kept; the fourth call is a draft that turned out wrong."""


class Appended:
    """Decodes one row with the old layout."""

    def __init__(self, run, dtype=np.float32):
        self.run, self.past = run, None
        self.names = [value.name for value in run.get_inputs()]
        self.caches = [value for value in run.get_inputs() if len(value.shape) == 4]
        self.past = [np.zeros((1, value.shape[1], 0, value.shape[3]), dtype) for value in self.caches]

    def step(self, ids, keep=True):
        start, count = self.past[0].shape[2], len(ids)
        feeds = {value.name: array for value, array in zip(self.caches, self.past, strict=True)}
        feeds |= {"input_ids": ids[None], "attention_mask": np.ones((1, start + count), np.int64)}
        if "position_ids" in self.names:
            feeds["position_ids"] = np.arange(start, start + count)[None]
        logits, *past = self.run.run(None, feeds)
        self.past = past if keep else self.past
        return logits[0]


class Written:
    """Decodes rows with the new layout, in buffers full of numbers that nobody should see."""

    def __init__(self, run, rows=1, dtype=np.float32):
        self.run, self.lengths = run, np.zeros(rows, np.int64)
        self.caches = [value for value in run.get_inputs() if len(value.shape) == 4]
        self.buffers = [np.full((rows, v.shape[1], LENGTH, v.shape[3]), 9, dtype) for v in self.caches]

    def step(self, ids, counts):
        """``ids`` [rows, longest]; ``counts`` is how many of each row's tokens are kept."""
        positions = self.lengths[:, None] + np.arange(ids.shape[1])
        feeds = {"input_ids": ids, "position_ids": positions, "write_indices": self.lengths}
        feeds |= {value.name: array for value, array in zip(self.caches, self.buffers, strict=True)}
        logits, *self.buffers = self.run.run(None, feeds)
        self.lengths = self.lengths + counts
        return logits


@cache
def export(name):
    """The portable graph of an exporter's file, sessions of the file and the graph, and what was decided."""
    given = ir.load(MODELS / f"{name}.onnx")
    model = given.clone()
    outcome = to_portable(model)
    return model, session(given), session(model), outcome.decisions


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def check_row(given, written, limit=1e-5, dtype=np.float32):
    """Prefill, single steps, a wrong wide step that is rolled back, and a right one."""
    old, new = Appended(given, dtype), Written(written, dtype=dtype)
    for number, (count, keep) in enumerate(CALLS):
        ids = tokens(count, seed=number)
        expected = old.step(ids, keep)
        found = new.step(ids[None], count if keep else 0)
        assert found.dtype == np.float32
        assert error(found[0], expected) <= limit


# ------------------------------------------------------------ files of exporters


@pytest.mark.parametrize("name", EXPORTS)
def test_decoding_gives_the_same_logits(name):
    _, given, written, _ = export(name)
    check_row(given, written)


@pytest.mark.parametrize("name", EXPORTS)
def test_rows_of_different_lengths_do_not_see_each_other_or_their_padding(name):
    _, given, written, _ = export(name)
    lengths, new = (9, 4), Written(written, rows=2)
    alone = [Appended(given) for _ in lengths]
    ids = tokens(2, max(lengths))
    for counts in (lengths, (1, 1), (2, 4)):
        ids = tokens(2, max(counts), seed=sum(counts))
        logits = new.step(ids, counts)
        for row, count in enumerate(counts):
            assert error(logits[row, :count], alone[row].step(ids[row, :count])) <= 1e-5


@pytest.mark.parametrize("name", EXPORTS)
def test_the_result_has_the_portable_layout(name):
    model, given, _, _ = export(name)
    layers = [f"{layer}.{part}" for layer in range(len(model.graph.outputs) // 2) for part in ("key", "value")]
    inputs = {str(value.name): [str(size) for size in value.shape] for value in model.graph.inputs}
    outputs = {str(value.name): [str(size) for size in value.shape] for value in model.graph.outputs}
    assert list(inputs) == ["input_ids", "position_ids", "write_indices", *(f"past_key_values.{p}" for p in layers)]
    assert list(outputs) == ["logits", *(f"present.{part}" for part in layers)]
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "sequence"]
    assert inputs["write_indices"] == ["batch"]
    assert outputs["logits"] == ["batch", "sequence", str(VOCABULARY)]
    heads = str(next(value.shape[1] for value in given.get_inputs() if len(value.shape) == 4))
    for part in layers:
        past = inputs[f"past_key_values.{part}"]
        assert past == outputs[f"present.{part}"]
        assert past[:3] == ["batch", heads, "max_seq"]
    assert (model.opset_imports[""], model.ir_version) == (24, 11)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("TensorScatter") == 2 * kinds.count("Attention") == len(layers)
    assert not {"Softmax", "IsNaN", "CumSum"} & set(kinds)


@pytest.mark.parametrize("name", EXPORTS[:2])
def test_a_second_run_changes_nothing(name):
    model = export(name)[0].clone()
    before = content(model)
    outcome = KvCache()(model)
    assert not outcome.modified
    assert content(model) == before


def test_heads_are_no_longer_repeated():
    model, *_ = export("llama_past_optimum")
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert [attention.inputs[at].shape[1] for at in (1, 2)] == [1, 1]
    assert "Expand" not in {node.op_type for node in model.graph if "layers" in (node.name or "")}


def test_a_window_is_found_and_kept():
    (decision,) = export("mistral_past_optimum")[3]
    assert "a window of 6 positions" in decision.reason


def test_biases_by_distance_are_refused():
    model = ir.load(MODELS / "bloom_past_optimum.onnx")
    check_refused(model, r"\(Softmax\): .*positions or a cap change the scores")


def check_refused(model, told):
    before = content(model)
    with pytest.raises(ModelInvalid, match=told):
        to_portable(model)
    assert content(model) == before


def content(model):
    """Everything in a model but the names of tensors in Constant nodes, which clones of it share."""
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        for attribute in node.attribute:
            attribute.t.ClearField("name")
    return proto.SerializeToString(deterministic=True)


# ------------------------------------------------------------ one small decoder, and what can be wrong with it

PARTS = {
    "appended": "nk = Concat <axis = 2> (pk, k)  nv = Concat <axis = -2> (pv, v)",
    "positions": "counted = CumSum(attention_mask, one)  zeroth = Sub(counted, one)"
    "  P = Shape <start = 2, end = 3> (pk)  at = Slice(zeroth, P, T, ones)",
    "seen": "columns = Range(zero, end, one)  rows = Unsqueeze(at, axes)  seen = LessOrEqual(columns, rows)",
    "keys": "rk = Expand(nk, twice)  rv = Expand(nv, twice)",
    "scores": "kt = Transpose <perm = [0, 1, 3, 2]> (rk)  raw = MatMul(q, kt)  scaled = Mul(raw, scale)",
    "masked": "masked = Where(seen, scaled, low)",
    "weights": "weights = Softmax <axis = -1> (masked)",
    "context": "context = MatMul(weights, rv)",
    "logits": "logits = MatMul(merged, head)",
}
GRAPH = """g (int64[B, S] input_ids, int64[B, T] attention_mask, float[B, 1, P, 4] pk, float[B, 1, P, 4] pv) =>
    (float[B, S, 16] logits, float[B, 1, T, 4] nk, float[B, 1, T, 4] nv) {{
    T = Shape <start = 1> (attention_mask)  end = Squeeze(T)  {positions}
    words = Gather(table, input_ids)  places = Gather(table, at)  x = Add(words, places)
    wide = MatMul(x, wq)  apart = Reshape(wide, split)  q = Transpose <perm = [0, 2, 1, 3]> (apart)
    k1 = MatMul(x, wk)  k = Unsqueeze(k1, ones)  v1 = MatMul(x, wv)  v = Unsqueeze(v1, ones)
    {appended}
    {seen}  {keys}  {scores}  {masked}  {weights}  {context}
    back = Transpose <perm = [0, 2, 1, 3]> (context)  merged = Reshape(back, whole)  {logits} }}"""


def decoder(opset=20, dtype="float", **parts):
    """A layer with two query heads of four for one key head, positions counted from the mask, some parts replaced."""
    rng, kind = np.random.default_rng(5), {"float": np.float32, "float16": np.float16}[dtype]
    shapes = {"table": (LENGTH, 8), "wq": (8, 8), "wk": (8, 4), "wv": (8, 4), "square": (4, 4), "head": (8, 16)}
    weights = {name: rng.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    weights |= {name: kind(number) for name, number in (("scale", 0.4), ("low", -6e4), ("half", 0.5))}
    numbers = {"zero": 0, "one": 1, "two": 2, "nine": 9, "thirty": 30, "ones": [1], "zeros": [0], "axes": [1, 3]}
    numbers |= {"split": [0, 0, 2, 4], "whole": [0, 0, 8], "twice": [1, 2, 1, 1]}
    weights |= {name: np.array(number, np.int64) for name, number in numbers.items()}
    return model_from(GRAPH.format(**(PARTS | parts)).replace("float[", f"{dtype}["), opset, **weights)


def check_decoder(model, limit=1e-5, dtype=np.float32):
    given = session(model)
    outcome = to_portable(model)
    check_row(given, session(model), limit, dtype)
    return outcome.decisions


def test_names_of_caches_do_not_matter():
    (decision,) = check_decoder(decoder())
    assert (decision.action, decision.detail) == ("fused", "scale 0.4")
    assert "all positions" in decision.reason


def test_half_precision_keeps_its_caches_and_gives_logits_in_float32():
    model = decoder(dtype="float16")
    check_decoder(model, limit=2e-2, dtype=np.float16)
    assert next(value.dtype for value in model.graph.inputs if value.name.endswith("key")) == ir.DataType.FLOAT16


def test_positions_may_be_counted_from_the_past():
    behind = "P = Shape <start = 2, end = 3> (pk)  first = Squeeze(P)  row = Range(first, end, one)"
    check_decoder(decoder(positions=f"{behind}  at = Unsqueeze(row, zeros)"))


@pytest.mark.parametrize("far", ["nine", "thirty"])
def test_a_window_written_as_a_difference_is_found(far):
    seen = f"{PARTS['seen'].replace('seen =', 'past =')}  behind = Sub(rows, columns)  near = Less(behind, {far})"
    (decision,) = check_decoder(decoder(seen=f"{seen}  seen = And(past, near)"))
    assert f"a window of {9 if far == 'nine' else 30} positions" in decision.reason


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (
            {"masked": "bent = Tanh(scaled)  masked = Where(seen, bent, low)"},
            r"\(Softmax\): .*positions or a cap change the scores",
        ),
        ({"seen": "no = Less(input_ids, input_ids)  all = Not(no)  seen = Unsqueeze(all, axes)"}, "shows more"),
        (
            {
                "seen": "columns = Range(zero, end, one)  rows = Unsqueeze(at, axes)  past = LessOrEqual(columns, rows)"
                "  odd = Mod(columns, two)  keep = Equal(odd, zero)  seen = And(past, keep)"
            },
            "hides some of the past",
        ),
        (
            {"weights": "sharp = Softmax <axis = -1> (masked)  weights = Mul(sharp, half)"},
            "weights or values are changed",
        ),
        ({"scores": PARTS["scores"].replace("Mul(raw, scale)", "Neg(raw)")}, "the scale is not positive"),
        (
            {"logits": "plain = MatMul(merged, head)  many = ReduceSum(attention_mask)  n = Cast <to = 1> (many)"
             "  logits = Div(plain, n)"},
            r"\(ReduceSum\): .*attention_mask has other uses than the mask and positions",
        ),
        (
            {"logits": "plain = MatMul(merged, head)  n = Cast <to = 1> (P)  logits = Add(plain, n)"},
            r"\(Shape\): .*pk has other uses",
        ),
        (
            {"logits": "p = MatMul(merged, head)  o = MatMul(nk, square)  n = ReduceMax(o)  logits = Add(p, n)"},
            "nk.*read by 2 products",
        ),
    ],
    ids=["cap", "future", "holes", "weights", "negative", "mask elsewhere", "length elsewhere", "two readers"],
)  # fmt: skip
def test_what_is_not_plain_attention_is_refused_and_left_as_it_was(parts, told):
    check_refused(decoder(**parts), told)


ATTENTION = {
    "keys": "",
    "scores": "",
    "masked": "",
    "weights": "",
    "context": "context = Attention <scale = 0.4> (q, nk, nv, seen)",
}
INSIDE = {
    **ATTENTION,
    "appended": "",
    "context": "context, nk, nv = Attention <scale = 0.4> (q, k, v, seen, pk, pv)",
}


@pytest.mark.parametrize("parts", [ATTENTION, INSIDE], ids=["caches appended before", "caches appended inside"])
def test_an_attention_node_is_taken_as_a_whole(parts):
    (decision,) = check_decoder(decoder(opset=23, **parts))
    assert (decision.op, decision.detail) == ("Attention", "scale 0.4")


def test_an_attention_node_with_a_cap_is_refused():
    capped = {**ATTENTION, "context": "context = Attention <scale = 0.4, softcap = 1.0> (q, nk, nv, seen)"}
    check_refused(decoder(opset=23, **capped), r"\(Attention\): .*or a cap change the scores")


def test_an_attention_node_that_counts_causality_from_the_first_column_is_refused():
    causal = {**ATTENTION, "context": "context = Attention <scale = 0.4, is_causal = 1> (q, nk, nv)"}
    check_refused(decoder(opset=23, **causal), r"\(Attention\): .*no causal mask")


def test_inputs_and_outputs_nobody_knows_are_refused():
    model = decoder()
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "Softmax").outputs[0])
    check_refused(model, "weights.*not just logits and caches")
    model = decoder()
    model.graph.inputs.append(ir.val("num_logits", ir.DataType.INT64, [1]))
    check_refused(model, "num_logits.*neither an input of a decoder")


def test_a_merged_decoder_is_refused_with_what_to_give_instead():
    model = decoder()
    model.graph.inputs.append(ir.val("use_cache_branch", ir.DataType.BOOL, [1]))
    check_refused(model, "merged decoder, give decoder_with_past_model.onnx")


def test_a_model_without_caches_is_refused():
    text = "g (int64[B, S] input_ids) => (float[B, S, 4] logits) { logits = Gather(w, input_ids) }"
    check_refused(model_from(text, w=np.ones((8, 4), np.float32)), "no decoder with caches")


def test_the_pass_alone_says_which_opset_it_needs():
    model = decoder()
    outcome = KvCache()(model)
    assert not outcome.modified
    assert "needs opset 24, model has 20" in outcome.decisions[0].reason


# ------------------------------------------------------------ engines


@pytest.mark.rtx
def test_a_rewritten_decoder_builds_in_half_precision():
    rtx = pytest.importorskip("tensorrt_rtx")
    model = export("llama_past_optimum")[0].clone()
    assert Half(target="tensorrt-rtx")(model).modified
    sizes = {"batch": (1, 1, 2), "sequence": (1, 1, 8), "max_seq": (32, 32, 32)}
    profile = {
        value.name: tuple([n if isinstance(n, int) else sizes[str(n)][at] for n in value.shape] for at in range(3))
        for value in model.graph.inputs
    }
    options = EngineOptions((profile,), frozen=(("max_seq", 32),))
    engine = build_engine(ir.to_proto(model).SerializeToString(), rtx, options)
    assert engine.info.layers > 50
