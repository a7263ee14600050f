"""The closed forms that training starts from."""

import torch

from contrastive.train.closed_form import least_squares, whitening


def test_whitened_features_are_uncorrelated_with_equal_variance():
    torch.manual_seed(0)
    features = torch.randn(5000, 6, dtype=torch.float64) @ torch.randn(6, 6).double() + 3
    count = torch.tensor(5000.0, dtype=torch.float64)
    mean, matrix = whitening(count, features.sum(0), features.T @ features, shrinkage=0.0)
    white = (features.float() - mean) @ matrix
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(matrix, matrix.T)


def test_a_direction_without_variance_is_not_blown_up():
    features = torch.zeros(10, 3, dtype=torch.float64)
    features[:, 0] = torch.arange(10)
    count = torch.tensor(10.0, dtype=torch.float64)
    _, matrix = whitening(count, features.sum(0), features.T @ features)
    assert matrix.isfinite().all()
    assert matrix.abs().max() < 10


def test_least_squares_finds_a_linear_map_and_shrinks_a_random_one():
    torch.manual_seed(0)
    y = torch.randn(4000, 5, dtype=torch.float64)
    true = torch.randn(3, 5, dtype=torch.float64)
    found = least_squares(y.T @ y, y.T @ (y @ true.T), ridge=0.0)
    torch.testing.assert_close(found, true.float())
    smaller = least_squares(y.T @ y, y.T @ (y @ true.T), ridge=1.0)
    assert smaller.norm() < 0.6 * found.norm()
