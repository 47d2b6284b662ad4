"""Perplexity of running text without a build: windows, strides, both layouts, bytes, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import onnxruntime as ort
import pytest
from cached_models import VOCABULARY, Tiny, forward, portable, serialized
from helpers import call, model_from, save_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from qexport.calibration.reading.data import DataSpec, input_specs
from qexport.calibration.reading.evaluation import open_evaluation
from qexport.errors import BuildFailed, DataInvalid, ModelInvalid, UsageError
from qexport.exporter.evaluate import EvalOptions, Evaluated, evaluate
from qexport.exporter.evaluation.running_text import byte_sizes, cut
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import Form
from qexport.exporter.families.llama import build
from qexport.exporter.proof.quality import Judge, compare
from qexport.passes.portable import MAX_POSITIONS
from qexport.passes.target import find_target
from qexport.runtime.decoder import Decoder

TINY = Tiny(positions=24)
WORDS = ["<s>", "?", *(f"w{i}" for i in range(2, VOCABULARY))]
NUMBERS = np.random.default_rng(5).integers(2, VOCABULARY, 61).tolist()
TEXT = " ".join(WORDS[i] for i in NUMBERS)
TOKENS = [0, *NUMBERS]


def words(count=VOCABULARY):
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS[:count])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(7)  # as some published files have it; reading must switch it off
    return made


@pytest.fixture
def folder(tmp_path):
    """A published decoder in the portable layout and a text."""
    return publish(tmp_path, portable(TINY))


def publish(path, model, text=TEXT, tokenizer=None):
    (path / "model.onnx").write_bytes(serialized(model))
    (tokenizer or words()).save(str(path / "tokenizer.json"))
    (path / "text.txt").write_text(text)
    return path


def run(folder, **options):
    return evaluate(folder, text=folder / "text.txt", options=EvalOptions(threads=1, **options))


def plain(logits_of, size, stride, count=None):
    """Losses token after token: every window by itself, no token judged twice."""
    tokens, losses, judged = TOKENS[:count], [], set()
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + size]
        logits = logits_of(window)
        for t in range(1, len(window)):
            if start + t not in judged:
                judged.add(start + t)
                chances = np.exp(logits[t - 1] - logits[t - 1].max())
                losses.append(-math.log(chances[window[t]] / chances.sum()))
        if start + size >= len(tokens):
            break
    return losses


# ---------------------------------------------------------------- the number


@pytest.mark.parametrize(("window", "stride"), [(24, 24), (10, 10), (24, 7), (10, 9), (6, 1), (2, 2), (24, 1)])
@pytest.mark.parametrize(("batch", "chunk"), [(1, 256), (3, 4), (4, 1)])
def test_the_perplexity_is_that_of_a_loop_over_windows(folder, window, stride, batch, chunk):
    found = run(folder, window=window, stride=stride, batch=batch, chunk=chunk)
    losses = plain(lambda ids: forward(TINY, ids), window, stride)
    assert found.tokens == len(losses)
    assert found.nats_per_token == pytest.approx(np.mean(losses), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert found.layout == "cached"


def test_by_default_a_window_is_as_long_as_the_model_has_positions_and_windows_stand_apart(folder):
    found = run(folder)
    assert (found.window, found.stride, found.windows) == (24, 24, 3)
    assert (found.tokens, found.read) == (59, 62)


def test_by_default_a_window_is_1024_tokens_where_there_are_more_positions(tmp_path):
    assert run(publish(tmp_path, portable(Tiny(positions=1500)))).window == 1024


def test_a_smaller_stride_judges_every_token_but_the_first_and_reads_some_twice(folder):
    found = run(folder, window=24, stride=8)
    assert found.tokens == len(TOKENS) - 1
    assert found.read == 24 * 5 + 22


def test_a_text_can_be_cut_short(folder):
    found = run(folder, max_tokens=20, window=10)
    assert found.nats_per_token == pytest.approx(np.mean(plain(lambda ids: forward(TINY, ids), 10, 10, 20)), rel=1e-6)
    assert found.tokens == 18


def test_no_more_than_a_chunk_of_logits_is_made_at_a_time(folder, monkeypatch):
    widths, extend = [], Decoder.extend

    def spy(self, ids, counts=None):
        widths.append(ids.shape)
        return extend(self, ids, counts)

    monkeypatch.setattr(Decoder, "extend", spy)
    run(folder, chunk=10, batch=2)
    assert widths == [(2, 10), (2, 10), (2, 3), (1, 10), (1, 3)]


# ---------------------------------------------------------------- the scoring layout

MASKED = """g (int64[n, s] input_ids, int64[n, s] attention_mask) => (float[n, s, v] logits) {
    logits = Gather(table, input_ids) }"""
BARE = "g (int64[n, s] input_ids) => (float[n, s, v] logits) { logits = Gather(table, input_ids) }"
FIXED = "g (int64[2, 8] input_ids) => (float[2, 8, v] logits) { logits = Gather(table, input_ids) }"
FIXED_MASKED = """g (int64[2, 8] input_ids, int32[2, 8] attention_mask) => (float[2, 8, v] logits) {
    real = Cast<to = 1>(attention_mask) count = ReduceSum<keepdims = 1>(real, one) many = Unsqueeze(count, two)
    found = Gather(table, input_ids) logits = Mul(found, many) }"""
TABLE = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32)


def scoring(text, **more):
    return model_from(text, table=TABLE, **more)


@pytest.mark.parametrize("text", [MASKED, BARE])
def test_a_graph_that_reads_whole_rows_gives_what_a_build_judges_by(tmp_path, text):
    folder, model = publish(tmp_path, scoring(text)), scoring(text)
    found = run(folder, window=9, batch=4)
    spec = DataSpec(windows=True, max_length=9)
    data = open_evaluation(folder / "text.txt", input_specs(model), spec, tokenizer=folder / "tokenizer.json")
    quality = compare(model, model, Judge(data.dataset, data.task, held_out=True), find_target("ort-cpu"))
    assert found.perplexity == pytest.approx(quality.task.reference, rel=1e-12)
    assert found.layout == "scoring"
    assert found.windows == len(data.dataset)


def test_a_graph_of_fixed_sizes_reads_filled_up_windows(tmp_path):
    found = run(publish(tmp_path, scoring(FIXED_MASKED, one=np.array([1]), two=np.array([2]))))
    assert (found.window, found.windows) == (8, 8)
    assert found.nats_per_token == pytest.approx(np.mean(plain(lambda ids: TABLE[ids] * len(ids), 8, 8)), rel=1e-6)


def test_a_graph_of_fixed_sizes_without_a_mask_reads_whole_windows_alone(tmp_path):
    found = run(publish(tmp_path, scoring(FIXED)))
    assert (found.window, found.windows) == (8, 7)
    assert found.nats_per_token == pytest.approx(np.mean(plain(lambda ids: TABLE[ids], 8, 8, 56)), rel=1e-6)


@pytest.fixture(scope="module")
def stories(samples, tmp_path_factory):
    """The smallest sample decoder in both layouts, and 2,500 characters it has not seen."""
    made = {}
    for cached in (True, False):
        path, source = tmp_path_factory.mktemp("stories"), Folder(samples / "decoder/stories260k")
        model = build(source.json("config.json"), source, Form(cached=cached))
        tokenizer = Tokenizer.from_file(str(source.path / "tokenizer.json"))
        made[cached] = publish(path, model, (samples / "decoder/heldout.txt").read_text()[:2500], tokenizer)
    return made


def test_a_real_decoder_has_one_perplexity_in_both_layouts_and_in_a_session_alone(stories):
    cached, whole = (run(stories[kind], window=128, stride=100, batch=2, chunk=50) for kind in (True, False))
    assert (cached.layout, whole.layout) == ("cached", "scoring")
    assert cached.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-5)
    assert 1.2 < cached.nats_per_token < 1.8
    assert run(stories[True]).window == 512
    session = ort.InferenceSession(stories[False] / "model.onnx", providers=["CPUExecutionProvider"])
    ids = (
        Tokenizer.from_file(str(stories[True] / "tokenizer.json")).encode((stories[True] / "text.txt").read_text()).ids
    )
    total, done = 0.0, 1
    for start in range(0, len(ids) - 28, 100):
        window = np.array([ids[start : start + 128]])
        logits = session.run(None, {"input_ids": window, "attention_mask": np.ones_like(window)})[0][0].astype(
            np.float64
        )
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        end = start + window.size
        total -= sum(math.log(chances[t - start - 1, ids[t]]) for t in range(done, end))
        done = end
    assert done == len(ids)
    assert whole.nats_per_token == pytest.approx(total / (len(ids) - 1), rel=1e-6)


# ---------------------------------------------------------------- windows


@given(st.integers(0, 80), st.integers(2, 20), st.integers(1, 20), st.sampled_from([2, None]))
def test_windows_judge_no_token_twice_and_leave_none_out_that_has_one_before_it(count, size, stride, shortest):
    stride = min(size, stride)
    windows = cut(count, size, stride, shortest or size)
    judged = [t for window in windows for t in range(window.first, window.end)]
    assert len(judged) == len(set(judged))
    assert all(window.start < window.first < window.end <= window.start + size for window in windows)
    assert all(window.start % stride == 0 for window in windows)
    if shortest == 2:
        unjudged = set(range(count)) - set(judged)
        assert unjudged <= (set(range(0, count, size)) if stride == size else {0})
        context = [window.first - window.start for window in windows[1:]]
        assert all(found >= max(1, size - stride) for found in context)


# ---------------------------------------------------------------- bytes


def byte_level():
    """One token per byte, as byte-level BPE has without merges; offsets leave spaces at the front out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor, made.decoder = processors.ByteLevel(trim_offsets=True), decoders.ByteLevel()
    return made


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_bytes_of_all_tokens_are_the_bytes_of_the_text(text):
    encoding = byte_level().encode(text)
    sizes = byte_sizes(text, [end for _, end in encoding.offsets])
    assert sizes.sum() == len(text.encode())
    assert (sizes >= 0).all()


