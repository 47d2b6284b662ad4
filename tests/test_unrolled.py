"""An unrolled draft proposes what a draft proposes step by step, whatever happens to the rows between two rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cached_models import VOCABULARY, Tiny, forward, portable, serialized
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import DataInvalid, ModelInvalid, ResourceExhausted, UsageError
from qexport.exporter.families.form import Form
from qexport.exporter.load import open_folder
from qexport.runtime.cache import LEAST
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.distribution import draw
from qexport.runtime.sampling.noise import Purpose, uniform
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.session import SessionOptions
from qexport.runtime.speculation import chains as chains_module
from qexport.runtime.speculation.chains import WIDEST, Chain, Chains, Draw
from qexport.runtime.speculation.draft import Draft
from qexport.runtime.speculation.proposal import NOTHING, Row
from qexport.runtime.speculation.unrolled import Unrolled, unrolls

ONE = SessionOptions(threads=1)
STORIES = Path(__file__).resolve().parents[1] / "samples/decoder/stories260k"
POSITIONS = 90
TINY = Tiny(positions=POSITIONS)
MODEL = serialized(portable(TINY))
GREEDY, DRAWN = Sampling(), Sampling(temperature=1.3, seed=11)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8]]


@pytest.fixture(scope="module")
def chains():
    return Chains(MODEL, ONE)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(MODEL, ONE)


def rows_of(prompts):
    return [Row(list(ids), len(ids), stream) for stream, ids in enumerate(prompts)]


def same(found, truth):
    """The same tokens of the same distributions."""
    assert [(a.ids, a.spare, a.proposer) for a in found] == [(b.ids, b.spare, b.proposer) for b in truth]
    for a, b in zip(found, truth, strict=True):
        assert (a.chances is None) == (b.chances is None)
        if a.chances is not None:
            assert a.chances.dtype == np.float64
            np.testing.assert_allclose(a.chances, b.chances, atol=2e-6)


def continued(ids, steps):
    ids, start = list(ids), len(ids)
    for _ in range(steps):
        ids.append(int(forward(TINY, ids)[-1].argmax()))
    return tuple(ids[start:])


# ---------------------------------------------------------------- proposals


def test_the_most_likely_tokens_are_those_of_a_forward_in_numpy(chains):
    unrolled, rows = Unrolled(chains, Sampler(GREEDY), VOCABULARY), rows_of(PROMPTS)
    unrolled.begin(rows)
    found = unrolled.propose(rows, [4, 2, 0])
    assert [proposal.ids for proposal in found] == [continued(PROMPTS[0], 4), continued(PROMPTS[1], 2), ()]
    assert found[2] is NOTHING
    assert found[0].proposer == "draft"


def test_drawn_tokens_are_those_of_the_numbers_of_their_positions(chains):
    unrolled, rows = Unrolled(chains, Sampler(DRAWN), VOCABULARY), rows_of(PROMPTS)
    unrolled.begin(rows)
    for row, proposal in zip(rows, unrolled.propose(rows, [3, 3, 3]), strict=True):
        tokens = [*proposal.ids, proposal.spare]
        assert proposal.chances.shape == (4, VOCABULARY)
        for place, (token, chances) in enumerate(zip(tokens, proposal.chances, strict=True)):
            number = uniform(11, row.stream, len(row.ids) + place, Purpose.DRAFT)
            assert token == draw(chances, number)
            logits = forward(TINY, [*row.ids, *tokens[:place]])[-1] / 1.3
            truth = np.exp(logits - logits.max())
            np.testing.assert_allclose(chances, truth / truth.sum(), atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_tokens_do_not_depend_on_how_many_are_asked_for(chains, sampling):
    found = []
    for most in (1, 2, 5, 8):
        unrolled, rows = Unrolled(chains, Sampler(sampling), VOCABULARY), rows_of(PROMPTS[:1])
        unrolled.begin(rows)
        proposal = unrolled.propose(rows, [most])[0]
        found.append([*proposal.ids, *([] if proposal.spare is None else [proposal.spare])])
    longest = found[-1]
    assert all(longest[: len(tokens)] == tokens for tokens in found)


ROUND = st.tuples(
    st.lists(st.integers(-1, 6), min_size=3, max_size=3),  # how many are asked for in each row
    st.lists(st.integers(0, 6), min_size=3, max_size=3),  # how many of them are taken
    st.lists(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=3, max_size=3
    ),  # what else comes
    st.sampled_from([None, None, None, (0, 2), (2, 0), (1,)]),  # which rows go on
)


@given(
    st.lists(ROUND, min_size=1, max_size=6),
    st.sampled_from([Sampler(GREEDY), Sampler(DRAWN), Sampler(DRAWN, coupled=True)]),
)
@settings(max_examples=40, deadline=None)
def test_proposals_are_those_of_a_draft_whatever_is_taken(chains, decoder, rounds, sampler):
    both = Unrolled(chains, sampler, VOCABULARY), Draft(decoder, sampler, VOCABULARY)
    rows = rows_of(PROMPTS)
    for proposer in both:
        proposer.begin(rows)
    for most, taken, more, going in rounds:
        found, truth = (proposer.propose(rows, most[: len(rows)]) for proposer in both)
        same(found, truth)
        for row, proposal, count, ids in zip(rows, found, taken, more, strict=False):
            row.ids += [*proposal.ids[:count], *ids]
        kept = [index for index in going or range(len(rows)) if index < len(rows)]
        if going is not None and kept:
            rows = [rows[index] for index in kept]
            for proposer in both:
                proposer.keep(kept)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_proposals_stay_right_where_buffers_grow(sampling):
    tiny = Tiny(positions=400)
    model, sampler = serialized(portable(tiny)), Sampler(sampling)
    unrolled, draft = Unrolled(Chains(model, ONE), sampler, VOCABULARY), Draft(Decoder(model, ONE), sampler, VOCABULARY)
    rng = np.random.default_rng(3)
    rows = rows_of([rng.integers(0, VOCABULARY, count).tolist() for count in (LEAST - 6, 5)])
    unrolled.begin(rows), draft.begin(rows)
    for _ in range(12):
        found = unrolled.propose(rows, [6, 6])
        same(found, draft.propose(rows, [6, 6]))
        for row, proposal in zip(rows, found, strict=True):
            row.ids += [*proposal.ids[: rng.integers(0, 7)], 1]
    assert len(rows[0].ids) > LEAST


def test_prompts_that_are_longer_than_a_call_reads_are_read_in_pieces():
    tiny = Tiny(positions=4 * WIDEST)
    model, rng = serialized(portable(tiny)), np.random.default_rng(4)
    rows = rows_of([rng.integers(0, VOCABULARY, count).tolist() for count in (2 * WIDEST + 9, 3, WIDEST, WIDEST + 1)])
    for sampling in (GREEDY, DRAWN):
        unrolled = Unrolled(Chains(model, ONE), Sampler(sampling), VOCABULARY)
        draft = Draft(Decoder(model, ONE), Sampler(sampling), VOCABULARY)
        unrolled.begin(rows), draft.begin(rows)
        same(unrolled.propose(rows, [3] * 4), draft.propose(rows, [3] * 4))
        assert unrolled.effort.calls == 2 + 3 + unrolled._sampler.weighed  # two pieces in front, then steps


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_rows_near_the_end_of_the_positions_get_what_a_draft_gives(chains, decoder, sampling):
    rng = np.random.default_rng(5)
    for length in range(POSITIONS - 3, POSITIONS + 3):
        rows = rows_of([rng.integers(0, VOCABULARY, length).tolist(), [4, 5]])
        unrolled, draft = (
            kind(of, Sampler(sampling), VOCABULARY) for kind, of in ((Unrolled, chains), (Draft, decoder))
        )
        unrolled.begin(rows), draft.begin(rows)
        for _ in range(5):
            found = unrolled.propose(rows, [4, 4])
            same(found, draft.propose(rows, [4, 4]))
            assert len(found[0].ids) == max(0, min(4, POSITIONS - len(rows[0].ids)))
            rows[0].ids += [*found[0].ids[:1], 6]
            rows[1].ids += [*found[1].ids[:1], 7, 8, 9]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_rows_may_change_places(chains, decoder, sampling):
    rows = rows_of(PROMPTS)
    unrolled, draft = (kind(of, Sampler(sampling), VOCABULARY) for kind, of in ((Unrolled, chains), (Draft, decoder)))
    unrolled.begin(rows), draft.begin(rows)
    for order in ((2, 0, 1), (0, 2, 1), (1, 2), (1, 0), (0,)):
        for _ in range(2):
            most = [4] * len(rows)
            found = unrolled.propose(rows, most)
            same(found, draft.propose(rows, most))
            for row in rows:
                row.ids.append(5)
        rows = [rows[index] for index in order]
        unrolled.keep(order), draft.keep(order)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("vocabulary", [VOCABULARY - 20, VOCABULARY + 5])
def test_targets_may_have_another_padding(chains, decoder, sampling, vocabulary):
    rows = rows_of(PROMPTS)
    unrolled, draft = (kind(of, Sampler(sampling), vocabulary) for kind, of in ((Unrolled, chains), (Draft, decoder)))
    unrolled.begin(rows), draft.begin(rows)
    found = unrolled.propose(rows, [5, 5, 5])
    same(found, draft.propose(rows, [5, 5, 5]))
    assert all(token < vocabulary for proposal in found for token in proposal.ids)
    assert sampling.greedy or found[0].chances.shape == (6, vocabulary)


def test_a_draft_without_numbers_proposes_nothing_where_it_draws():
    tiny = Tiny(positions=POSITIONS)
    tiny.weights["head"] = tiny.weights["head"].copy()
    tiny.weights["head"][:, 7] = np.nan
    chains, rows = Chains(serialized(portable(tiny)), ONE), rows_of(PROMPTS)
    drawing, taking = (Unrolled(chains, Sampler(sampling), VOCABULARY) for sampling in (DRAWN, GREEDY))
    drawing.begin(rows), taking.begin(rows)
    assert drawing.propose(rows, [4, 4, 4]) == [NOTHING] * 3
    assert all(0 <= token < VOCABULARY for proposal in taking.propose(rows, [4, 4, 4]) for token in proposal.ids)


def test_what_was_proposed_stays_when_more_is():
    chains = Chains(MODEL, ONE)
    unrolled, rows = Unrolled(chains, Sampler(DRAWN), VOCABULARY), rows_of(PROMPTS[:1])
    unrolled.begin(rows)
    first = unrolled.propose(rows, [3])[0]
    before = first.chances.copy()
    rows[0].ids += [9, 9, 9]
    unrolled.propose(rows, [3])
    assert np.array_equal(first.chances, before)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_effort_is_that_of_a_draft_which_reads_the_same_step_by_step(chains, decoder, sampling):
    unrolled, draft = (kind(of, Sampler(sampling), VOCABULARY) for kind, of in ((Unrolled, chains), (Draft, decoder)))
    rows = rows_of(PROMPTS)
    unrolled.begin(rows), draft.begin(rows)
    steps = 4 + unrolled._sampler.weighed
    for taken in (2, 0, 4, 1):
        before = unrolled.effort, draft.effort
        found = unrolled.propose(rows, [4] * len(rows))
        draft.propose(rows, [4] * len(rows))
        done, truth = unrolled.effort.since(before[0]), draft.effort.since(before[1])
        assert (done.calls, done.width, done.valid) == (truth.calls, truth.width, truth.valid)
        assert done.calls == steps
        assert done.native > 0
        for row, proposal in zip(rows, found, strict=True):
            row.ids += [*proposal.ids[:taken], (proposal.ids[taken] + 1) % VOCABULARY if taken < 4 else 3]


# ---------------------------------------------------------------- chains


def test_sessions_are_made_once_for_each_number_of_steps(chains):
    made = {steps: chains.session(chains_module.Kind(steps, False, VOCABULARY)) for steps in (2, 3)}
    assert made[2] is chains.session(chains_module.Kind(2, False, VOCABULARY))
    assert made[2] is not made[3]


def test_chains_of_one_model_do_not_share_their_state(chains):
    one, other = Chain(chains), Chain(chains)
    assert one.say([[3, 1, 4]], 2)[0] == [list(continued([3, 1, 4], 2))]
    assert other.say([[8]], 2)[0] == [list(continued([8], 2))]
    assert (list(one.lengths), list(other.lengths)) == ([4], [2])


def test_a_row_without_new_tokens_is_left_alone(chains):
    chain = Chain(chains)
    chain.reset(2)
    chain.say([[3, 1], [1, 5, 9]], 3)
    chain.rollback([2, 3])
    chain.say([[4], []], 3)
    assert list(chain.lengths) == [5, 3]
    assert chain.say([[], [2]], 2)[0][1] == list(continued([1, 5, 9, 2], 2))


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_tokens_that_do_not_exist_are_refused(chains, wrong):
    chain = Chain(chains)
    with pytest.raises(DataInvalid, match=f"token {wrong} does not exist"):
        chain.say([[3, wrong]], 2)
    assert list(chain.lengths) == [0]


def test_more_than_the_model_has_positions_for_is_refused(chains):
    chain = Chain(chains)
    with pytest.raises(DataInvalid, match=f"the model has {POSITIONS} positions"):
        chain.say([[1] * (POSITIONS + 1)], 2)
    assert chain.say([[8]], 2)[0] == [list(continued([8], 2))]


def test_drawing_reads_the_numbers_it_is_given(chains):
    chain = Chain(chains)
    tokens, chances = chain.say([[8]], 3, Draw(1.0, [[0.0, 0.5, 0.999]]))
    assert tokens == [[draw(p, number) for p, number in zip(chances[0], (0.0, 0.5, 0.999), strict=True)]]
    assert tokens[0][0] == 0


def test_close_may_be_called_twice():
    made = Chains(MODEL, ONE)
    Chain(made).say([[8]], 1)
    made.close()
    made.close()


@pytest.mark.parametrize(
    ("sampling", "fits"),
    [
        (GREEDY, True),
        (DRAWN, True),
        (Sampling(temperature=1, top_k=5), False),
        (Sampling(temperature=1, top_p=0.5), False),
        (Sampling(temperature=1, min_p=0.1), False),
        (Sampling(repetition_penalty=1.1), False),
        (Sampling(logit_bias={3: 1.0}), False),
    ],
)
def test_settings_that_a_graph_does_not_have_are_refused(chains, sampling, fits):
    assert unrolls(sampling) == fits
    if fits:
        Unrolled(chains, Sampler(sampling), VOCABULARY)
    else:
        with pytest.raises(UsageError, match="nothing else"):
            Unrolled(chains, Sampler(sampling), VOCABULARY)


def test_large_models_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(chains_module, "LARGEST", len(MODEL) - 1)
    path = tmp_path / "model.onnx"
    path.write_bytes(MODEL)
    for model in (MODEL, path):
        with pytest.raises(ResourceExhausted, match="is not unrolled"):
            Chains(model, ONE)


def test_a_model_that_reads_something_once_per_sequence_is_refused():
    with pytest.raises(ModelInvalid, match="it reads \\['bias'\\]"):
        Chains(serialized(portable(TINY, extra=True)), ONE)


def test_a_model_whose_weights_lie_elsewhere_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    ir.save(portable(TINY), path, external_data="weights")
    with pytest.raises(ModelInvalid, match="lies in another file"):
        Chains(path, ONE)


def test_a_model_that_cannot_be_unrolled_is_refused_with_the_reason():
    model = portable(TINY)
    value = next(node for node in model.graph if node.op_type == "Gather").outputs[0]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", 32])
    model.graph.outputs.append(value)
    with pytest.raises(ModelInvalid, match="belongs to one step"):
        Chains(serialized(model), ONE)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, seed=2)])
def test_a_real_draft(sampling):
    config, folder, build = open_folder(STORIES)
    model, sampler = serialized(build(config, folder, Form(cached=True))), Sampler(sampling)
    unrolled, draft = Unrolled(Chains(model, ONE), sampler, 512), Draft(Decoder(model, ONE), sampler, 512)
    rng, rows = np.random.default_rng(0), rows_of([[1, 403, 407, 261, 378], [1, 410]])
    unrolled.begin(rows), draft.begin(rows)
    for most in (4, 1, 7, 4, 2, 4, 4):
        found = unrolled.propose(rows, [most, most])
        same(found, draft.propose(rows, [most, most]))
        for row, proposal in zip(rows, found, strict=True):
            row.ids += [*proposal.ids[: rng.integers(0, most + 1)], int(rng.integers(3, 512))]
