"""Which samples of a build's data serve what: calibration, judgement, proofs of equality."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.load import load_source
from qexport.exporter.recipe import Recipe
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.samples import calibration_passes, longest, open_samples
from qexport.passes.portable import MAX_POSITIONS

ARRAYS = "g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }"
TOKENS = """g (int64[{n}, s] input_ids, int64[{n}, s] attention_mask) => (int64[{n}, s] y) {{
    y = Mul(input_ids, attention_mask) }}"""


def source(folder, text=ARRAYS):
    path = folder / "model.onnx"
    ir.save(ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')), path)
    return load_source(path)


def arrays(path, count, seed=0):
    np.savez(path, x=np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32))
    return path


def tokens(path, lengths):
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.arange(1, 1 + mask.size).reshape(mask.shape) * mask
    np.savez(path, input_ids=ids, attention_mask=mask)
    return path


def int8(*settings):
    return override(load_recipe("int8"), settings)


def test_the_samples_that_calibration_leaves_over_are_those_to_judge_by(tmp_path):
    opened = open_samples(source(tmp_path), int8("calibrate.samples=30"), arrays(tmp_path / "a.npz", 50), None)
    assert opened.judge.held_out
    assert len(opened.judge.data) == len(list(opened.judge.data)) == 20
    left = set(opened.judge.data.digests)
    assert left.isdisjoint(opened.calibration.digests[:30])
    assert "after the first 30" in opened.judge.data.name
    assert opened.warnings == ()


def test_too_few_samples_left_over_are_not_judged_by(tmp_path):
    opened = open_samples(source(tmp_path), int8("calibrate.samples=35"), arrays(tmp_path / "a.npz", 50), None)
    assert not opened.judge.held_out
    assert len(opened.judge.data) == 50
    assert any("--eval" in warning for warning in opened.warnings)


def test_a_calibration_that_is_switched_off_uses_no_samples(tmp_path):
    off = [f"{step}.enabled=false" for step in ("observe", "extremes", "calibrate", "correct-bias")]
    recipe = int8(*off)
    assert calibration_passes(recipe) == []
    opened = open_samples(source(tmp_path), recipe, arrays(tmp_path / "a.npz", 50), None)
    assert opened.judge.held_out
    assert len(opened.judge.data) == 50
    assert opened.judge.data.name == "a.npz"


def test_calibration_takes_as_many_samples_as_the_pass_says_by_default():
    assert set(calibration_passes(int8())) == {512}
    steps = [{"pass": "observe"}, {"pass": "calibrate", "samples": 7}, {"pass": "cleanup"}]
    assert calibration_passes(Recipe(name="two", step=steps)) == [7, 7]
    steps = [{"pass": "observe", "samples": 9}, {"pass": "calibrate"}]
    assert calibration_passes(Recipe(name="two", step=steps)) == [9, 512]


@pytest.mark.parametrize(("seed", "held_out"), [(0, False), (1, True)])
def test_data_to_judge_by_is_held_out_only_if_calibration_has_none_of_it(tmp_path, seed, held_out):
    calib, other = arrays(tmp_path / "a.npz", 50), arrays(tmp_path / "b.npz", 20, seed)
    opened = open_samples(source(tmp_path), int8(), calib, other)
    assert opened.judge.held_out == held_out
    assert any("calibration has seen" in warning for warning in opened.warnings) != held_out


def test_the_warning_counts_the_samples_that_calibration_has_seen(tmp_path):
    calib, other = tmp_path / "a.npz", tmp_path / "b.npz"
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    np.savez(calib, x=x)
    np.savez(other, x=np.concatenate([x[:3], x + 1]))
    opened = open_samples(source(tmp_path), int8(), calib, other)
    assert any("has seen too, 3 of 23;" in warning for warning in opened.warnings)


def test_a_recipe_that_calibrates_wants_data_and_another_does_not(tmp_path):
    with pytest.raises(UsageError, match="needs calibration data"):
        open_samples(source(tmp_path), int8(), None, None)
    opened = open_samples(source(tmp_path), load_recipe("float32"), None, None)
    assert (opened.calibration, opened.judge, opened.made_up) == (None, None, True)
    assert [feeds["x"].shape for feeds in opened.proof] == [(1, 4)]
    assert any("quality was not measured" in warning for warning in opened.warnings)


@pytest.mark.parametrize(("batch", "rows"), [("n", 4), ("3", 3)])
def test_equality_is_proven_on_single_samples_and_on_a_padded_batch_of_different_lengths(tmp_path, batch, rows):
    data = tokens(tmp_path / "a.npz", [5, 5, 5, 5, 2, 9, 7, 3])
    opened = open_samples(source(tmp_path, TOKENS.format(n=batch)), load_recipe("float32"), data, None)
    *single, padded = opened.proof
    assert not opened.made_up
    assert [feeds["input_ids"].shape for feeds in single] == [(1 if batch == "n" else 3, 5)] * 4
    assert all(feeds["attention_mask"].all() for feeds in single)
    mask = padded["attention_mask"]
    assert mask.shape == (rows, 9)
    assert len(set(mask.sum(axis=1).tolist())) == rows
    assert {2, 9} <= set(mask.sum(axis=1).tolist())


def test_samples_of_one_length_need_no_padding(tmp_path):
    data = tokens(tmp_path / "a.npz", [5] * 6)
    assert len(open_samples(source(tmp_path, TOKENS.format(n="n")), load_recipe("float32"), data, None).proof) == 4
    alone = open_samples(source(tmp_path, TOKENS.format(n="1")), load_recipe("float32"), data, None)
    assert {feeds["input_ids"].shape for feeds in alone.proof} == {(1, 5)}


def test_made_up_inputs_come_with_and_without_a_masked_end(tmp_path):
    opened = open_samples(source(tmp_path, TOKENS.format(n="n")), load_recipe("float32"), None, None)
    assert opened.made_up
    assert [feeds["attention_mask"].sum() for feeds in opened.proof] == [16, 12]


@pytest.mark.parametrize("told", ["", "many", "0", "-3", "1e3", "9" * 30, "٣"])
def test_metadata_that_is_no_number_of_positions_is_refused(tmp_path, told):
    model = source(tmp_path).model
    model.metadata_props[MAX_POSITIONS] = told
    with pytest.raises(ModelInvalid, match="expected a number above 0"):
        longest(model, int8())


def test_the_model_and_the_recipe_both_limit_the_tokens(tmp_path):
    model = source(tmp_path).model
    assert longest(model, int8("data.max_length=128")) == 128
    model.metadata_props[MAX_POSITIONS] = "64"
    assert longest(model, int8("data.max_length=128")) == 64
    assert longest(model, int8("data.max_length=32")) == 32