def test_what_a_tokenizer_leaves_out_belongs_to_the_token_behind_it():
    assert byte_sizes("é b\n", [0, 1, 3]).tolist() == [0, 2, 3]  # a token for the start, then two words
    assert byte_sizes("a€b", [1, 2, 2, 2, 3]).tolist() == [1, 3, 0, 0, 1]
    assert byte_sizes("ab", [1, 2, 0]).tolist() == [1, 1, 0]  # a token for the end
    assert byte_sizes("ab", []).size == 0


def test_bits_per_byte_count_the_bytes_of_judged_tokens(folder):
    found = run(folder, window=10)
    firsts = range(0, len(TOKENS), 10)
    sizes = [0, *(len(WORDS[i]) + 1 for i in NUMBERS)]
    sizes[1] -= 1  # no space stands before the first word
    assert found.bytes == sum(size for at, size in enumerate(sizes) if at not in firsts)
    assert found.bits_per_byte == pytest.approx(found.nats_per_token * found.tokens / math.log(2) / found.bytes)


# ---------------------------------------------------------------- refusals


def drop(name):
    return lambda folder: (folder / name).unlink()


def rewrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


ENCODER = "g (int64[n, s] input_ids) => (float[n, 4] logits) { logits = Cast<to = 1>(input_ids) }"
OLD = """g (int64[n, s] input_ids, float[n, 2, p, 8] past) => (float[n, s] logits) {
    logits = Cast<to = 1>(input_ids) }"""


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (drop("tokenizer.json"), DataInvalid, "no tokenizer"),
        (rewrite("tokenizer.json", b"{}"), DataInvalid, "cannot be read as a tokenizer"),
        (drop("text.txt"), UsageError, "text.txt"),
        (rewrite("text.txt", b""), DataInvalid, "holds no text"),
        (rewrite("text.txt", b"a \xff"), DataInvalid, "cannot be read"),
        (drop("model.onnx"), UsageError, "no model.onnx in it"),
        (rewrite("model.onnx", b""), ModelInvalid, "empty file"),
        (lambda folder: save_model(folder / "model.onnx"), ModelInvalid, "no decoder: it reads x and gives y"),
        (rewrite("model.onnx", serialized(model_from(ENCODER))), ModelInvalid, "no decoder: it reads input_ids"),
        (rewrite("model.onnx", serialized(portable(TINY, extra=True))), ModelInvalid, "it reads bias besides tokens"),
        (rewrite("model.onnx", serialized(portable(TINY, **{MAX_POSITIONS: "x"}))), ModelInvalid, "is 'x'"),
    ],
)
def test_what_cannot_be_judged_is_refused(folder, change, error, told):
    change(folder)
    with pytest.raises(error, match=told):
        run(folder)


