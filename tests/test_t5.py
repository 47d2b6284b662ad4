"""T5 built from config and weights: one plain graph, or encoder and decoder; against numpy and transformers."""

from __future__ import annotations

import folders
import numpy as np
import onnx_ir as ir
import pytest
from folders import read
from helpers import session
from stepping import checked, demand_same, engine_of, opened, ragged, same_graph, stepped
from t5_models import CONFIG, weights, write

from qexport.errors import ModelInvalid
from qexport.exporter.families.builder import COPY
from qexport.exporter.families.form import Form
from qexport.exporter.families.t5 import build, build_encoder
from qexport.exporter.families.t5_layers import buckets
from qexport.exporter.load import PARTS, load_model, load_source
from qexport.exporter.references.t5 import bucket

CACHED = Form(cached=True)
RNG = np.random.default_rng(5)
MASK = np.stack([np.ones(22, np.int64), (np.arange(22) < 13).astype(np.int64)])
SOURCE, TOKENS = RNG.integers(0, 50, (2, 22)), RNG.integers(0, 50, (2, 30))
FEEDS = {"input_ids": SOURCE, "attention_mask": MASK, "decoder_input_ids": TOKENS}
SIZES = {"batch": (1, 1, 2), "sequence": (1, 1, 8), "encoder_sequence": (1, 8, 32), "decoder_sequence": (1, 8, 32)}


def truth_of(path, feeds=FEEDS):
    return folders.truth_of(path, feeds)["logits"]


def answer(model, feeds=FEEDS):
    return session(model).run(["logits"], feeds)[0]


def context_of(path, form=CACHED, feeds=FEEDS):
    """What the decoder reads once per source, by the encoder."""
    runner = session(build_encoder(*read(path), form))
    given = {name: feeds[name] for name in ("input_ids", "attention_mask")}
    found = dict(zip([value.name for value in runner.get_outputs()], runner.run(None, given), strict=True))
    assert found.pop("last_hidden_state").dtype == np.float32
    return {**found, "encoder_attention_mask": feeds["attention_mask"]}


def row(context, index):
    return {name: array[index : index + 1] for name, array in context.items()}


VARIANTS = {
    "t5": {},
    "t5 1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "as many layers": {"num_decoder_layers": None, "feed_forward_proj": "gated-silu"},
    "saved again": {"scale_decoder_outputs": False, "tie_word_embeddings": True, "relative_attention_num_buckets": 20},
}
CLASSES = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}


@pytest.fixture(params=VARIANTS)
def folder(tmp_path, request):
    return write(tmp_path / "m", **VARIANTS[request.param])


def test_the_plain_graph_computes_what_the_reference_does(folder):
    model = build(*read(folder))
    checked(model)
    demand_same(answer(model), truth_of(folder))


def test_pieces_steps_and_a_draft_taken_back_give_the_logits_of_the_whole_row(folder):
    truth, context = truth_of(folder), context_of(folder)
    decoder = opened(build(*read(folder), CACHED))
    for index in (0, 1):
        demand_same(stepped(decoder, TOKENS[index], row(context, index)), truth[index])


def test_rows_of_different_lengths_and_sources_give_the_logits_of_each_alone(folder):
    truth = truth_of(folder)
    decoder = opened(build(*read(folder), CACHED))
    for index, found in enumerate(ragged(decoder, TOKENS, context_of(folder))):
        demand_same(found, truth[index, : len(found)])


