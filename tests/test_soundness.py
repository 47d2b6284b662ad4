"""Targets whose logits depend on what stands behind a token are found by asking them."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from cached_models import Tiny, portable, serialized
from generating import broken, opened, seal, write_folder

from qexport.errors import ModelInvalid
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions
from qexport.runtime.speculation.soundness import demand_sound, measure_soundness

ONE = SessionOptions(threads=1)


def test_a_causal_target_is_sound_up_to_the_order_of_its_sums():
    found = measure_soundness(Decoder(serialized(portable(Tiny())), ONE))
    assert found.sound
    assert found.leak == 0
    assert found.width < 1e-4
    demand_sound(found, "tiny")


def leaking():
    """Embeddings in 8 bits, whose range is found at every call."""
    model = portable(Tiny())
    embedded = next(node for node in model.graph if node.op_type == "Gather" and "input_ids" in names(node))
    hidden = embedded.outputs[0]
    quantize = ir.node("DynamicQuantizeLinear", [hidden], num_outputs=3)
    restore = ir.node("DequantizeLinear", [*quantize.outputs])
    hidden.replace_all_uses_with(restore.outputs[0])
    quantize.replace_input_with(0, hidden)
    model.graph.insert_after(embedded, [quantize, restore])
    return serialized(model)


def names(node):
    return [value.name for value in node.inputs if value is not None]


def test_ranges_over_a_whole_call_let_rejected_tokens_in():
    found = measure_soundness(Decoder(leaking(), ONE))
    assert not found.sound
    assert found.leak > 1e-3
    with pytest.raises(ModelInvalid, match="decoding ahead would change what the model says") as caught:
        demand_sound(found, "tiny")
    assert "smoothquant-o1" in (caught.value.hint or "")


def test_a_generator_refuses_to_look_ahead_for_such_a_target_and_decodes_it_plainly(tmp_path):
    target, draft = write_folder(tmp_path / "target"), write_folder(tmp_path / "draft")
    (target / "model.onnx").write_bytes(leaking())
    seal(target)
    for asked in ({"draft": draft}, {"speculate": 3}, {"draft": draft, "speculate": 2}):
        with pytest.raises(ModelInvalid, match="with the tokens behind them"):
            opened(target, **asked)
    with (
        opened(target) as plainly,
        opened(target, speculate="off") as off,
        opened(target, draft, speculate="off") as unused,
    ):
        assert plainly.options.speculate == "off"
        assert len({tuple(each.complete([[3, 4, 5]])[0].tokens) for each in (plainly, off, unused)}) == 1
    with opened(draft, target) as other:  # a draft may say what it likes
        assert other.options.speculate == "auto"


def test_a_target_without_numbers_is_left_to_its_requests():
    assert measure_soundness(Decoder(serialized(portable(broken(*range(50)))), ONE)).sound
    assert measure_soundness(Decoder(serialized(portable(Tiny(positions=6))), ONE)).leak == 0
