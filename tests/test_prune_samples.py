"""Units removed from the shipped models: how many are left, and how near the outputs stay."""

import numpy as np
import pytest
from cut_models import check, copy_of
from helpers import Samples

from qexport.calibration.channels import Channels
from qexport.calibration.heads import Heads
from qexport.calibration.neurons import Neurons
from qexport.calibration.reading.data import open_dataset
from qexport.calibration.reading.spec import DataSpec, input_specs
from qexport.calibration.running.execute import open_model
from qexport.exporter.load import load_model
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import load_recipe, override
from qexport.passes.cleanup import Cleanup
from qexport.passes.match import array
from qexport.passes.pipeline import run as pipeline
from qexport.runtime.session import SessionOptions


def pruned(outcome):
    return [d for d in outcome.decisions if d.action == "pruned"]


SENTENCES = [
    "a man plays a guitar on a stage", "two dogs run through the snow", "the market fell sharply on monday",
    "a woman is slicing an onion in the kitchen", "children are playing football in the park",
    "the plane landed safely after the storm", "someone is reading a book by the window", "a cat sleeps on the sofa",
]  # fmt: skip


def embeddings(model, samples):
    opened = open_model(model, SessionOptions(threads=1))
    rows = []
    for sample in samples:
        hidden = opened.run({name: value[None] for name, value in sample.items()})[model.graph.outputs[0].name]
        rows.append(hidden.reshape(-1, hidden.shape[-1]).mean(axis=0))
    return np.array(rows)


def cosines(one, other):
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def test_a_quarter_of_the_heads_of_minilm_goes_with_the_shipped_recipe(minilm, tmp_path):
    model = load_model(minilm)
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    calibration = open_dataset(tmp_path / "texts.txt", input_specs(model), DataSpec(tokenizer=str(minilm)))
    samples = list(calibration)
    recipe = override(load_recipe("prune-heads"), ["heads.keep=0.75", "heads.samples=4"])
    found, steps = pipeline(model, instantiate(recipe, {"data": calibration, "advance": lambda: None}))
    (cut,) = (step for step in steps if step.name == "heads")
    left = sum(d.units[0] for d in cut.decisions if d.action == "pruned")
    whole = sum(d.action == "skipped" for d in cut.decisions)
    assert left + 12 * whole == 54
    before, after = sum(v.const_value.size for v in model.graph.initializers.values()), cut.parameters
    assert before - after == pytest.approx(18 * (4 * 32 * 384 + 96), rel=0.01)
    same = cosines(embeddings(model, samples), embeddings(found, samples))
    assert same.min() > 0.9
    assert same.mean() > 0.95


def test_a_fifth_of_the_work_of_a_residual_network_goes(samples):
    model = Cleanup(slim=True)(load_model(samples / "resnet20/resnet20.onnx")).model
    recipe = load_recipe(samples / "resnet20/int8.toml")
    calibration = open_dataset(samples / "resnet20/calibration.npz", input_specs(model), recipe.data)
    images = [sample for sample, _ in zip(calibration, range(24), strict=False)]
    before, work = multiplications(model), copy_of(model)
    outcome = Channels(data=Samples(images), keep=0.8)(work)
    assert 0.7 < multiplications(work) / before <= 0.8
    assert "/layer3/layer3.0/conv2/Conv" in {d.node for d in outcome.decisions}  # the channels that shortcuts hold
    assert not [d for d in outcome.decisions if "measured" in d.reason]
    truth, found = (
        open_model(m).run({m.graph.inputs[0].name: np.stack([next(iter(s.values())) for s in images])})
        for m in (model, work)
    )
    same = [a.argmax(axis=1) == b.argmax(axis=1) for a, b in zip(truth.values(), found.values(), strict=True)]
    assert np.mean(same) > 0.8


def multiplications(model):
    nodes = [node for node in model.graph if node.op_type in ("Conv", "Gemm")]
    return sum(array(n.inputs[1]).size * int(np.prod(n.outputs[0].shape[2:])) for n in nodes)


def test_groups_of_heads_and_gated_neurons_of_a_decoder_go(samples):
    model = Cleanup()(load_model(samples / "decoder/stories260k")).model
    rng = np.random.default_rng(0)
    texts = Samples({"input_ids": rng.integers(5, 400, 12), "attention_mask": np.ones(12, np.int64)} for _ in range(4))
    feeds = {name: value[None] for name, value in texts[0].items()}
    before = [value.shape for value in open_model(model).run(feeds).values()]
    heads = Heads(data=texts, keep=0.75, per="layer", samples=2)(model)
    assert [d.units for d in pruned(heads)] == [(3, 4)] * 5  # eight query heads share four key heads
    neurons = Neurons(data=texts, keep=0.7)(model)
    assert [d.units for d in pruned(neurons)] == [(128, 172)] * 5
    assert [value.shape for value in open_model(model).run(feeds).values()] == before
    check(model)
