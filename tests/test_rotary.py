"""Rotary positions, scaled in every way, and of a part of each head: against the papers' formulas and transformers."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
from decoder_models import BASE, weights, write
from helpers import session
from pydantic import ValidationError
from stepping import demand_same, engine_of, opened, ragged, stepped

from qexport.exporter.families.decoder import build_decoder
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import FLOATS, SCORING, Form
from qexport.exporter.families.llama import LlamaConfig
from qexport.exporter.families.rotary import Rope, attention_factor, rotary_angles, spell_out_rope
from qexport.exporter.references import find_reference
from qexport.exporter.references.decoder import rotary

IDS = np.random.default_rng(5).integers(0, 50, (2, 30))
SHORT = [1.0, 1.5, 2.0, 4.0]
LLAMA = {**BASE, "model_type": "llama", "num_hidden_layers": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": [2.0, 3.0, 4.0, 8.0]}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 32},
    "llama3, length left out": LLAMA3,
    "yarn": {**YARN, "original_max_position_embeddings": 16},
    "yarn, length left out": YARN,
    "yarn, no rounding": {**YARN, "truncate": False, "original_max_position_embeddings": 40},
    "yarn, other turns": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "original_max_position_embeddings": 40},
    "yarn, one magnitude": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, magnitude of keys only": {**YARN, "mscale_all_dim": 1.3},
    "yarn, attention factor": {**YARN, "attention_factor": 0.8},
    "yarn, factor from lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "longrope": LONG,
    "longrope, attention factor": {**LONG, "attention_factor": 1.19},
    "longrope, more to come": {**LONG, "original_max_position_embeddings": 4096},
    "longrope, one set": {**LONG, "long_factor": SHORT, "original_max_position_embeddings": 16},
    "longrope, factor": {**LONG, "long_factor": SHORT, "factor": 3.0, "original_max_position_embeddings": 16},
}


class PartialConfig(LlamaConfig):
    """Llama, but for heads that are not turned as a whole."""

    partial_rotary: ClassVar[bool] = True


def settled(rope, **changes):
    """The rotary settings as a decoder's config ends up with them."""
    known = {**LLAMA, **changes, "rope_scaling": rope}
    spell_out_rope(known)
    return Rope.model_validate(known["rope_parameters"])


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_and_factor_are_those_of_the_formulas(name):
    rope = settled(SCALINGS[name])
    frequencies, factor = rotary({**LLAMA, "rope_scaling": SCALINGS[name]})
    found = rotary_angles(rope, 8, 64)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.outer(np.arange(64), frequencies), rtol=1e-6)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_and_factor_are_those_of_transformers(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**{**LLAMA, "rope_scaling": dict(SCALINGS[name])})
    truth = LlamaRotaryEmbedding(config)
    rope = settled(SCALINGS[name])
    np.testing.assert_allclose(rotary_angles(rope, 8, 2)[1], truth.inv_freq.numpy(), rtol=1e-6)
    assert attention_factor(rope) == pytest.approx(truth.attention_scaling, rel=1e-12)
    cos, _ = truth(torch.zeros(1, 64, 8), torch.arange(64)[None])
    wanted = np.cos(rotary_angles(rope, 8, 64)) * np.float32(attention_factor(rope))
    np.testing.assert_allclose(wanted, cos[0, :, :4].numpy(), atol=1e-5)


def test_every_scaling_changes_something_but_the_dynamic_one():
    plain = rotary_angles(settled({"rope_type": "default"}), 8, 64)
    for name, rope in SCALINGS.items():
        same = np.array_equal(rotary_angles(settled(rope), 8, 64), plain)
        assert same == (rope["rope_type"] in ("default", "dynamic")), name


@pytest.mark.parametrize("rope", [{**YARN, "original_max_position_embeddings": 512}, SCALINGS["llama3"]])
def test_the_ramps_have_all_their_parts(rope):
    scaled, plain = (rotary_angles(settled(each, rope_theta=10000.0), 64, 2)[1] for each in (rope, SCALINGS["default"]))
    ratios = scaled / plain
    assert ratios[0] == 1
    assert ratios[-1] == pytest.approx(0.25)
    assert ((ratios < 0.99) & (ratios > 0.26)).any()


