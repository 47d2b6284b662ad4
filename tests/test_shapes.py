"""What an engine is built for: profiles of plain models, and of decoders two profiles and a length of caches."""

from __future__ import annotations

import cached_models
import numpy as np
import pytest
from helpers import model_from

import qexport
from qexport.calibration.running.execute import open_model
from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.engines.shapes import engine_shapes
from qexport.exporter.options import BuildOptions
from qexport.exporter.recipe import Recipe
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.samples import Samples

NONE = Samples(calibration=None, judge=None, proof=(), made_up=True, warnings=())
CACHE = "past_key_values.1.value"


def decoder(**metadata):
    return cached_models.portable(cached_models.Tiny(), **metadata)


def recipe(*settings) -> Recipe:
    return override(load_recipe("float16"), settings)


def test_a_decoder_has_a_profile_for_prompts_and_one_for_steps_and_caches_of_one_length():
    prompts, steps = (shapes := engine_shapes(decoder(), recipe("data.max_length=64"), NONE)).profiles
    assert shapes.frozen == (("max_seq", 1024),)
    assert prompts["input_ids"] == ([1, 1], [8, 64], [32, 64])
    assert steps["position_ids"] == ([1, 1], [8, 1], [32, 8])
    assert prompts[CACHE] == steps[CACHE] == ([1, 2, 1024, 8], [8, 2, 1024, 8], [32, 2, 1024, 8])
    assert prompts["write_indices"] == ([1], [8], [32])


def test_the_recipe_says_how_long_caches_are():
    assert engine_shapes(decoder(), recipe("export.max_seq=300"), NONE).frozen == (("max_seq", 300),)


def test_caches_are_no_longer_than_2048_by_themselves():
    many = decoder(**{"qexport.max_positions": "131072"})
    assert engine_shapes(many, recipe(), NONE).frozen == (("max_seq", 2048),)


def test_positions_that_are_no_number_are_named():
    with pytest.raises(ModelInvalid, match=r"qexport\.max_positions"):
        engine_shapes(decoder(**{"qexport.max_positions": "many"}), recipe(), NONE)


def test_a_profile_by_hand_gives_caches_one_length():
    given = {
        "input_ids": [[1, 1], [1, 4], [1, 4]],
        "position_ids": [[1, 1], [1, 4], [1, 4]],
        "write_indices": [[1], [1], [1]],
    }
    caches = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    for sizes, frozen in (((64, 64, 64), (("max_seq", 64),)), ((32, 64, 64), None)):
        profiles = given | {name: [[1, 2, size, 8] for size in sizes] for name in caches}
        asked = recipe().model_copy(update={"export": recipe().export.model_copy(update={"profiles": profiles})})
        if frozen is not None:
            assert engine_shapes(decoder(), asked, NONE).frozen == frozen
            continue
        with pytest.raises(UsageError, match=r"one length.*32, 64"):
            engine_shapes(decoder(), asked, NONE)


def test_other_models_have_one_profile_and_nothing_frozen():
    plain = model_from("agraph (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }")
    shapes = engine_shapes(plain, recipe(), NONE)
    assert shapes.frozen == ()
    assert shapes.profiles == ({"x": ([1, 4], [8, 4], [32, 4])},)


@pytest.mark.rtx
@pytest.mark.parametrize("wanted", ["float16", "int8"])
def test_a_decoder_becomes_an_engine_whose_caches_are_written_in_place(tmp_path, wanted):
    pytest.importorskip("tensorrt_rtx")
    model = decoder()
    ids = np.random.default_rng(0).integers(0, cached_models.VOCABULARY, (24, 12))
    np.savez(tmp_path / "rows.npz", input_ids=ids)
    (tmp_path / "model.onnx").write_bytes(cached_models.serialized(model))
    options = BuildOptions(output=tmp_path / "out", set=("export.max_seq=64",))
    result = qexport.build(tmp_path / "model.onnx", recipe=wanted, calib=tmp_path / "rows.npz", options=options)
    assert len(result.engine.profiles) == 2
    assert result.engine.profiles[0][CACHE][2] == [32, 2, 64, 8]
    assert result.quality.cosine_mean > 0.99
    assert open_model(model).inputs == ("input_ids",)
