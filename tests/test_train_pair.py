"""samples/train_pair.py on text and models that are tiny: what it holds out, how it goes on, what it says of a pair."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

SAMPLES = str(Path(__file__).resolve().parents[1] / "samples")
sys.path.insert(0, SAMPLES)
try:
    import train_pair
    from pair import corpus, evaluation, growth, models, training
finally:
    sys.path.remove(SAMPLES)

WORDS = ("def", "return", "for", "x", "in", "range(n):", "self.value", "=", "None", "print(x)", "yield", "if")
SMALL, LARGE = models.Shape(16, 2, 24, 2, 1), models.Shape(32, 2, 40, 4, 2)


def prose(seed, words=1500):
    random = np.random.default_rng(seed)
    return "\n".join(" ".join(random.choice(WORDS, 8)) for _ in range(words // 8)) + "\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Forty files, and three places that are not looked at."""
    root = tmp_path_factory.mktemp("library")
    names = [f"part{i % 4}/module{i}.py" for i in range(40)]
    for i, name in enumerate([*names, "test/test_x.py", "part1/tests/y.py", "site-packages/z.py"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(prose(i), encoding="utf-8")
    (root / "part0/empty.py").write_text("x = 1\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def story(library):
    path = library.parent / "story.txt"
    path.write_text(prose(77, 8000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text(library, story):
    return corpus.read_text(library, [story])


@pytest.fixture(scope="module")
def tokenizer(text):
    return corpus.train_tokenizer(text.train, 300)


@pytest.fixture(scope="module")
def tokens(text, tokenizer):
    return corpus.tokenize(text, tokenizer)


def trainer(tokens, tokenizer, **plan):
    plan = training.Plan(**{"tokens": 10 * 1024, "batch": 1024, "lengths": ((0.0, 128), (0.5, 512)), **plan})
    windows = training.Windows(tokens.train, plan.batch, plan.seed)
    return training.Trainer(models.build(SMALL, tokenizer, plan.seed), windows, plan)


def test_holds_out_whole_files_and_the_tail_of_a_text(text, story):
    assert 1 <= len(text.held_out["library"]) <= 12
    assert len(text.train) == 40 - len(text.held_out["library"]) + 1
    assert set(text.held_out["library"]).isdisjoint(text.train)
    assert text.train[-1] + text.held_out["story"][0] == story.read_text(encoding="utf-8")
    assert len(text.held_out["story"][0]) == pytest.approx(corpus.HELD_OUT * story.stat().st_size, rel=0.02)


def test_what_is_held_out_depends_on_names_alone():
    held_out = ["asynchat.py", "asyncio/subprocess.py", "json/encoder.py"]
    names = ["argparse.py", "asyncio/queues.py", "csv.py", "ast.py", "json/decoder.py", "heapq.py", "shlex.py"]
    assert [name for name in [*names, *held_out] if corpus.is_held_out(name)] == held_out


def test_the_tokenizer_gives_every_text_back(tokenizer):
    for content in ("x = 1\n\tüñ\u2028\U0001f600  ", prose(1)):
        assert tokenizer.decode(tokenizer.encode(content).ids) == content


def test_an_epoch_shows_every_window_once_and_a_batch_depends_on_its_step_alone():
    documents = [np.arange(i * 5000, i * 5000 + 5000) for i in range(4)]
    one, other = (training.Windows(documents, 4096, seed=3) for _ in range(2))
    assert one.steps == 4
    seen = np.concatenate([one.batch(step)[:, :-1].ravel() for step in range(4)])
    assert len(np.unique(seen)) == len(seen) == 4 * 4096
    for step in (9, 2):
        np.testing.assert_array_equal(one.batch(step), other.batch(step))
    assert not np.array_equal(one.batch(0), one.batch(4))
    followers = one.batch(0)[:, 1:] - one.batch(0)[:, :-1]
    assert np.mean(followers == 1) > 0.99  # but for ends of documents


def test_a_training_that_stops_and_goes_on_has_the_losses_of_one_that_does_not(tokens, tokenizer, tmp_path):
    whole = [state.loss for state in trainer(tokens, tokenizer).steps()]
    assert len(whole) == 10
    assert whole[-1] < whole[0] - 0.2
    stopped = trainer(tokens, tokenizer)
    losses = [state.loss for state in islice(stopped.steps(), 4)]
    stopped.save(tmp_path / "checkpoint.safetensors")
    resumed = trainer(tokens, tokenizer)
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert (resumed.state.step, resumed.state.tokens) == (4, 4096)
    assert losses + [state.loss for state in resumed.steps()] == whole
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    with pytest.raises(ValueError, match="another seed"):
        trainer(tokens, tokenizer, seed=1).load(tmp_path / "checkpoint.safetensors")


def test_the_rate_rises_and_falls_along_a_cosine():
    plan = training.Plan(minutes=10, warmup=0.1)
    assert [plan.factor(p) for p in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.01, 0.5, 1, 0.505, 0.01])
    assert plan.progress(training.State(seconds=150)) == 0.25
    assert [plan.length(p) for p in (0, 0.59, 0.6, 0.95)] == [256, 256, 512, 1024]


def test_a_grown_model_says_what_the_small_one_says_and_learns_in_its_new_parts(tokens, tokenizer):
    small = models.build(SMALL, tokenizer, seed=2)
    with torch.no_grad():
        for value in small.parameters():
            value.mul_(2).add_(0.05 * torch.randn_like(value))
        small.model.embed_tokens.weight.mul_(30)  # so that the epsilon of norms does not count
    large = growth.grow(small, LARGE, tokenizer, seed=3)
    assert models.parameters(large) > 2 * models.parameters(small)
    ids = torch.randint(300, (2, 40))
    logits = small(input_ids=ids).logits
    assert logits.std() > 0.05
    torch.testing.assert_close(large(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)
    plan = training.Plan(tokens=4096, batch=1024, warmup=0.0)
    before = {name: value.clone() for name, value in large.named_parameters()}
    for _ in training.Trainer(large, training.Windows(tokens.train, 1024, 0), plan).steps():
        pass
    for name, value in large.named_parameters():
        assert (value != before[name]).float().mean() > 0.6, name


@pytest.mark.parametrize("shape", ["16x3x24x2x1", "32x2x40x2x1", "32x2x40x4x4", "16x2x16x2x1"])
def test_refuses_to_grow_into_another_kind_of_shape(tokenizer, shape):
    with pytest.raises(ValueError, match="does not grow"):
        growth.grow(models.build(SMALL, tokenizer, 0), models.Shape.parse(shape), tokenizer, 0)


def test_a_pair_is_judged_by_what_both_make_of_the_same_text(tokens, tokenizer):
    target, draft = models.build(LARGE, tokenizer, 1), models.build(SMALL, tokenizer, 2)
    with torch.no_grad():
        for model in (target, draft):
            model.model.embed_tokens.weight.mul_(40)
    rows = evaluation.windows(tokens.held_out["story"], 64, 300)
    assert rows.shape == (4, 65)
    assert torch.equal(rows[0, -1], rows[1, 0])
    row = evaluation.agreement(target, draft, rows)
    with torch.no_grad():
        p, q = (model(input_ids=rows[:, :-1]).logits.softmax(-1).double().numpy() for model in (target, draft))
    labels = rows[:, 1:, None].numpy()
    assert row.target == pytest.approx(-np.log(np.take_along_axis(p, labels, -1)).mean(), rel=1e-4)
    assert row.draft == pytest.approx(-np.log(np.take_along_axis(q, labels, -1)).mean(), rel=1e-4)
    assert row.acceptance == pytest.approx(np.minimum(p, q).sum(-1).mean(), rel=1e-4)
    assert row.greedy == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1)))
    assert row.tokens == 256
    assert evaluation.loss(target, rows) == pytest.approx(row.target, rel=1e-5)
    assert evaluation.agreement(target, target, rows).acceptance == pytest.approx(1)


def test_the_command_leaves_a_pair_that_transformers_loads_and_goes_on(library, story, tmp_path, monkeypatch):
    monkeypatch.setattr(train_pair, "JUDGED", 1024)
    monkeypatch.setattr(train_pair, "GLANCE", 512)
    sizes = ["--target", "32x2x40x4x2", "--draft", "16x1x24x2x1", "--vocabulary", "300"]
    line = ["train", "--out", str(tmp_path), "--library", str(library), "--text", str(story), *sizes]
    first = CliRunner().invoke(train_pair.main, [*line, "--tokens", "8192"], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert "target: step 2, 8,192 tokens" in first.output
    again = CliRunner().invoke(train_pair.main, [*line, "--tokens", "12288"], catch_exceptions=False)
    assert "on cpu, 8,192 tokens so far" in again.output
    assert "draft: step 3, 12,288 tokens" in again.output
    for name, width in (("target", 32), ("draft", 16)):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (model.dtype, model.config.hidden_size) == (torch.float16, width)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / name)("def x")["input_ids"]
    folders = [str(tmp_path / name) for name in ("target", "draft")]
    judged = CliRunner().invoke(
        train_pair.main, ["judge", *folders, "--library", str(library), "--text", str(story)], catch_exceptions=False
    )
    assert judged.output.splitlines() == again.output.splitlines()[-len(judged.output.splitlines()) :]
    assert len(judged.output.splitlines()) == 1 + 2 * len(train_pair.CONTEXTS)


def test_the_command_wants_one_budget_and_a_shape_that_is_one(tmp_path):
    for wrong in ([], ["--tokens", "9", "--minutes", "1"], ["--tokens", "9", "--draft", "15x1x24x2x1"]):
        result = CliRunner().invoke(train_pair.main, ["train", "--out", str(tmp_path), *wrong])
        assert result.exit_code == 2, result.output