@pytest.mark.torch
def test_logits_are_those_of_transformers(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    original = getattr(transformers, CLASSES[read(folder)[0]["model_type"]]).from_pretrained(folder).eval()
    with torch.no_grad():
        truth = original(**{name: torch.tensor(array) for name, array in FEEDS.items()}).logits.numpy()
    demand_same(truth_of(folder), truth)
    demand_same(answer(build(*read(folder))), truth)
    decoder, context = opened(build(*read(folder), CACHED)), context_of(folder)
    demand_same(stepped(decoder, TOKENS[1], row(context, 1)), truth[1])
    for index, found in enumerate(ragged(decoder, TOKENS, context)):
        demand_same(found, truth[index, : len(found)])


COUNTS = [(count, far) for count in (4, 6, 8, 20, 32, 64) for far in (10, 33, 64, 128, 500) if far > count // 2]


@pytest.mark.parametrize(("count", "far"), COUNTS)
@pytest.mark.parametrize("both", [False, True])
def test_buckets_are_those_of_the_reference(count, far, both):
    distances = np.arange(-2 * far, 2 * far + 1)
    found = buckets(distances, count, far, both=both)
    assert found.tolist() == [bucket(-distance, count, far, both=both) for distance in distances.tolist()]
    assert (found.min(), found.max()) == (0, count // 2 * 2 - 1 if both else count - 1)


@pytest.mark.torch
@pytest.mark.parametrize("both", [False, True])
def test_buckets_are_those_of_transformers(both):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    for count, far in COUNTS:
        distances = np.arange(-2 * far, 2 * far + 1)
        truth = modeling.T5Attention._relative_position_bucket(torch.tensor(distances), both, count, far).numpy()
        np.testing.assert_array_equal(buckets(distances, count, far, both=both), truth)


@pytest.mark.parametrize("make", [build, build_encoder])
@pytest.mark.parametrize("cached", [False, True])
def test_read_late_weights_are_the_same(tmp_path, make, cached):
    folder = write(tmp_path / "m")
    assert same_graph(*(make(*read(folder), Form(cached=cached, lazy=lazy)) for lazy in (False, True)))


def test_the_logits_of_float16_are_near(tmp_path):
    folder = write(tmp_path / "m")
    truth, half = truth_of(folder), Form(ir.DataType.FLOAT16, cached=True)
    decoder, context = opened(build(*read(folder), half)), context_of(folder, half)
    assert {array.dtype for array in context.values()} == {np.dtype(np.float16), np.dtype(np.int64)}
    assert 1e-6 < np.abs(stepped(decoder, TOKENS[1], row(context, 1)) - truth[1]).max() / np.abs(truth).max() < 1e-2
    plain = answer(build(*read(folder), Form(ir.DataType.FLOAT16)))
    assert np.abs(plain - truth).max() / np.abs(truth).max() < 1e-2


def test_no_step_of_the_decoder_computes_keys_of_the_source(tmp_path):
    folder = write(tmp_path / "m")
    decoder, encoder = build(*read(folder), CACHED), build_encoder(*read(folder), CACHED)
    crossed = [f"decoder.block.{layer}.layer.1.EncDecAttention.{part}.weight" for layer in range(3) for part in "kv"]
    assert not set(crossed) & set(decoder.graph.initializers)
    assert set(crossed) <= set(encoder.graph.initializers)
    names = {f"cross_key_values.{layer}.{kind}" for layer in range(3) for kind in ("key", "value")}
    assert {value.name for value in encoder.graph.outputs} == names | {"last_hidden_state"}
    assert set(opened(decoder).signature.context) == names | {"encoder_attention_mask"}
    for value in (*encoder.graph.outputs, *decoder.graph.inputs):
        if value.name in names:
            assert list(value.shape) == ["batch", 2, "encoder_sequence", 16]


def test_what_stands_at_masked_places_of_the_source_changes_nothing(tmp_path):
    model = build(*read(write(tmp_path / "m")))
    other = {**FEEDS, "input_ids": np.where(MASK == 1, SOURCE, 7)}
    np.testing.assert_allclose(answer(model, other), answer(model), atol=1e-5)
    unmasked = answer(model, {**other, "attention_mask": np.ones_like(MASK)})
    assert np.abs(unmasked[1] - answer(model)[1]).max() > 1e-2
    short = {name: array[1:, :13] if name != "decoder_input_ids" else array[1:] for name, array in FEEDS.items()}
    np.testing.assert_allclose(answer(model, short), answer(model)[1:], atol=1e-5)


def test_no_token_sees_a_later_one(tmp_path):
    model = build(*read(write(tmp_path / "m")))
    changed = {**FEEDS, "decoder_input_ids": np.where(np.arange(30) < 17, TOKENS, (TOKENS + 1) % 50)}
    one, other = answer(model), answer(model, changed)
    np.testing.assert_array_equal(one[:, :17], other[:, :17])
    assert (np.abs(one - other)[:, 17:].max(-1) > 1e-3).all()


@pytest.mark.parametrize("kept", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_the_table_of_embeddings_is_found_by_its_other_names(tmp_path, kept):
    plain = write(tmp_path / "plain")
    other = write(tmp_path / "other", {name.replace("shared.weight", kept): w for name, w in weights(CONFIG).items()})
    assert same_graph(build(*read(plain)), build(*read(other)))
    np.testing.assert_array_equal(truth_of(plain), truth_of(other))


def test_tied_embeddings_are_counted_once(tmp_path):
    folder = write(tmp_path / "m")
    model = load_model(folder)
    assert model.graph.initializers["lm_head.weight"].meta[COPY] == "shared.weight"
    real = sum(tensor.size for tensor in weights(CONFIG).values())
    assert 0 <= load_source(folder).info.parameters - real < 128  # biases by distance instead of bucket, and shapes


def test_the_second_file_is_listed_for_the_families_that_have_one():
    assert set(PARTS) == {"t5", "mt5"}
    assert PARTS["t5"] == {"encoder.onnx": f"{build_encoder.__module__}:{build_encoder.__name__}"}


@pytest.mark.rtx
@pytest.mark.parametrize("make", [build, build_encoder])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_both_parts_build_for_rtx(tmp_path, make, dtype):
    pytest.importorskip("tensorrt_rtx")
    folder = write(tmp_path / "m", num_layers=1, num_decoder_layers=2)
    assert engine_of(make(*read(folder), Form(dtype, cached=True)), SIZES).plan


@pytest.mark.rtx
def test_the_plain_graph_builds_for_rtx(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    assert engine_of(build(*read(write(tmp_path / "m", num_layers=1, num_decoder_layers=1))), SIZES).plan


@pytest.mark.parametrize("name", ["T5ForSequenceClassification", "T5EncoderModel"])
def test_a_class_with_another_head_is_refused(tmp_path, name):
    with pytest.raises(ModelInvalid, match=f"'{name}' is not built from model_type 't5'"):
        load_model(write(tmp_path / "m", architectures=[name]))


BAD = {
    "feed forward": ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj"),
    "no layers": ({"num_layers": 0}, "num_layers"),
    "no size of heads": ({"d_kv": None}, "d_kv"),
    "few buckets": ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets"),
    "near": ({"relative_attention_max_distance": 4}, "max_distance is not above half"),
    "without end": ({"relative_attention_max_distance": 1 << 40}, "relative_attention_max_distance"),
    "another width": ({"d_ff": 41}, r"wi.weight' is \[40, 24\], config.json asks for \[41, 24\]"),
    "gated": ({"feed_forward_proj": "gated-gelu"}, r"wi_0.weight' is missing"),
    "more layers": ({"num_decoder_layers": 4}, r"'decoder.block.3.layer.0.layer_norm.weight' is missing"),
    "no head": ({"tie_word_embeddings": False}, r"'lm_head.weight' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_cannot_be_built_is_refused_by_the_field(tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(ModelInvalid, match=message):
        load_model(write(tmp_path / "m", weights(CONFIG), **changes))
