"""What the proof of an export sees: small faults in every type, and what only long rows or other inputs show."""

from __future__ import annotations

import decoder_models
import encoder_models
import folders
import numpy as np
import pytest
import t5_models
from helpers import exported

from qexport.errors import GateFailed, ModelInvalid
from qexport.exporter.families import cross, decoder, heads, t5_layers
from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.form import FLOATS
from qexport.exporter.families.weights import Stored, Weights
from qexport.exporter.proof.closeness import MOST, Tally, Tolerance, tolerances
from qexport.exporter.proof.source import DECODED, LONGEST, Found, reaching

HALVES = ("float16", "bfloat16")
LAYOUTS = ("cached", "scoring")


def tiny(path, name="mistral", **changes):
    return decoder_models.write(path / "m", decoder_models.settle(name, num_hidden_layers=2, **changes))


def longer(path, window, **changes):
    return tiny(path, sliding_window=window, max_position_embeddings=8192, **changes)


# ---------------------------------------------------------------- faults


def slower(monkeypatch):
    """Positions turn a little more slowly."""
    right = decoder.rotary_angles

    def wrong(rope, dim, positions):
        return right(rope.model_copy(update={"rope_theta": 1.03 * rope.rope_theta}), dim, positions)

    monkeypatch.setattr(decoder, "rotary_angles", wrong)


def another_unit(monkeypatch):
    """The gate is almost what it should be."""

    def wrong(g, scope, x):
        return g.op(scope, "Mul", x, g.op(scope, "Sigmoid", g.op(scope, "Mul", x, g.constant("most", 1.02))))

    monkeypatch.setitem(decoder.ACTIVATIONS, "silu", wrong)


