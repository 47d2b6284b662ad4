"""Decoders judged by running text: windows of tokens, perplexity batch by batch, and a build from end to end."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import qexport
from qexport.calibration.reading.data import DataSpec, InputSpec, open_dataset
from qexport.calibration.reading.evaluation import open_evaluation
from qexport.calibration.reading.spec import scores_tokens
from qexport.calibration.reading.tasks import Perplexity, token_losses
from qexport.calibration.running.execute import open_model
from qexport.errors import DataInvalid, GateFailed, ResourceExhausted, UsageError
from qexport.exporter.load import load_source
from qexport.exporter.options import BuildOptions
from qexport.exporter.outcome.result import Quality, TaskScore
from qexport.exporter.proof.gates import check_gates
from qexport.exporter.proof.layout import ELEMENTS, find_layout
from qexport.exporter.proof.quality import Judge, compare
from qexport.exporter.recipe import GatesSpec
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.samples import data_spec, open_samples
from qexport.passes.target import find_target
from qexport.runtime.decoder import Decoder

I64 = np.dtype(np.int64)
FREE = tuple(InputSpec(name, I64, (None, None)) for name in ("input_ids", "attention_mask"))
WORDS = ["<s>", "?", "a", "b", "c", "d", "e", "f"]
TARGET = find_target("ort-cpu")
SMALL = ("data.max_length=64", "export.never_worse=false")  # speed is no matter here


def fixed(length, *names):
    return tuple(InputSpec(name, I64, (None, length)) for name in names)


@pytest.fixture
def tokenizer(tmp_path):
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(3)  # as some published files have it; reading must switch it off
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c\n\nd e f\na b c d\n")  # with <s>: 11 tokens
    return path


TOKENS = [0, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5]


def model_from(text, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


BIGRAM = """g (int64[n, s] input_ids, int64[n, s] attention_mask) => (float[n, s, v] logits) {
    logits = Gather(table, input_ids) }"""


def bigram(seed=0, vocabulary=8):
    return model_from(BIGRAM, table=np.random.default_rng(seed).standard_normal((8, vocabulary)))


def plain_perplexity(logits, ids, mask):
    """Token after token, in plain Python floats."""
    losses = []
    for row in range(len(ids)):
        for t in range(len(ids[row]) - 1):
            if mask[row][t] and mask[row][t + 1]:
                chances = [math.exp(score) for score in logits[row][t]]
                losses.append(-math.log(chances[ids[row][t + 1]] / sum(chances)))
    return math.exp(sum(losses) / len(losses))


@given(st.integers(0, 99), st.lists(st.integers(1, 7), min_size=1, max_size=6).filter(lambda n: max(n) > 1))
def test_perplexity_is_that_of_a_loop_however_the_windows_are_batched(seed, lengths):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    logits = 4 * rng.standard_normal((*ids.shape, 5))
    truth = plain_perplexity(logits.tolist(), ids.tolist(), mask.tolist())
    for size in (1, 2, 6):
        fold = Perplexity().fold()
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            indices = list(range(len(ids)))[part]
            feeds = {"input_ids": ids[part], "attention_mask": mask[part]}
            fold.add(indices, feeds, logits[part].reshape(len(indices), -1))
        assert fold.score() == pytest.approx(truth, rel=1e-12)
        best = [logits[row, t].argmax() for row, length in enumerate(lengths) for t in range(length - 1)]
        assert fold.predictions().tolist() == best


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    fold = Perplexity().fold()
    fold.add([0], {"input_ids": np.arange(7)[None]}, np.full((1, 7, 9), 3.0))
    assert fold.score() == pytest.approx(9)


def test_large_logits_and_large_losses_give_numbers():
    losses = token_losses(np.array([[1e4, -1e4], [-1e4, 1e4]]), np.array([0, 0]))
    np.testing.assert_allclose(losses, [0, 2e4])
    fold = Perplexity().fold()
    fold.add([0], {"input_ids": np.array([[0, 0]])}, np.array([[[-1e4, 1e4]] * 2]))
    assert math.isfinite(fold.score())


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 5), (1, 3, 8), (2, 4, 8)])
def test_outputs_that_are_no_logits_over_the_vocabulary_are_refused(shape):
    feeds = {"input_ids": np.array([[0, 6, 2, 1]])}
    with pytest.raises(DataInvalid, match="no logits over a vocabulary"):
        Perplexity().fold().add(list(range(shape[0])), feeds, np.zeros(shape))


def test_no_number_is_made_of_no_tokens():
    fold = Perplexity().fold()
    fold.add([0], {"input_ids": np.array([[3]])}, np.zeros((1, 1, 8)))
    with pytest.raises(DataInvalid, match="no window has two tokens"):
        fold.score()


@pytest.mark.parametrize(("size", "count"), [(3, 4), (4, 3), (5, 2), (11, 1), (128, 1)])
def test_windows_are_consecutive_and_hold_every_token_but_a_single_last_one(text, tokenizer, size, count):
    dataset = open_dataset(text, FREE, DataSpec(windows=True, max_length=size), tokenizer=tokenizer)
    windows = [sample["input_ids"].tolist() for sample in dataset]
    assert windows == [TOKENS[start : start + size] for start in range(0, 11, size)][:count]
    assert all(sample["attention_mask"].all() for sample in dataset)
    assert len(list(dataset)) == len(dataset) == count


def test_a_window_that_a_model_of_fixed_length_wants_longer_is_masked(text, tokenizer):
    inputs = fixed(8, "input_ids", "attention_mask")
    samples = list(open_dataset(text, inputs, DataSpec(windows=True), tokenizer=tokenizer))
    assert [sample["input_ids"].tolist() for sample in samples] == [TOKENS[:8], [*TOKENS[8:], 0, 0, 0, 0, 0]]
    assert [sample["attention_mask"].sum() for sample in samples] == [8, 3]


def test_a_model_of_fixed_length_without_a_mask_gets_whole_windows_only(text, tokenizer):
    inputs = fixed(8, "input_ids")
    samples = list(open_dataset(text, inputs, DataSpec(windows=True), tokenizer=tokenizer))
    assert [sample["input_ids"].tolist() for sample in samples] == [TOKENS[:8]]
    with pytest.raises(UsageError, match="reads 8 tokens and has no attention_mask"):
        open_dataset(text, inputs, DataSpec(windows=True, max_length=4), tokenizer=tokenizer)


def test_what_is_no_running_text_is_refused(tmp_path, tokenizer, monkeypatch):
    spec = DataSpec(windows=True)
    (tmp_path / "rows.csv").write_text("text\na b\n")
    (tmp_path / "bad.txt").write_bytes(b"a \xff b")
    (tmp_path / "none.txt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"windows are cut from \.txt files"):
        open_dataset(tmp_path / "rows.csv", FREE, spec, tokenizer=tokenizer)
    with pytest.raises(DataInvalid, match="cannot be read"):
        open_dataset(tmp_path / "bad.txt", FREE, spec, tokenizer=tokenizer)
    with pytest.raises(DataInvalid, match="holds no samples"):
        open_dataset(tmp_path / "none.txt", FREE, spec, tokenizer=tokenizer)
    with pytest.raises(DataInvalid, match="needs a tokenizer"):
        open_dataset(tmp_path / "none.txt", FREE, spec)
    monkeypatch.setattr("qexport.calibration.reading.windows.MAX_TEXT_BYTES", 2)
    with pytest.raises(ResourceExhausted):
        open_dataset(tmp_path / "bad.txt", FREE, spec, tokenizer=tokenizer)


ENCODER = "g (int64[n, s] input_ids) => (float[n, 4] logits) { logits = Cast<to = 1>(input_ids) }"


def test_scores_of_classes_that_have_names_are_none_of_tokens():
    tagger = bigram()
    tagger.metadata_props["qexport.labels"] = '["person", "place"]'
    assert not scores_tokens(tagger)


def test_plain_text_becomes_windows_for_decoders_only_and_a_recipe_may_say_otherwise():
    decoder, encoder, recipe = bigram(), model_from(ENCODER), load_recipe("int8")
    assert scores_tokens(decoder)
    assert not scores_tokens(encoder)
    assert data_spec(decoder, recipe, "a.TXT").windows
    assert not data_spec(decoder, recipe, "a.csv").windows
    assert not data_spec(encoder, recipe, "a.txt").windows
    assert not data_spec(decoder, override(recipe, ["data.windows=false"]), "a.txt").windows
    assert data_spec(encoder, override(recipe, ["data.windows=true"]), "a.txt").windows


def judged(reference, result, text, tokenizer, size=4):
    found = open_evaluation(text, FREE, DataSpec(windows=True, max_length=size), tokenizer=tokenizer)
    return compare(reference, result, Judge(found.dataset, found.task, held_out=True), TARGET)


def test_a_rise_of_the_perplexity_is_a_loss_and_breaks_the_gate(text, tokenizer):
    good, bad = bigram(), bigram(1)
    table = good.graph.initializers["table"].const_value.numpy()
    logits = [table[TOKENS[start : start + 4]] for start in (0, 4, 8)]
    windows = [TOKENS[start : start + 4] for start in (0, 4, 8)]
    truth = plain_perplexity(logits, windows, [[1] * 4] * 3)
    one, other = judged(good, bad, text, tokenizer).task, judged(bad, good, text, tokenizer).task
    assert (one.name, one.better) == ("perplexity", "lower")
    assert one.reference == pytest.approx(truth, rel=1e-6)
    assert one.drop == pytest.approx(one.result - one.reference)
    assert one.drop == pytest.approx(-other.drop)
    assert 0 <= one.unchanged < 1
    worse = judged(good, bad, text, tokenizer) if one.drop > 0 else judged(bad, good, text, tokenizer)
    assert worse.task.drop > 0
    check_gates(worse, GatesSpec(max_drop=worse.task.drop * 1.01))
    with pytest.raises(GateFailed, match="max_drop"):
        check_gates(worse, GatesSpec(max_drop=worse.task.drop * 0.99))


def test_logits_are_judged_though_a_vector_stands_before_them(text, tokenizer):
    both = """g (int64[n, s] input_ids, int64[n, s] attention_mask) => (float[n, v] pooled, float[n, s, v] logits) {
        logits = Gather(table, input_ids)  pooled = ReduceMax<keepdims = 0>(logits, one) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{both}')
    table = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    constants = {"table": table, "one": np.array([1])}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    quality = judged(model, model, text, tokenizer)
    assert quality.output == "logits"
    assert quality.task.reference == pytest.approx(judged(bigram(), bigram(), text, tokenizer).task.reference)
    assert set(quality.outputs) == {"pooled", "logits"}


def test_a_run_holds_fewer_samples_where_outputs_are_large():
    sample = {"input_ids": np.zeros(64, np.int64), "attention_mask": np.ones(64, np.int64)}
    small, large = (open_model(bigram(vocabulary=v)) for v in (8, 4096))
    assert find_layout(small, sample, None).samples == 16
    found = find_layout(large, sample, None)
    assert found.samples == ELEMENTS // (64 * 4096) == 16


def test_a_result_of_an_earlier_version_is_read_as_one_in_points():
    assert TaskScore(name="top1", reference=90.0, result=89.0, drop=1.0).better == "higher"
    assert "task" in Quality.model_fields


@pytest.fixture(scope="module")
def built(samples, tmp_path_factory):
    """The smallest sample decoder in 8 bits: the result, its folder and the text it was judged on."""
    folder = tmp_path_factory.mktemp("decoder")
    for name in ("calibration.txt", "heldout.txt"):
        (folder / name).write_text((samples / "decoder" / name).read_text()[:2500])
    result = qexport.build(
        samples / "decoder/stories260k",
        calib=folder / "calibration.txt",
        eval=folder / "heldout.txt",
        target="ort-cpu",
        options=BuildOptions(output=folder / "out", cache=None, set=SMALL),
    )
    return result, folder / "out", folder / "heldout.txt"


def test_a_decoder_in_8_bits_keeps_its_perplexity_and_the_report_says_so(built):
    result, folder, _ = built
    task = result.quality.task
    assert result.quantized >= 30
    assert task.name == "perplexity"
    assert abs(task.drop) < 0.02 * task.reference
    assert task.unchanged > 0.9
    assert result.quality.cosine_mean > 0.999
    assert "perplexity, rise" in (folder / "report.md").read_text()


def test_the_perplexity_of_the_result_is_that_of_its_file_run_window_by_window(built, samples):
    result, folder, text = built
    ids = Tokenizer.from_file(str(samples / "decoder/stories260k/tokenizer.json")).encode(text.read_text()).ids
    decoder = Decoder(folder / "model.onnx")
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, 64):
        window = np.array([ids[start : start + 64]])
        decoder.reset()
        logits = decoder.extend(window)[0].astype(np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        total -= sum(math.log(chances[t, token]) for t, token in enumerate(window[0, 1:]))
        count += window.size - 1
    assert result.quality.task.result == pytest.approx(math.exp(total / count), rel=2e-3)


def test_without_held_out_data_the_windows_of_calibration_are_judged_the_same_way(samples):
    source, text = load_source(samples / "decoder/stories260k"), samples / "decoder/heldout.txt"
    opened = open_samples(source, override(load_recipe("int8"), ["calibrate.samples=8"]), text, None)
    assert opened.judge.held_out
    assert opened.judge.task.name == "perplexity"
    lines = open_samples(source, override(load_recipe("int8"), ["data.windows=false"]), text, None)
    assert lines.judge.task is None
