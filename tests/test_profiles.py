from __future__ import annotations

import statistics

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.errors import DataInvalid, UsageError
from qexport.exporter.engines.profiles import check_profile, derive_profile


def value(name, *axes):
    """A graph input; a string is a named axis, ``None`` a dynamic axis without name."""
    return ir.Value(name=name, shape=ir.Shape(axes), type=ir.TensorType(ir.DataType.FLOAT))


TOKENS = [value("input_ids", "batch", "sequence"), value("attention_mask", "batch", "sequence")]


def samples(*lengths):
    return [{"input_ids": (length,), "attention_mask": (length,)} for length in lengths]


def test_a_text_model_gets_batches_and_the_lengths_that_were_seen():
    profile = derive_profile(TOKENS, samples(7, 10, 11, 40))
    assert profile == dict.fromkeys(("input_ids", "attention_mask"), ([1, 7], [8, 16], [32, 64]))


def test_a_limit_is_the_largest_length_and_short_texts_are_allowed():
    profile = derive_profile(TOKENS, samples(7, 10, 40), limit=128)
    assert profile["input_ids"] == ([1, 1], [8, 16], [32, 128])


def test_a_sample_above_the_limit_still_fits():
    assert derive_profile(TOKENS, samples(7, 200), limit=128)["input_ids"][2] == [32, 200]


def test_a_size_that_never_varied_stays():
    inputs = [value("image", "n", 3, "height", "width")]
    profile = derive_profile(inputs, [{"image": (3, 30, 50)}, {"image": (3, 30, 70)}])
    assert profile["image"] == ([1, 3, 30, 50], [8, 3, 30, 56], [32, 3, 30, 128])


def test_static_axes_stay_the_batch_too():
    assert derive_profile([value("x", 4, 3)], [{"x": (3,)}]) == {"x": ([4, 3], [4, 3], [4, 3])}


def test_the_best_batch_is_never_above_the_largest():
    assert derive_profile([value("x", "n", 3)], [], max_batch=2)["x"] == ([1, 3], [2, 3], [2, 3])


def test_unnamed_first_axes_are_one_batch_and_other_unnamed_axes_are_their_own():
    inputs = [value("a", None, None), value("b", None, None)]
    profile = derive_profile(inputs, [{"a": (2,), "b": (30,)}, {"a": (3,), "b": (30,)}])
    assert profile == {"a": ([1, 2], [8, 4], [32, 4]), "b": ([1, 30], [8, 30], [32, 30])}


def test_axes_of_one_name_share_what_was_seen_in_any_input():
    inputs = [value("a", "n", "length"), value("b", "n", "length")]
    profile = derive_profile(inputs, [{"a": (5,), "b": (5,)}, {"a": (90,), "b": (90,)}, {"a": (5,)}])
    assert profile["a"] == profile["b"] == ([1, 5], [8, 8], [32, 128])


def test_an_empty_axis_is_built_for_one():
    assert derive_profile([value("past", "n", "length")], [{"past": (0,)}])["past"] == ([1, 1], [8, 1], [32, 1])


def test_an_initializer_is_no_input():
    weight = value("w", 3)
    weight.const_value = ir.tensor([1.0, 2.0, 3.0], name="w")
    graph = ir.Graph([value("x", "n", 3), weight], [], nodes=[], initializers=[weight])
    assert list(derive_profile(graph.inputs, [])) == ["x"]


def test_a_dynamic_axis_nobody_saw_asks_for_a_profile():
    with pytest.raises(UsageError, match="no data to see its sizes") as caught:
        derive_profile(TOKENS, [])
    assert "[export.profiles]" in caught.value.hint
    assert derive_profile(TOKENS, [], limit=64)["input_ids"] == ([1, 1], [8, 64], [32, 64])


def test_an_input_of_unknown_rank_is_a_usage_error():
    with pytest.raises(UsageError, match="how many axes"):
        derive_profile([ir.Value(name="x")], [])


def test_a_sample_of_another_rank_is_invalid_data():
    with pytest.raises(DataInvalid, match=r"sample 1 has the shape \(1, 7\), expected 1 axes"):
        derive_profile(TOKENS, [{"input_ids": (7,)}, {"input_ids": (1, 7)}])


@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    limit=st.none() | st.integers(1, 6000),
    max_batch=st.integers(1, 64),
)
def test_every_derived_profile_is_in_order_fits_the_samples_and_passes_the_check(lengths, limit, max_batch):
    profile = derive_profile(TOKENS, samples(*lengths), limit=limit, max_batch=max_batch)
    (_, low), (best_batch, best), (high_batch, high) = profile["input_ids"]
    assert 1 <= low <= best <= high
    assert best_batch <= high_batch == max_batch
    assert high >= max(lengths)
    assert low == (1 if limit else max(1, min(lengths)))
    assert best >= min(statistics.median_low(lengths), high)
    assert limit is None or high == max(limit, *lengths)
    assert check_profile(TOKENS, profile) == profile


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.randoms())
def test_the_order_of_samples_does_not_matter(lengths, random):
    shuffled = random.sample(lengths, len(lengths))
    assert derive_profile(TOKENS, samples(*lengths)) == derive_profile(TOKENS, iter(samples(*shuffled)))


def explicit(ids=((1, 8), (8, 64), (32, 128)), mask=None):
    return {"input_ids": ids, "attention_mask": ids if mask is None else mask}


def test_a_written_profile_is_taken_as_it_is():
    assert check_profile(TOKENS, explicit())["attention_mask"] == ([1, 8], [8, 64], [32, 128])


def test_static_inputs_may_be_left_out_of_a_written_profile():
    inputs = [*TOKENS, value("fixed", 2, 3)]
    assert check_profile(inputs, explicit())["fixed"] == ([2, 3], [2, 3], [2, 3])


@pytest.mark.parametrize(
    ("given_profile", "message"),
    [
        (explicit(((9, 8), (8, 64), (32, 128))), r"smallest <= best <= largest, got 9, 8, 32"),
        (explicit(((1, 8), (8, 129), (32, 128))), r"'input_ids', axis 1.*got 8, 129, 128"),
        (explicit(((0, 8), (8, 64), (32, 128))), "1 <= smallest"),
        (explicit(((1,), (8,), (32,))), "three shapes of 2 sizes"),
        (explicit(((1, 8), (8, 64))), "three shapes"),
        (explicit(mask=((1, 8), (8, 64), (16, 128))), r"axis 'batch' has sizes 1, 8, 16 here and \(1, 8, 32\)"),
        ({"input_ids": explicit()["input_ids"]}, "'attention_mask': the profile is missing"),
        ({**explicit(), "input_id": explicit()["input_ids"]}, "did you mean 'input_ids'"),
        ({**explicit(), "zzz": explicit()["input_ids"]}, "inputs: input_ids, attention_mask"),
    ],
)
def test_a_written_profile_that_contradicts_itself_or_the_model_is_a_usage_error(given_profile, message):
    with pytest.raises(UsageError, match=message):
        check_profile(TOKENS, given_profile)


def test_a_written_profile_cannot_change_a_static_size():
    with pytest.raises(UsageError, match="the model says 3, the profile 1, 3, 3"):
        check_profile([value("x", "n", 3)], {"x": [[1, 1], [1, 3], [1, 3]]})


def test_unnamed_batches_must_agree_in_a_written_profile():
    inputs = [value("a", None, 3), value("b", None, 3)]
    shapes = {"a": [[1, 3], [2, 3], [4, 3]], "b": [[1, 3], [2, 3], [8, 3]]}
    with pytest.raises(UsageError, match="the axis batch has sizes"):
        check_profile(inputs, shapes)