def test_a_length_beside_the_rotary_settings_has_the_last_word():
    rope = settled({**YARN, "original_max_position_embeddings": 16}, original_max_position_embeddings=48)
    assert rope.original_max_position_embeddings == 48


@pytest.mark.parametrize("name", ["yarn", "longrope, factor", "llama3"])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_decoders_turn_as_the_reference_does(tmp_path, name, part):
    scaling = {**SCALINGS[name], "partial_rotary_factor": part}
    if "short_factor" in scaling:
        scaling["short_factor"] = scaling["long_factor"] = SHORT[: int(4 * part)]
    config = {**LLAMA, "rope_scaling": scaling}
    folder = Folder(write(tmp_path / "m", config, weights(config)))
    truth = find_reference(config, folder, SCORING)({"input_ids": IDS})["logits"]
    plain, cached = (
        build_decoder(PartialConfig.model_validate(config), folder, Form(cached=cached)) for cached in (False, True)
    )
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    demand_same(session(plain).run(["logits"], feeds)[0], truth)
    decoder = opened(cached)
    demand_same(stepped(decoder, IDS[0]), truth[0])
    for row, found in enumerate(ragged(decoder, IDS)):
        demand_same(found, truth[row, : len(found)])


@pytest.mark.rtx
def test_a_decoder_that_turns_a_part_of_each_head_builds_for_rtx(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    config = {**LLAMA, "partial_rotary_factor": 0.5}
    folder = Folder(write(tmp_path / "m", config, weights(config)))
    model = build_decoder(PartialConfig.model_validate(config), folder, Form(FLOATS["float16"], cached=True))
    assert engine_of(model, {"batch": (1, 1, 2), "sequence": (1, 1, 8)}).plan


@pytest.mark.torch
@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_logits_with_scaled_positions_are_those_of_transformers(tmp_path, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = {**LLAMA, "rope_scaling": SCALINGS[name]}
    path = write(tmp_path / "m", config, weights(config))
    original = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = np.random.default_rng(7).integers(0, 50, (1, 64))
    with torch.no_grad():
        truth = original(torch.tensor(ids)).logits.numpy()
    decoder = opened(build_decoder(LlamaConfig.model_validate(config), Folder(path), Form(cached=True)))
    demand_same(stepped(decoder, ids[0]), truth[0])


def test_what_longrope_would_need_two_graphs_for_is_refused_with_the_way_out():
    with pytest.raises(ValidationError, match=r"set max_position_embeddings to 16 and.*attention_factor to ") as caught:
        settled({**LONG, "original_max_position_embeddings": 16})
    told = float(str(caught.value).split("attention_factor to ")[1].split()[0])
    assert told == pytest.approx(math.sqrt(1 + math.log(64 / 16) / math.log(16)), rel=1e-7)


BAD = {
    "unknown": ({"rope_type": "spiral"}, "rope_type"),
    "no factor": ({"rope_type": "linear"}, "'linear' needs a factor"),
    "dynamic without factor": ({"rope_type": "dynamic"}, "'dynamic' needs a factor"),
    "shrinking": ({"rope_type": "linear", "factor": 0.5}, "factor"),
    "turns": ({**YARN, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_slow is not below beta_fast"),
    "ramp": ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor is not below"),
    "few factors": ({**LONG, "short_factor": [1.0]}, "short_factor are not 4 numbers above 0"),
    "no factors": ({"rope_type": "longrope"}, "short_factor are not 4 numbers above 0"),
    "negative factors": ({**LONG, "long_factor": [1.0, 1.0, -1.0, 1.0]}, "long_factor are not 4 numbers above 0"),
    "by kind of layer": ({"full_attention": {"rope_type": "default"}}, "each kind of layer"),
    "theta": ({"rope_type": "default", "rope_theta": 0.5}, "rope_theta"),
    "no part": ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
    "an odd part": ({"partial_rotary_factor": 0.4}, "turns 3 of 8 numbers, which are no pairs"),
    "a part of Llama": ({"partial_rotary_factor": 0.5}, "turns 4 of 8, llama turns all"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_mean_nothing_are_refused(name):
    rope, message = BAD[name]
    with pytest.raises(ValidationError, match=message):
        LlamaConfig.model_validate({**LLAMA, "rope_scaling": rope})
