"""Folding and cutting through the caches of a decoder: they change their form along with the model."""

from __future__ import annotations

import cached_models
import numpy as np
import pytest
from cached_models import DIM, HEADS, KV_HEADS, VOCABULARY, Tiny
from helpers import Samples
from onnx_ir.passes.common import ShapeInferencePass

from qexport.calibration.observe import Observe
from qexport.passes.pruning.spaces import find_spaces
from qexport.passes.smooth import Smooth
from qexport.runtime.decoder import Decoder

IDS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 12))


@pytest.fixture
def model():
    return ShapeInferencePass()(cached_models.portable(Tiny())).model


def step_by_step(model, ids):
    """Logits of a row that is read in pieces, one of them wrong and taken back."""
    decoder = Decoder(cached_models.serialized(model))
    found = [decoder.extend(ids[None, :4])]
    decoder.extend(ids[None, :5][:, ::-1])
    decoder.rollback(4)
    found += [decoder.extend(ids[None, place : place + 1]) for place in range(4, len(ids))]
    return np.concatenate([part[0] for part in found])


def test_what_the_values_are_divided_by_goes_into_the_product_behind_the_cache(model):
    data = Samples([{"input_ids": row} for row in IDS])
    Observe(data=data)(model)
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    result = Smooth(alpha=0.5)(model)
    folded = {decision.node for decision in result.decisions if decision.action == "folded"}
    behind = [node.name for node in model.graph if node.op_type == "MatMul" and _reads_attention(node)]
    assert len(behind) == 2
    assert set(behind) <= folded
    after = [value.const_value.numpy() for value in model.graph.initializers.values()]
    assert not all(any(np.array_equal(new, old) for old in before.values()) for new in after)
    found = step_by_step(model, IDS[0])
    np.testing.assert_allclose(found, cached_models.forward(Tiny(), IDS[0]), rtol=1e-4, atol=1e-4)


def _reads_attention(node):
    made = node.inputs[0].producer()
    while made is not None and made.op_type in ("Reshape", "Transpose"):
        made = made.inputs[0].producer()
    return made is not None and made.op_type == "Attention"


def test_a_key_head_goes_with_its_queries_and_its_part_of_the_cache():
    tiny = Tiny()
    group = HEADS // KV_HEADS * DIM
    for layer in range(cached_models.LAYERS):
        tiny.weights[f"{layer}.o"][group : 2 * group] = 0  # nobody listens to the second group
    model = ShapeInferencePass()(cached_models.portable(tiny)).model
    truth = step_by_step(model, IDS[1])
    spaces = find_spaces(model, "heads")
    assert [space.count for space in spaces] == [KV_HEADS] * cached_models.LAYERS
    for name in [space.name for space in spaces]:
        (space,) = (space for space in find_spaces(model, "heads") if space.name == name)
        space.found.apply(np.array([True, False]))
    caches = [value for value in (*model.graph.inputs, *model.graph.outputs) if len(value.shape or ()) == 4]
    assert len(caches) == 8
    assert {value.shape[1] for value in caches} == {1}
    np.testing.assert_allclose(step_by_step(model, IDS[1]), truth, rtol=1e-5, atol=1e-5)


def test_columns_of_a_cache_are_no_units(model):
    present = next(value for value in model.graph.outputs if value.name == "present.0.key")
    assert present.producer().op_type == "TensorScatter"
    assert all(isinstance(space.cut, str) or space.cut.count == KV_HEADS for space in find_spaces(model, "heads"))


def test_a_cache_that_is_shown_before_it_is_written_stays():
    model = ShapeInferencePass()(cached_models.portable(Tiny())).model
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.value")
    model.graph.outputs.append(past)
    first, second = find_spaces(model, "heads")
    assert first.cut == "it is an output of the model"
    assert second.count == KV_HEADS