def test_the_layout_of_old_exporters_is_refused_with_what_it_lacks(tmp_path):
    model = model_from(OLD)
    model.graph.inputs[1].name = "past_key_values.0.key"
    with pytest.raises(ModelInvalid, match=r"inputs missing: position_ids, write_indices, past_key_values\.0\.value"):
        run(publish(tmp_path, model))


def test_one_token_is_no_window(tmp_path):
    tokenizer = words()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(DataInvalid, match="1 tokens make no window of 2"):
        run(publish(tmp_path, portable(TINY), "w2", tokenizer))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_anything_runs(tmp_path):
    made = words()
    made.add_tokens(["more"])
    with pytest.raises(DataInvalid, match="the tokenizer knows 51 tokens, the model's logits are 50"):
        run(publish(tmp_path, portable(TINY), tokenizer=made))
    run(publish(tmp_path, portable(TINY), tokenizer=words(40)))


def test_logits_that_are_no_numbers_give_no_perplexity(tmp_path):
    table = np.full((VOCABULARY, VOCABULARY), -1.0, np.float32)
    text = MASKED.replace("logits = Gather(table, input_ids)", "found = Gather(table, input_ids) logits = Log(found)")
    with pytest.raises(BuildFailed, match="NaN or Inf"):
        run(publish(tmp_path, model_from(text, table=table)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"window": 25}, "a window is 25 tokens, the model has 24 positions"),
        ({"window": 1}, "window is 1, expected 2 or more"),
        ({"window": 8, "stride": 9}, "the stride is 9, a window 8 tokens"),
        ({"stride": 0}, "stride is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"max_tokens": 1}, "max-tokens is 1"),
    ],
)
def test_options_out_of_range_are_refused(folder, options, told):
    with pytest.raises(UsageError, match=told):
        run(folder, **options)


