"""What the shipped recipes hold in which order, and what they leave to a setting."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Samples, model_from, session

from qexport.exporter.looking.sparsity import zeros_of
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import list_recipes, load_recipe, override
from qexport.passes.pipeline import run

OFF = {
    "equalize": ("fold-batch-norm", "cleanup"),
    "adaround": ("triage", "quantize"),
    "correct-bias": ("quantize", "half"),
}


@pytest.mark.parametrize("name", list(OFF))
def test_int8_holds_passes_that_one_setting_switches_on_where_they_belong(name: str) -> None:
    recipe = load_recipe("int8")
    plain = [step.pass_ for step in recipe.step if step.enabled]
    assert name not in plain
    changed = [step.pass_ for step in override(recipe, [f"{name}.enabled=true"]).step if step.enabled]
    place = changed.index(name)
    assert (changed[place - 1], changed[place + 1]) == OFF[name]
    assert changed[:place] + changed[place + 1 :] == plain


def test_int8_begins_with_the_steps_of_float32() -> None:
    first = [step.pass_ for step in load_recipe("float32").step]
    assert [step.pass_ for step in load_recipe("int8").step if step.enabled][: len(first)] == first


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_no_recipe_switches_on_what_int8_leaves_out(name: str) -> None:
    assert not {step.pass_ for step in load_recipe(name).step if step.enabled} & set(OFF)


BLOCK = """g (float[n, s, 64] x) => (float[n, s, 64] y) {
    l = LayerNormalization(x, g, h)  u = MatMul(l, w1)  a = Add(u, b1)  e = Gelu(a)  d = MatMul(e, w2)  c = Add(d, b2)
    r = Add(c, x)  k = LayerNormalization(r, g, h)  o = MatMul(k, w3)  y = Tanh(o) }"""
SHAPES = {"w1": (64, 128), "w2": (128, 64), "w3": (64, 64), "b1": (128,), "b2": (64,), "g": (64,), "h": (64,)}


def block():
    """A feed-forward block with outlier channels, its samples, and nodes that are called like what they make."""
    rng = np.random.default_rng(0)
    numbers = {name: (rng.standard_normal(shape) / 8).astype(np.float32) for name, shape in SHAPES.items()}
    numbers["g"] = np.where(np.arange(64) == 7, 30, 1).astype(np.float32)
    model = model_from(BLOCK, opset=20, **numbers)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model, Samples({"x": rng.standard_normal((10, 64)).astype(np.float32)} for _ in range(60))


def readers(value):
    """What reads a value, or a copy of it in another type."""
    for node in value.consumers():
        yield from readers(node.outputs[0]) if node.op_type == "Cast" else [node]


def made(target, settings=()):
    """What ``sparse-int8`` makes of the block, and the decisions by step and node."""
    model, data = block()
    recipe = override(load_recipe("sparse-int8"), [f"export.target={target}", "sparsify.min_dim=0", *settings])
    product, steps = run(model, instantiate(recipe, {"data": data, "advance": lambda: None}))
    return product, {(step.name, d.node): d for step in steps for d in step.decisions}


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt", "ort-cpu"])
def test_every_weight_of_sparse_int8_is_stored_2_to_4_whatever_became_of_its_layer(target):
    model, said = made(target, ["quantize.keep=['d']", "triage.share=0.2"])
    zeros = zeros_of(model)
    assert len(zeros) == 3
    assert all(found.two_of_four for found in zeros)
    assert {found.stored for found in zeros} == {"int8", "float16" if target != "ort-cpu" else "float32"}
    assert said["quantize", "d"].action == "skipped"
    assert {said["sparsify", name].action for name in "udo"} == {"pruned"}


def test_sparse_products_hand_on_integers_to_engines_alone():
    model, said = made("tensorrt-rtx", ["triage.most=0", "quantize.min_sqnr=0"])
    ends = {"u": "a", "d": "c", "o": "o"}
    values = {value.name: value for node in model.graph for value in node.outputs}
    for product, value in ends.items():
        assert {node.op_type for node in readers(values[value])} == {"QuantizeLinear"}
        assert said["quantize", product].reason == "2:4 weight, activation and output"
    plain, said = made("ort-cpu", ["triage.most=0", "quantize.min_sqnr=0"])
    assert {said["quantize", product].reason for product in ends} == {"weight and activation"}
    assert sum(node.op_type == "QuantizeLinear" for node in plain.graph) == 3


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_sparse_int8_is_close_to_what_its_zeros_alone_leave(target):
    model, data = block()
    x = np.stack([sample["x"] for sample in data])
    steps = instantiate(override(load_recipe("sparse-int8"), ["sparsify.min_dim=0"]), {"data": data})
    pruned, _ = run(model, [(name, step) for name, step in steps if name == "sparsify"])
    truth, alone, found = (session(m).run(None, {"x": x})[0] for m in (model, pruned, made(target)[0]))
    assert np.linalg.norm(found - alone) < 0.2 * np.linalg.norm(alone - truth)


def test_prune_heads_is_float32_with_one_step_between() -> None:
    plain = [step.pass_ for step in load_recipe("float32").step]
    found = [step.pass_ for step in load_recipe("prune-heads").step if step.enabled]
    place = found.index("heads")
    assert (found[place - 1], found[place + 1]) == ("fold-batch-norm", "cleanup")
    assert found[:place] + found[place + 1 :] == plain
    (heads,) = (step for step in override(load_recipe("prune-heads"), ["heads.keep=0.5"]).step if step.pass_ == "heads")
    assert heads.options == {"keep": 0.5}