def blind(monkeypatch):
    """No token sees itself, and the first one sees nothing."""
    right = GraphBuilder.op

    def wrong(self, scope, op_type, *inputs, **attributes):
        return right(self, scope, "Less" if op_type == "LessOrEqual" else op_type, *inputs, **attributes)

    monkeypatch.setattr(GraphBuilder, "op", wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fault", [slower, another_unit, blind])
def test_a_small_fault_shows_in_sixteen_bits_in_either_layout(tmp_path, monkeypatch, fault, dtype, layout):
    folder = tiny(tmp_path)
    fault(monkeypatch)
    with pytest.raises(GateFailed):
        exported(folder, tmp_path / "out", dtype=dtype, layout=layout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_without_rounding_sixteen_bits_are_as_near_as_thirty_two(tmp_path, dtype, layout):
    result = exported(tiny(tmp_path), tmp_path / "out", dtype=dtype, layout=layout)
    exact = [check for check in result.verification.checks if check.what.endswith("no result rounded")]
    assert len(exact) == len(result.verification.checks) / 2
    assert max(check.rms for check in exact) < 1e-4
    assert all(check.argmax > 0.99 for check in exact)


def test_weights_are_rounded_as_the_export_has_them():
    stored = Stored((3,), "F32", lambda: np.array([1 / 3, 1e-9, 70000], np.float32), "here")
    weights = Weights({"w": stored}, "w", "here")
    rounded = weights.rounded(np.dtype(np.float16))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(rounded("w", (3,)), np.array([1 / 3, 1e-9, 70000], np.float16))
    assert rounded("w", (3,)).dtype == np.float32
    assert weights("w", (3,))[0] == np.float32(1 / 3)


# ---------------------------------------------------------------- far away


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_longer_than_the_usual_rows_is_looked_behind(tmp_path, monkeypatch, layout, off):
    window = max(DECODED) + 4
    folder = longer(tmp_path, window)
    right = exported(folder, tmp_path / "right", layout=layout)
    assert not [warning for warning in right.warnings if "apart" in warning]
    monkeypatch.setattr("qexport.exporter.families.mistral.MistralConfig.window", lambda self, layer: window + off)
    with pytest.raises(GateFailed):
        exported(folder, tmp_path / "out", layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_too_long_to_look_behind_is_told(tmp_path, layout):
    (warning,) = [w for w in exported(longer(tmp_path, 4096), tmp_path / "out", layout=layout).warnings if "4096" in w]
    assert "longest row of the proof has 96" in warning


def test_a_window_as_long_as_all_positions_is_none(tmp_path):
    folder = tiny(tmp_path, sliding_window=4096, max_position_embeddings=4096)
    assert not [w for w in exported(folder, tmp_path / "out").warnings if "apart" in w]


def test_rows_are_drawn_out_so_far_and_no_further():
    assert reaching(DECODED, 0) == DECODED
    assert reaching(DECODED, 20) == DECODED
    assert reaching(DECODED, 128) == (160, *DECODED[1:])
    assert reaching(DECODED, LONGEST) == DECODED
    assert reaching((17, 29, 8), 128) == (17, 160, 8)
    rows = Found("rows", ({"input_ids": np.zeros(40, np.int64)},))
    assert rows.unseen(0, None) == rows.unseen(39, None) == rows.unseen(64, 64) == ()
    assert len(rows.unseen(40, None)) == len(rows.unseen(64, 65)) == 1


def far_bucket(monkeypatch):
    """The last of the buckets of distances begins too late."""
    right = t5_layers.buckets

    def wrong(distances, count, far, *, both):
        found = right(distances, count, far, both=both)
        return np.where(np.abs(distances) == far - 2, found - 1, found)

    monkeypatch.setattr(t5_layers, "buckets", wrong)


def all_of_the_source(monkeypatch):
    """Padding of the source is looked at."""
    right = cross.seen_source

    def wrong(g, real):
        seen = right(g, real)
        return g.op("source", "Or", seen, g.op("source", "Not", seen))

    monkeypatch.setattr(cross, "seen_source", wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", [far_bucket, all_of_the_source])
def test_distances_and_padding_of_t5_are_looked_at(tmp_path, monkeypatch, fault, layout):
    folder = t5_models.write(tmp_path / "m", relative_attention_max_distance=64, relative_attention_num_buckets=32)
    fault(monkeypatch)
    with pytest.raises(GateFailed):
        exported(folder, tmp_path / "out", layout=layout)


# ---------------------------------------------------------------- encoders


@pytest.mark.parametrize("dtype", FLOATS)
def test_types_of_tokens_are_told_apart(tmp_path, monkeypatch, dtype):
    folder, right = encoder_models.write(tmp_path / "m", "bert"), GraphBuilder.parameter
    exported(folder, tmp_path / "right", dtype=dtype)

    def wrong(self, name, shape, change=None, **more):
        of_types = name.endswith("token_type_embeddings.weight")
        return right(self, name, shape, (lambda table: table[[0, 0]]) if of_types else change, **more)

    monkeypatch.setattr(GraphBuilder, "parameter", wrong)
    with pytest.raises(GateFailed):
        exported(folder, tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize("head", heads.OTHERS)
def test_a_head_that_is_not_built_is_left_out_only_where_that_was_asked_for(tmp_path, head):
    folder = encoder_models.write(tmp_path / "m", "bert", architectures=[f"Bert{head}"])
    with pytest.raises(ModelInvalid, match=f"'Bert{head}' is not built"):
        exported(folder, tmp_path / "out")
    assert exported(folder, tmp_path / "out", task="embedding").task == "embedding"


# ---------------------------------------------------------------- closeness


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_score_near_zero_is_measured_by_the_others(tmp_path, dtype):
    """As a cross-encoder has it: one number for every pair of texts."""
    weights = encoder_models.tensors("bert", "classification")
    weights |= {"classifier.weight": weights["classifier.weight"][:1], "classifier.bias": np.zeros(1, np.float32)}
    found = {}
    for name in ("first", "second"):
        folder = encoder_models.write(
            tmp_path / name, "bert", "classification", weights=weights, id2label={"0": "score"}
        )
        exported(folder, tmp_path / f"{name}.out", dtype=dtype)
        rng = np.random.default_rng(0)
        ids = [rng.integers(0, encoder_models.WORDS, length) for length in (3, 7)][-1][None]  # made up by the proof
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        found[name] = folders.truth_of(folder, feeds)["logits"]
        weights["classifier.bias"] -= found[name][0] * (1 - 1e-5)
    assert abs(found["second"][0, 0]) < 1e-4 * abs(found["first"][0, 0])


def test_few_numbers_are_measured_by_all_that_a_check_looks_at():
    tally = Tally("a run", "logits")
    for truth, found in ((3.0, 3.0), (1e-9, 3e-4), (-4.0, -4.0)):
        tally.add(np.array([[truth]]), np.array([[found]]), "here")
    check = tally.result(Tolerance(1, 1))
    assert check.error == pytest.approx(3e-4 / (25 / 3) ** 0.5, rel=1e-3)
    assert check.rms == pytest.approx(3e-4 / 5, rel=1e-3)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_that_makes_another_model_is_refused(dtype):
    kind = FLOATS[dtype]
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((20, 50))
    few, many = (truth + share * MOST[kind] * rng.standard_normal(truth.shape) for share in (0.8, 1.3))
    assert tolerances(kind, [("here", {"y": truth}, {"y": few})])["y"].rms > MOST[kind]
    with pytest.raises(GateFailed, match="another model") as refused:
        tolerances(kind, [("here", {"y": truth}, {"y": many})])
    assert "float32" in refused.value.hint


# ---------------------------------------------------------------- settings and norms


def test_squares_that_sixteen_bits_do_not_hold_are_summed_in_thirty_two(tmp_path):
    config = decoder_models.settle("mistral", num_hidden_layers=2)
    weights = decoder_models.weights(config)
    weights["model.embed_tokens.weight"] *= 3000  # numbers up to 3000, their squares up to 9e6
    folder = decoder_models.write(tmp_path / "m", config, weights)
    result = exported(folder, tmp_path / "out", dtype="float16", layout="scoring")
    assert max(check.rms for check in result.verification.checks) < 1e-2


def test_rotary_settings_that_contradict_each_other_are_refused(tmp_path):
    new, old = {"rope_type": "default", "rope_theta": 100.0}, {"type": "linear", "factor": 2.0}
    with pytest.raises(ModelInvalid, match="different things"):
        exported(tiny(tmp_path, rope_parameters=new, rope_scaling=old), tmp_path / "out")
    (tmp_path / "same").mkdir()
    exported(tiny(tmp_path / "same", rope_parameters=new, rope_scaling=new), tmp_path / "out")
