"""Where units can be removed: the spaces of small models and of the shipped ones, each with its size or a reason."""

import numpy as np
import onnx_ir as ir
import pytest
from channel_models import build
from cut_models import MODELS, bytes_of, check, cuts, make, outputs_of, silence

from qexport.calibration.running.execute import open_model
from qexport.exporter.load import load_model
from qexport.passes.cleanup import Cleanup
from qexport.passes.fuse_attention import FuseAttention
from qexport.passes.pruning.spaces import find_spaces
from qexport.passes.raise_opset import RaiseOpset


def counts(model, kind):
    return [space.count for space in find_spaces(model, kind)]


def prove(model, spaces, feeds, share=0.25):
    """Remove the first units of spaces that nobody reads any more, and compare all outputs."""
    keeps = []
    for space in spaces:
        keeps.append(np.arange(space.count) >= space.count * share)
        silence(space.cut, keeps[-1])
    before = open_model(model).run(feeds)
    for space, keep in zip(spaces, keeps, strict=True):
        space.cut.apply(keep)
    check(model)
    after = open_model(model).run(feeds)
    for name, truth in before.items():
        assert np.linalg.norm(truth - after[name]) <= 1e-5 * np.linalg.norm(truth), name


def tokens(*names, rows=2, length=7):
    rng = np.random.default_rng(0)
    feeds = {name: np.ones((rows, length), np.int64) for name in names}
    feeds["input_ids"] = rng.integers(5, 400, (rows, length))
    feeds["attention_mask"][1, 4:] = 0
    return feeds | ({"token_type_ids": np.zeros((rows, length), np.int64)} if "token_type_ids" in names else {})


BERT = ("input_ids", "attention_mask", "token_type_ids")


@pytest.mark.parametrize("name", MODELS)
def test_a_search_changes_nothing_and_finds_the_same_twice(name):
    model = make(name)
    before = bytes_of(model)
    for kind in ("heads", "neurons", "channels"):
        assert counts(model, kind) == counts(model, kind)
    assert bytes_of(model) == before


def test_a_kind_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="none of"):
        find_spaces(make("mlp"), "layers")


@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_a_model_without_such_units_has_no_space(kind):
    assert find_spaces(make("mlp"), kind) == ()


def test_heads_are_no_neurons():
    found = find_spaces(make("mha"), "neurons")
    assert [space.cut for space in found] == ["it is an input of the model"]


def test_names_are_those_of_nodes_that_make_the_units():
    assert [space.name for space in find_spaces(make("mha"), "heads")] == ["Softmax/p"]
    assert [space.name for space in cuts(make("mlp"), "neurons")] == ["MatMul/y"]
    assert [space.name for space in cuts(make("convolutions"), "channels")] == ["Conv/y"]


def test_two_products_that_read_the_same_neurons_are_one_space():
    body = "y = MatMul(a, w) x = Relu(y) o = MatMul(x, v) p = MatMul(x, u) out = Add(o, p)"
    model = build(body, w="8x6", v="6x4", u="6x4", outputs="float[b, s, 4] out")
    (space,) = cuts(model, "neurons")
    assert (space.count, len(space.cut.consumers)) == (6, 2)
    assert space.cut.parameters().tolist() == [16] * 6


def test_attention_without_an_axis_of_heads_has_a_reason():
    body = "q = MatMul(a, wq) k = MatMul(a, wk) t = Transpose<perm=[0,2,1]>(k) p0 = MatMul(q, t) p = Softmax(p0) "
    model = build(body + "v = MatMul(a, wv) out = MatMul(p, v)", wq="8x8", wk="8x8", wv="8x6")
    assert [space.cut for space in find_spaces(model, "heads")] == [
        "the heads of an attention have no axis of a known size"
    ]


def test_one_head_cannot_go():
    constants = {"split": [0, 0, 1, 8], "merge": [0, 0, 8], "scale": np.float32(1)}
    *_, body, others = MODELS["mha"]
    model = build(body, **others | constants)
    assert [space.cut for space in find_spaces(model, "heads")] == ["there is one unit only"]


def test_minilm_has_all_its_heads_and_neurons(minilm):
    model = Cleanup()(load_model(minilm)).model
    heads, neurons = cuts(model, "heads"), cuts(model, "neurons")
    assert [space.count for space in heads] == [12] * 6
    assert [space.count for space in neurons] == [1536] * 6
    assert heads[0].cut.parameters().tolist() == [4 * 32 * 384 + 3 * 32] * 12
    assert set(neurons[0].cut.parameters()) == {2 * 384 + 1}
    prove(model, [*heads, *neurons], tokens(*BERT))
    assert [counts(model, "heads"), counts(model, "channels")] == [[9] * 6, []]


def test_fused_attention_of_minilm_loses_the_same_heads(minilm):
    model = Cleanup()(load_model(minilm)).model
    for step in (RaiseOpset(), Cleanup(), FuseAttention(target="ort-cpu"), Cleanup()):
        model = step(model).model
    spaces = cuts(model, "heads")
    assert [space.count for space in spaces] == [12] * 6
    prove(model, spaces, tokens(*BERT))
    assert {node.attributes["q_num_heads"].value for node in model.graph if node.op_type == "Attention"} == {9}


def test_a_decoder_loses_groups_of_heads_and_gated_neurons(samples):
    model = Cleanup()(load_model(samples / "decoder/stories260k")).model
    heads, neurons = cuts(model, "heads"), cuts(model, "neurons")
    assert [space.count for space in heads] == [4] * 5  # eight query heads share four key heads
    assert [space.count for space in neurons] == [172] * 5
    prove(model, [*heads, *neurons], tokens("input_ids", "attention_mask"))


def test_a_residual_network_loses_channels_of_its_shortcuts_too(samples):
    model = Cleanup()(load_model(samples / "resnet20/resnet20.onnx")).model
    spaces = cuts(model, "channels")
    assert sorted(space.count for space in spaces) == [16] * 3 + [32] * 3 + [64] * 4
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    prove(model, spaces, {model.graph.inputs[0].name: image})
    whole = next(space for space in cuts(model, "channels") if len(space.cut.consumers) > 1)
    assert whole.count == 48
    work = whole.cut.work()
    assert work[-1] < work[0] < work[10]  # some channels are in all blocks, others come with the second or third


def test_computed_padding_is_refused_with_a_reason(samples):
    model = Cleanup()(load_model(samples / "resnet20/resnet20.onnx")).model
    for node in [node for node in model.graph if node.op_type == "Pad"]:
        amounts = ir.node("Identity", [node.inputs[1]])
        model.graph.insert_before(node, amounts)
        node.replace_input_with(1, amounts.outputs[0])
    reasons = {space.cut for space in find_spaces(model, "channels") if isinstance(space.cut, str)}
    assert "a Pad adds a number that is computed" in reasons


def test_outputs_stay_where_every_space_of_a_model_is_cut():
    model = make("mha_with_biases")
    shape = outputs_of(model)[0].shape
    for space in cuts(model, "heads"):
        space.cut.apply(np.array([True, False, False, True]))
    assert outputs_of(model)[0].shape == shape
