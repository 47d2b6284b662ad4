"""Units that change places: the model computes the same, or the order is refused."""

import numpy as np
import pytest
from channel_models import build, value_named
from cut_models import MODELS, bytes_of, check, make, outputs_of, reorder
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.running.execute import open_model
from qexport.exporter.load import load_model
from qexport.passes.cleanup import Cleanup
from qexport.passes.folding.activation import ACTIVATION_KEY
from qexport.passes.folding.axes import channel_ids
from qexport.passes.match import array
from qexport.passes.numbers.notes import KERNEL_KEY
from qexport.passes.pruning.cut import Blocked, Cut, find_cut
from qexport.passes.pruning.spaces import find_spaces


def space_of(model, kind):
    (found,) = [space for space in find_spaces(model, kind) if isinstance(space.cut, Cut)]
    return found


def cut_of(model, name):
    value = value_named(model, name)
    found = find_cut(value, channel_ids(len(value.shape), -1, value.shape[-1]), value.shape[-1])
    assert isinstance(found, Cut), found
    return found


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_units_that_change_places_leave_the_model_what_it_was(name, data):
    kind, count, *_ = MODELS[name]
    model = make(name)
    before, untouched, cut = outputs_of(model), bytes_of(model), space_of(model, kind).cut
    order = np.array(data.draw(st.permutations(range(count))))
    if name == "padded_shortcut":  # what a Pad adds cannot change places with channels
        with pytest.raises(Blocked, match="a unit has no place where the other one has"):
            cut.reorder(np.roll(np.arange(count), 1))
        assert bytes_of(model) == untouched
        order = np.array([5, 1, 4, 2, 3, 0])
    cut.reorder(order)
    check(model)
    assert (bytes_of(model) == untouched) == np.array_equal(order, np.arange(count))
    for old, new in zip(before, outputs_of(model), strict=True):
        assert np.linalg.norm(old - new) <= 1e-5 * np.linalg.norm(old)
    cut.reorder(np.argsort(order))  # the cut is good for another time
    for old, new in zip(before, outputs_of(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_numbers_of_a_unit_move_to_the_place_of_another():
    model = make("gate_and_up_in_one")
    whole, down = array(model.graph.initializers["w1"]), array(model.graph.initializers["w2"])
    order = np.array([3, 0, 1, 2, 5, 4])
    space_of(model, "neurons").cut.reorder(order)
    np.testing.assert_array_equal(array(model.graph.initializers["w1"]), whole[:, [*order, *(order + 6)]])
    np.testing.assert_array_equal(array(model.graph.initializers["w2"]), down[order])


def test_heads_change_places_with_all_that_is_in_them():
    model = make("mha")
    cut, before = cut_of(model, "cm"), outputs_of(model)
    for order, reason in (([1, 0, *range(2, 8)], "parted"), ([3, 2, 1, 0, *range(4, 8)], "parted")):
        assert reason in str(refusal(cut, model, order))
    cut.reorder(np.array([2, 3, 0, 1, 6, 7, 4, 5]))
    np.testing.assert_allclose(before[0], outputs_of(model)[0], rtol=1e-4, atol=1e-6)


def refusal(cut, model, order):
    before = bytes_of(model)
    with pytest.raises(Blocked) as caught:
        cut.reorder(np.array(order))
    assert bytes_of(model) == before
    return caught.value


def test_what_is_no_order_is_refused():
    model = make("mlp")
    cut = space_of(model, "neurons").cut
    for order in ([0, 1, 2], [0, 0, 1, 2, 3, 4], [6, 5, 4, 3, 2, 1]):
        assert "no order of 6 units" in str(refusal(cut, model, order))
    cut.apply(np.arange(6) > 0)
    assert "changed since" in str(refusal(cut, model, range(6)))


def test_units_of_which_others_see_different_places_cannot_change_them():
    """``u`` has the second place of two units and the first of the others."""
    body = "y = MatMul(a, w) x = Slice(y, i0, i4, two) z = Slice(y, i4, i8, two) u = Slice(y, i2, i6, two) "
    body += "t = Mul(x, z) o = MatMul(t, v) p = MatMul(u, q) out = Add(o, p)"
    places = {f"i{place}": [place] for place in (0, 2, 4, 6, 8)}
    model = build(body, w="8x8", v="4x4", q="4x4", two=[2], outputs="float[b, s, 4] out", **places)
    cut = cut_of(model, "t")
    assert "units lie differently" in str(refusal(cut, model, [2, 1, 0, 3]))
    before = outputs_of(model)
    reorder(cut, [2, 1, 0, 3])  # what would come of it
    assert np.abs(before[0] - outputs_of(model)[0]).max() > 0.1


def test_notes_of_what_was_measured_channel_by_channel_are_void():
    model = make("mlp")
    product = value_named(model, "o").producer()
    product.meta[KERNEL_KEY] = product.inputs[0].meta[ACTIVATION_KEY] = "old"
    space_of(model, "neurons").cut.reorder(np.array([1, 0, 2, 3, 4, 5]))
    assert not {KERNEL_KEY, ACTIVATION_KEY} & {*product.meta, *product.inputs[0].meta}


def shuffled(model, feeds, kinds):
    """Put all units of all spaces in some other order, and compare the outputs; how many spaces that were."""
    rng, before, count = np.random.default_rng(0), open_model(model).run(feeds), 0
    for kind in kinds:
        for space in find_spaces(model, kind):
            if isinstance(space.cut, Cut):
                space.cut.reorder(rng.permutation(space.count))
                count += 1
    for name, found in open_model(model).run(feeds).items():
        assert np.linalg.norm(before[name] - found) <= 1e-5 * np.linalg.norm(before[name]), name
    return count


def test_heads_and_neurons_of_minilm_can_be_in_any_order(minilm):
    ids = np.random.default_rng(0).integers(5, 400, (2, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    assert shuffled(Cleanup()(load_model(minilm)).model, feeds, ("heads", "neurons")) == 12


def test_groups_of_heads_and_gated_neurons_of_a_decoder_can_be_in_any_order(samples):
    ids = np.random.default_rng(0).integers(5, 400, (2, 7))
    model = Cleanup()(load_model(samples / "decoder/stories260k")).model
    assert shuffled(model, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, ("heads", "neurons")) == 10
