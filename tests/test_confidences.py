"""How far probabilities can be trusted: calibration errors and temperatures."""

import numpy as np
import pytest

from contrastive.model.lit import LitModel
from retrieval import evaluate, load_dataset
from retrieval.evaluation.calibration_error import (
    ConfidenceBins,
    confidence,
    fit_temperature,
    mean_nll,
    read_temperatures,
    temperatures_file,
    write_temperatures,
)


def drawn(temperature: float, count: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and classes that are as frequent as their softmax at a temperature says."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, 10))
    noise = rng.gumbel(size=logits.shape)
    return logits, (logits / temperature + noise).argmax(axis=1)


def error_at(logits: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    bins = ConfidenceBins()
    bins.add(confidence(logits / temperature), logits.argmax(axis=1) == targets)
    return bins.error()


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_that_drew_the_classes_is_found(true: float) -> None:
    found = fit_temperature(*drawn(true))
    assert found == pytest.approx(true, rel=0.1)
    held_apart = drawn(true, seed=1)
    assert error_at(*held_apart, found) < 0.02
    logits, targets = held_apart
    bins = ConfidenceBins()  # what chance gives where the temperature is right
    bins.add(confidence(logits / true), logits.argmax(axis=1) == targets)
    assert bins.error() / 3 < bins.chance() < 3 * bins.error()
    if true == 3.0:
        assert error_at(*held_apart, 1.0) > 0.2


def test_a_temperature_never_worsens_the_likelihood_it_was_fitted_on() -> None:
    rng = np.random.default_rng(2)
    for count in (1, 2, 5, 50):
        for spread in (0.0, 1e-3, 1.0, 300.0):
            logits = rng.normal(0, 1, (count, 4)) * spread
            targets = rng.integers(0, 4, count)
            at = mean_nll(logits / fit_temperature(logits, targets), targets)
            assert at <= mean_nll(logits, targets)


def test_nothing_to_fit_is_temperature_one() -> None:
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) == 1.0
    assert fit_temperature(np.full((2, 3), np.nan), np.array([0, 1])) == 1.0
    assert np.isnan(ConfidenceBins().error())


def test_bins_of_any_order_and_number_of_batches_add_up_to_the_same() -> None:
    logits, targets = drawn(2.0, 500)
    sure, right = confidence(logits), logits.argmax(axis=1) == targets
    whole, parts = ConfidenceBins(), ConfidenceBins()
    whole.add(sure, right)
    for rows in np.array_split(np.random.default_rng(3).permutation(500), 7):
        parts.add(sure[rows], right[rows])
    assert (whole.counts == parts.counts).all()
    by_hand = 0.0
    for low in range(15):
        rows = (sure > low / 15) & (sure <= (low + 1) / 15)
        by_hand += abs((right[rows] - sure[rows]).sum()) / 500
    assert whole.error() == pytest.approx(by_hand, abs=1e-4)


def test_examples_of_a_temperature_are_not_measured_on(tiny_model: LitModel, emoji_shards) -> None:
    dataset = load_dataset("shards", emoji_shards / "heldout_captions")
    size = tiny_model.patch_sizes[:1]
    plain = evaluate(tiny_model, dataset, size, num_workers=0)
    fitted = evaluate(tiny_model, dataset, size, num_workers=0, examples=7)
    before, after = plain.calibration[size[0]], fitted.calibration[size[0]]
    assert before.temperature is None
    assert before.images == plain.num_images
    assert (after.examples, after.images) == (7, plain.num_images - 7)
    assert after.temperature is not None
    assert fitted.accuracy == plain.accuracy


def test_temperatures_are_of_one_model(tmp_path) -> None:
    write_temperatures(tmp_path, ("a", "b"), {28: 1.5, 14: 0.7}, "pets")
    assert read_temperatures(tmp_path, lambda: ("a", "b")) == {28: 1.5, 14: 0.7}
    assert read_temperatures(tmp_path, lambda: ("a", "c")) == {}
    file = temperatures_file(tmp_path)
    file.write_text(file.read_text().replace("1.5", "2.5"))
    assert read_temperatures(tmp_path, lambda: ("a", "b")) == {}
