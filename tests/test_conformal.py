"""Promises of scores and of candidates hold on average, whatever the data are."""

import numpy as np
import pytest

from retrieval.search.conformal import fewest_candidates, losses, p_values


def test_a_rate_of_exchangeable_scores_is_refused() -> None:
    """Of 99 examples and another from the same law, 5% exactly."""
    rng = np.random.default_rng(0)
    draws = 4000
    scores = rng.gamma(0.5, size=(draws, 100))
    refused = [p_values(row[:1], row[1:])[0] <= 0.05 for row in scores]
    assert abs(np.mean(refused) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / draws)


def test_a_score_that_is_no_number_says_nothing() -> None:
    found = p_values(np.array([np.nan, 1.0, 5.0]), np.array([2.0, 0.0, 1.0]))
    assert np.isnan(found[0])
    assert found[1:].tolist() == [0.75, 1.0]


@pytest.mark.parametrize("lost", [0.01, 0.05])
def test_candidates_lose_at_most_what_was_promised(lost: float) -> None:
    """On average over draws of validation queries, of which some need many candidates."""
    rng = np.random.default_rng(1)
    draws, queries, k = 400, 150, 5
    on_tests, with_one_fewer = [], []
    for _ in range(draws):
        hard = rng.gamma(1.0, size=(2 * queries, 1)) * 20
        ranks = rng.geometric(1 / (1 + hard), size=(2 * queries, k)) - 1
        chosen = fewest_candidates(ranks[:queries], lost)
        assert chosen is not None
        on_tests.append(losses(ranks[queries:], np.array([chosen])).mean())
        with_one_fewer.append(losses(ranks[:queries], np.array([chosen - 1])).mean())
    error = np.std(on_tests) / np.sqrt(draws)
    assert np.mean(on_tests) <= lost + 2 * error
    # and no more candidates than that takes: one fewer is more than the validation queries allow
    assert min(with_one_fewer) * queries + 1 > lost * (queries + 1)


def test_losses_never_grow_with_candidates() -> None:
    ranks = np.random.default_rng(2).integers(0, 50, (30, 4))
    found = losses(ranks, np.arange(60)).mean(axis=0)
    assert (np.diff(found) <= 0).all()
    assert (found[0], found[-1]) == (1.0, 0.0)


def test_too_few_queries_promise_nothing() -> None:
    assert fewest_candidates(np.zeros((98, 3), int), 0.01) is None
    assert fewest_candidates(np.zeros((99, 3), int), 0.01) == 1
    assert fewest_candidates(np.zeros((0, 3), int), 0.5) is None
