"""Targets whose logits depend on what stands behind a token are found by asking them."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from cached_models import Tiny, portable, serialized

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


def test_ranges_over_a_whole_call_let_rejected_tokens_in():
    model = portable(Tiny())
    embedded = next(node for node in model.graph if node.op_type == "Gather" and "input_ids" in names(node))
    hidden = embedded.outputs[0]
    quantize = ir.node("DynamicQuantizeLinear", [hidden], num_outputs=3)
    restore = ir.node("DequantizeLinear", [*quantize.outputs])
    hidden.replace_all_uses_with(restore.outputs[0])
    quantize.replace_input_with(0, hidden)
    model.graph.insert_after(embedded, [quantize, restore])
    found = measure_soundness(Decoder(serialized(model), ONE))
    assert not found.sound
    assert found.leak > 1e-3
    with pytest.raises(ModelInvalid, match="decoding ahead would change what the model says") as caught:
        demand_sound(found, "tiny")
    assert "smoothquant-o1" in (caught.value.hint or "")


def names(node):
    return [value.name for value in node.inputs if value is not None]
