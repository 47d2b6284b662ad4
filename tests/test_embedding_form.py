"""Which models can embed, by which output and pooling, and how long a text may be."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from embedders import HIDDEN, INPUTS, folder, hidden_of, opened, spied, unit
from helpers import write

from qexport.errors import DataInvalid, ModelInvalid, UsageError
from qexport.runtime.embedding.embedder import open_embedder
from qexport.runtime.embedding.form import FLAGS, Sizes, find_pooling, read_form
from qexport.runtime.embedding.options import EmbedOptions
from qexport.runtime.session import Port
from qexport.runtime.tokenizing import Encoded, Tokenizer

SENTENCE = "float[b,4] sentence_embedding"
TOKENS = "float[b,s,4] token_embeddings"


def listed(path, modules=(), **flags):
    """Settings of sentence-transformers."""
    if modules:
        write(path / "modules.json", json.dumps([{"type": f"some.{name}", "path": ""} for name in modules]))
    if flags:
        (path / "1_Pooling").mkdir(exist_ok=True)
        write(path / "1_Pooling/config.json", json.dumps(flags))
    return path


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("outputs", "wanted", "expected"),
    [
        (HIDDEN, None, ("last_hidden_state", "mean", False)),
        (f"{HIDDEN}, {SENTENCE}", None, ("sentence_embedding", None, False)),
        (f"{TOKENS}, {SENTENCE}", None, ("sentence_embedding", None, False)),
        (f"{HIDDEN}, {SENTENCE}", "last_hidden_state", ("last_hidden_state", "mean", False)),
        (TOKENS, None, ("token_embeddings", None, True)),
        ("float[b,4] logits", "logits", ("logits", None, False)),
        ("float[b,4] total", None, ("total", None, False)),
        ("float[b,s,4] raw", None, ("raw", "mean", False)),
    ],
)
def test_the_output_is_the_one_that_has_vectors(tmp_path, outputs, wanted, expected):
    form = opened(folder(tmp_path / "model", outputs=outputs), output=wanted).form
    assert (form.output, form.pooling, form.many) == expected
    assert form.width == 4


def test_hidden_states_and_what_the_graph_pools_give_the_same(tmp_path):
    path = folder(tmp_path / "model", outputs=f"{HIDDEN}, {SENTENCE}")
    texts = ["a b c", "d", "j i h g"]
    inside = opened(path, batch_tokens=99).embed(texts)
    rows = [hidden_of(text) for text in texts]
    plain = [unit((row - row.sum(0) / (1 + len(row))).mean(0)) for row in rows]  # the graph pools before the context
    np.testing.assert_allclose(inside, plain, rtol=1e-4)


@pytest.mark.parametrize(
    ("outputs", "inputs", "message"),
    [
        ("float[b,4] logits", INPUTS, "none is sentence_embedding"),
        ("float[b,4] total, float[b,s,4] raw", INPUTS, "none is sentence_embedding"),
        ("float[b,s] seen", INPUTS + ", float[b,3] pixel_values", "'pixel_values'"),
    ],
)
def test_models_that_are_no_encoders_are_refused(tmp_path, outputs, inputs, message):
    with pytest.raises(ModelInvalid, match=message):
        opened(folder(tmp_path / "model", outputs=outputs, inputs=inputs))


def test_decoders_with_caches_are_refused(tmp_path):
    found = session()
    found.ports += (Port("past_key_values.0.key", "tensor(float)", ("b", 2, "m", 4)),)
    with pytest.raises(ModelInvalid, match="a decoder with a cache, not an encoder"):
        read_form(found, Tokenizer.load(folder(tmp_path)), tmp_path, EmbedOptions())


def test_an_output_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(UsageError, match="no output 'last'") as raised:
        opened(folder(tmp_path / "model"), output="last")
    assert raised.value.hint == "there are: last_hidden_state"


def test_an_output_of_another_shape_than_a_batch_has_is_told(tmp_path):
    path = folder(
        tmp_path / "model",
        outputs="float[b,4] total",
        body="{ total = Gather(table, row)\n}".replace("row", "ones").replace(
            "{ ", "{ ones = Constant<value = int64[3] {1, 1, 1}>()\n"
        ),
    )
    with pytest.raises(ModelInvalid, match=r"'total' has the shape \[3, 4\] for 4 rows of 3 tokens"):
        opened(path).embed(["a", "b", "c", "d"])


# ---------------------------------------------------------------- pooling


@pytest.mark.parametrize(("flag", "name"), FLAGS.items())
def test_the_folder_says_how_to_pool(tmp_path, flag, name):
    path = listed(folder(tmp_path / "model"), ("Transformer", "Pooling", "Normalize"), **{flag: True, "other": False})
    assert opened(path).form.pooling == name
    assert opened(path, pooling="max").form.pooling == "max"


def test_a_pooling_may_be_named(tmp_path):
    assert find_pooling(listed(tmp_path, pooling_mode="cls")) == "cls"
    assert find_pooling(listed(tmp_path, pooling_mode=["max"])) == "max"


@pytest.mark.parametrize(
    "flags",
    [
        {"pooling_mode": "strange"},
        {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
        {"word": 3},
        {"pooling_mode": 5},
        {"pooling_mode": [["mean"]]},
        {"pooling_mode": {"mean": 1}},
    ],
)
def test_a_pooling_that_is_not_known_is_refused(tmp_path, flags):
    with pytest.raises(ModelInvalid, match="is not supported"):
        find_pooling(listed(tmp_path, **flags))


def test_layers_behind_the_pooling_that_the_graph_lacks_are_refused(tmp_path):
    path = listed(folder(tmp_path / "model"), ("Transformer", "Pooling", "Dense"))
    with pytest.raises(ModelInvalid, match="layers behind the pooling are not in the graph"):
        opened(path)
    assert opened(path, pooling="mean").form.pooling == "mean"


@pytest.mark.parametrize("modules", ["5", "true", '{"type": "some.Dense"}', "[5, null]"])
def test_modules_that_are_none_are_passed_over(tmp_path, modules):
    write(listed(tmp_path, pooling_mode="cls") / "modules.json", modules)
    assert find_pooling(tmp_path) == "cls"


def test_settings_that_are_damaged_are_refused(tmp_path):
    write(listed(tmp_path, word=1) / "1_Pooling/config.json", "{")
    with pytest.raises(ModelInvalid, match="cannot be read"):
        find_pooling(tmp_path)


# ---------------------------------------------------------------- lengths


def session(shape=("b", "s"), profiles=(), metadata=None):
    """What a form is read from."""
    ports = tuple(Port(name, "tensor(int64)", shape) for name in ("input_ids", "attention_mask"))
    results = (Port("last_hidden_state", "tensor(float)", (*shape, 4)),)
    return SimpleNamespace(ports=ports, results=results, profiles=profiles, metadata=metadata or {})


def form(tmp_path, most=None, settings=None, max_tokens=None, **asked):
    tokenizer = Tokenizer.load(folder(tmp_path, most=most))
    if settings is not None:
        write(tmp_path / "tokenizer_config.json", json.dumps(settings))
    return read_form(session(**asked), tokenizer, tmp_path, EmbedOptions(max_tokens=max_tokens))


POSITIONS = {"qexport.max_positions": "9"}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, None),
        ({"metadata": POSITIONS}, 9),
        ({"most": 5}, 5),
        ({"most": 50, "metadata": POSITIONS}, 9),
        ({"settings": {"model_max_length": 7}}, 7),
        ({"settings": {"model_max_length": 1e30}, "metadata": POSITIONS}, 9),
        ({"settings": {"model_max_length": 7}, "most": 6}, 6),
        ({"shape": ("b", 8), "metadata": POSITIONS}, 8),
        ({"most": 5, "max_tokens": 8, "metadata": POSITIONS}, 8),
        ({"max_tokens": 2000}, 2000),
    ],
)
def test_a_text_is_as_long_as_the_tokenizer_says_and_the_model_has_positions_for(tmp_path, asked, expected):
    assert form(tmp_path, **asked).longest == expected


def test_more_tokens_than_the_model_has_positions_for_are_refused(tmp_path):
    with pytest.raises(UsageError, match="max_tokens is 10, the model has 9 positions"):
        form(tmp_path, max_tokens=10, metadata=POSITIONS)


def test_engines_run_within_the_profile_that_goes_farthest(tmp_path):
    profiles = tuple({"input_ids": shapes} for shapes in [((1, 1), (8, 8), (8, 8)), ((2, 4), (8, 16), (16, 64))])
    found = form(tmp_path, profiles=profiles)
    assert (found.rows, found.columns, found.longest) == (Sizes(2, 16), Sizes(4, 64), 64)
    feeds = found.feeds([Encoded([0, 3, 1], [0, 0, 0], cut=False)])
    assert feeds["input_ids"].tolist() == [[0, 3, 1, 0], [0, 0, 0, 0]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("axes", ["3,s", "b,9", "3,9"])
def test_models_of_fixed_shapes_get_those_shapes(tmp_path, axes):
    path = folder(tmp_path / "model", inputs=INPUTS.replace("b,s", axes), outputs=HIDDEN.replace("b,s", axes))
    embedder, texts = opened(path), ["a b c", "d", "e f", "g h i j a b c", "a b c d e f g h i j"]
    spy = spied(embedder)
    found = embedder.embed(texts)
    for vector, text in zip(found, texts, strict=True):
        expected = unit(hidden_of(text, 9 if "9" in axes else None).mean(0))
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)
    assert all("3" not in axes or rows == 3 for rows, _ in spy.batches)
    assert all("9" not in axes or width == 9 for _, width in spy.batches)


def test_types_of_segments_and_narrow_integers_reach_the_model(tmp_path):
    inputs = "int32[b,s] input_ids, int32[b,s] token_type_ids"
    body = "{ last_hidden_state = Gather(table, token_type_ids) }"
    embedder = opened(folder(tmp_path / "model", inputs=inputs, body=body), pooling="lasttoken")
    feeds = embedder.form.feeds([Encoded([0, 3, 1], [0, 1, 1], cut=False), Encoded([0], [0], cut=False)])
    assert {name: array.dtype for name, array in feeds.items()} == dict.fromkeys(feeds, np.dtype(np.int32))
    assert feeds["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]


# ---------------------------------------------------------------- folders and options


def test_folders_without_tokenizer_or_model_are_refused(tmp_path):
    with pytest.raises(UsageError):
        open_embedder(tmp_path / "nothing")
    path = folder(tmp_path / "model")
    (path / "tokenizer.json").unlink()
    with pytest.raises(DataInvalid, match="no tokenizer"):
        open_embedder(path)
    (folder(path) / "model.onnx").unlink()
    with pytest.raises(UsageError):
        open_embedder(path)


def test_a_file_beside_its_tokenizer_will_do(tmp_path):
    path = folder(tmp_path / "model")
    np.testing.assert_array_equal(open_embedder(path / "model.onnx").embed(["a"]), open_embedder(path).embed(["a"]))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"batch_tokens": 2.5}, "batch_tokens is 2.5"),
        ({"batch_tokens": 10**30}, "batch_tokens is 1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": "5"}, "max_tokens is '5'"),
        ({"window": None}, "window is None"),
        ({"window": float("nan")}, "window is nan"),
        ({"session": None}, "session is None"),
        ({"pooling": []}, r"unknown pooling \[\]"),
        ({"window": 0}, "window is 0"),
        ({"too_long": "maybe"}, "too_long is 'maybe'"),
        ({"pooling": "median"}, "unknown pooling 'median'"),
    ],
)
def test_options_out_of_range_are_refused(asked, message):
    with pytest.raises(UsageError, match=message):
        EmbedOptions(**asked)
