"""Task metrics: agreement with scipy and numpy, and no number out of NaN."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from qexport.calibration.reading.tasks import Spearman, Task, Top1, average_ranks, spearman
from qexport.errors import BuildFailed, DataInvalid

numbers = st.integers(-4, 4).map(float)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=30))
def test_the_correlation_is_scipys_ties_included(pairs):
    one, other = (np.array(side) for side in zip(*pairs, strict=True))
    assume(np.ptp(one) > 0)
    assume(np.ptp(other) > 0)
    assert spearman(one, other) == pytest.approx(scipy.stats.spearmanr(one, other).statistic, abs=1e-12)


@given(st.lists(numbers, min_size=1, max_size=30))
def test_the_ranks_are_scipys(values):
    np.testing.assert_array_equal(average_ranks(np.array(values)), scipy.stats.rankdata(values))


def test_spearman_ranks_pairs_by_the_cosine_whatever_the_length_of_the_vectors():
    first = np.array([[1, 0], [10, 0], [0.1, 0]], np.float32)
    second = np.array([[0, 9], [5, 5], [0.5, 0]], np.float32)
    task: Task = Spearman(np.array([0.0, 2.5, 5.0]))
    assert task.score(np.concatenate([first, second])) == pytest.approx(100)
    assert task.predictions(np.concatenate([first, second])) is None


def test_embeddings_that_are_all_alike_or_zero_score_nothing():
    task = Spearman(np.array([0.0, 1.0, 2.0]))
    assert task.score(np.ones((6, 4))) == 0
    assert task.score(np.zeros((6, 4))) == 0


def test_top1_counts_and_predicts_the_first_largest():
    task: Task = Top1(np.array([1, 0, 2, 1]))
    outputs = np.array([[0, 1, 0], [3, 3, 0], [0, 5, 1], [0, 7, 7]], np.float16)
    assert task.score(outputs) == 75
    assert task.predictions(outputs).tolist() == [1, 0, 1, 1]
    assert task.score(outputs.reshape(4, 3, 1, 1)) == 75


@pytest.mark.parametrize("task", [Spearman(np.array([0.0, 1.0])), Top1(np.arange(4) % 2)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_a_failed_build_and_not_a_score(task, value):
    outputs = np.eye(4, 2)
    outputs[3, 0] = value
    with pytest.raises(BuildFailed, match="1 of 4 samples"):
        task.score(outputs)


@pytest.mark.parametrize("task", [Spearman(np.array([0.0, 1.0])), Top1(np.arange(4))])
def test_outputs_for_another_number_of_samples_are_refused(task):
    with pytest.raises(DataInvalid, match="expected 4 outputs"):
        task.score(np.zeros((3, 4)))


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(DataInvalid, match="label 3"):
        Top1(np.array([0, 3])).score(np.zeros((2, 3)))