def test_an_unknown_task_is_answered_with_the_known_ones(folder):
    with pytest.raises(UsageError, match=r"unknown task 'pll' \(known: ppl\)"):
        evaluate(folder, task="pll", text=folder / "text.txt")


# ---------------------------------------------------------------- the command


def test_the_command_prints_the_number(folder, capsys):
    code, out, _ = call(capsys, "eval", str(folder), "--text", str(folder / "text.txt"), "--window", "10")
    found = run(folder, window=10)
    assert code == 0
    assert f"perplexity {found.perplexity:.4f}: {found.nats_per_token:.4f} nats per token" in out
    assert "55 tokens judged in 7 windows of 10, stride 10" in out


def test_the_command_prints_one_object(folder, capsys):
    file = str(folder / "model.onnx")
    flags = ("--task", "ppl", "--stride", "4", "--batch", "2", "--chunk", "5", "--max-tokens", "40", "--threads", "1")
    code, out, _ = call(capsys, "eval", file, "--text", str(folder / "text.txt"), *flags, "--json")
    assert (code, out.count("\n")) == (0, 1)
    assert json.loads(out)["schema"] == "qexport.eval/1"
    found = Evaluated.model_validate_json(out)
    assert (found.tokens, found.stride, found.model) == (39, 4, file)
    assert found.nats_per_token == run(folder, stride=4, batch=2, chunk=5, max_tokens=40).nats_per_token


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--task", "top1"], 2),
        (["--stride", "0"], 2),
        (["--text", "nowhere.txt"], 2),
    ],
)
def test_what_the_command_refuses_has_its_exit_code(folder, capsys, arguments, code):
    told = call(capsys, "eval", str(folder), "--text", str(folder / "text.txt"), *arguments)
    assert (told[0], told[1]) == (code, "")
