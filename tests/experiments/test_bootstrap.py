"""Paired bootstrap intervals, against cases whose answer is known."""

import numpy as np
import pytest

from experiments import bootstrap


def means(values):
    return np.stack([values, np.ones(len(values))], axis=1)


def test_differences_that_are_all_the_same_have_no_width():
    """Whatever the scores are: pairs are drawn together."""
    theirs = np.random.default_rng(0).uniform(size=50)
    found = bootstrap.difference(means(theirs + 0.25), means(theirs))
    assert found == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_of_a_mean_is_the_normal_one():
    """n = 400, a standard deviation s of the differences: 1.96 s / sqrt(n) to each side; unpaired it would be 14 times as wide."""
    rng = np.random.default_rng(1)
    theirs, apart = rng.normal(0, 10, 400), rng.normal(0.3, 1, 400)
    found = bootstrap.difference(means(theirs + apart), means(theirs))
    half = 1.96 * apart.std() / np.sqrt(400)
    assert found.value == pytest.approx(apart.mean())
    assert found.low == pytest.approx(apart.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(apart.mean() + half, abs=0.06 * half)
    assert bootstrap.difference(means(theirs + apart), means(theirs)) == found  # seeded
    assert bootstrap.difference(means(theirs + apart), means(theirs), seed=1) != found


def test_a_score_is_a_ratio_of_sums():
    """Of two examples, hits of (1 of 1) and (0 of 3): 1/4, not the mean of 1 and 0; resamples are 1/1, 1/4, 1/4 and 0/3."""
    counts = np.array([[1.0, 1.0], [0.0, 3.0]])
    assert bootstrap.score(counts) == 0.25 and np.isnan(bootstrap.score(np.zeros((2, 2))))
    assert bootstrap.difference(counts, np.array([[0.0, 1.0], [0.0, 1.0]])) == pytest.approx((0.25, 0, 1))


@pytest.mark.parametrize(("ours", "theirs"), [((3, 2), (4, 2)), ((0, 2), (0, 2)), ((3,), (3,))])
def test_other_examples_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="of the same examples"):
        bootstrap.difference(np.zeros(ours), np.zeros(theirs))
