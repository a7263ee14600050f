"""Accuracy and recall against brute force, and standard errors against the bootstrap."""

import math
import time
from pathlib import Path

import numpy as np
import pytest

from retrieval.evaluation.metrics import (
    ClassCounts,
    bootstrap_interval,
    caption_pairs,
    recall_at_k,
    share_of_counts,
    topk_accuracy,
)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def brute_force_recall(scores: np.ndarray, right: np.ndarray, k: int) -> float:
    """Share of the rows with a right column at which any of the k best columns is right."""
    asked = right.any(axis=1)
    best = np.argsort(-scores, axis=1)[:, :k]
    return float(np.take_along_axis(right, best, axis=1).any(axis=1)[asked].mean())


def test_topk_accuracy_counts_the_class_anywhere_in_the_first_k() -> None:
    labels = np.array([[3, 1, 0], [1, 2, 0], [2, 0, 1], [0, 1, 2]])
    found = topk_accuracy(labels, np.array([3, 2, 1, 3]), ks=(1, 2, 3))
    assert [found[k].value for k in (1, 2, 3)] == [0.25, 0.5, 0.75]


def test_standard_error_matches_a_bootstrap_over_classes() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 200)
    chances = rng.beta(0.5, 0.5, 200)  # images of one class succeed or fail together
    hits = rng.binomial(sizes, chances).astype(np.float64)
    draws = rng.integers(0, 200, (4000, 200))
    bootstrap = np.std(hits[draws].sum(axis=1) / sizes[draws].sum(axis=1))
    estimate = share_of_counts(hits, sizes.astype(np.float64))
    assert estimate.standard_error == pytest.approx(bootstrap, rel=0.05)
    independent = math.sqrt(estimate.value * (1 - estimate.value) / sizes.sum())
    assert estimate.standard_error > 1.3 * independent


def test_the_interval_is_that_of_drawing_clusters_one_by_one() -> None:
    rng = np.random.default_rng(0)
    totals = rng.integers(1, 5, 60).astype(np.float64)
    hits = rng.binomial(totals.astype(np.int64), 0.6).astype(np.float64)
    often = rng.multinomial(60, np.full(60, 1 / 60), 20_000)
    one_by_one = np.percentile(often @ hits / (often @ totals), (2.5, 97.5))
    interval = bootstrap_interval(hits, totals, draws=20_000)
    assert interval == pytest.approx(one_by_one, abs=0.005)
    assert interval == bootstrap_interval(hits, totals, draws=20_000)


def test_the_interval_of_100_000_classes_takes_no_time() -> None:
    hits = np.random.default_rng(0).integers(0, 10, 100_000).astype(np.float64)
    start = time.process_time()
    assert bootstrap_interval(hits, np.full(100_000, 10.0))
    assert time.process_time() - start < 3


def test_accuracy_of_parts_adds_up_to_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    labels, targets = rng.integers(0, 7, (50, 5)), rng.integers(0, 7, 50)
    whole = ClassCounts(7)
    whole.add(labels, targets)
    first, second = ClassCounts(7), ClassCounts(7)
    first.add(labels[:13], targets[:13])
    second.add(labels[13:], targets[13:])
    first.counts += second.counts
    assert first.accuracy() == whole.accuracy()


def test_one_class_alone_gives_no_standard_error() -> None:
    found = topk_accuracy(np.array([[0], [0]]), np.array([0, 0]), ks=(1,))
    assert found[1].value == 1.0
    assert math.isnan(found[1].standard_error)


@pytest.mark.parametrize("captions_per_image", [1, 5])
def test_recall_equals_brute_force(captions_per_image: int) -> None:
    rng = np.random.default_rng(captions_per_image)
    images, texts = unit(rng, 90, 4), unit(rng, 90 * captions_per_image, 4)
    of_image = np.repeat(np.arange(90), captions_per_image)
    pairs = np.stack([of_image, np.arange(len(texts))], axis=1)
    right = np.zeros((90, len(texts)), bool)
    right[pairs[:, 0], pairs[:, 1]] = True
    scores = images @ texts.T
    found = recall_at_k(images, texts, rng.permutation(pairs))
    for k in (1, 5, 10):
        assert found.image_to_text[k].value == pytest.approx(brute_force_recall(scores, right, k))
        assert found.text_to_image[k].value == pytest.approx(
            brute_force_recall(scores.T, right.T, k)
        )


def test_every_image_that_carries_a_caption_is_right_for_it() -> None:
    captions = [("cat", "pet"), ("cat", "pet"), ("dog", "pet"), ()]
    texts, pairs = caption_pairs(captions)
    assert texts == ["cat", "pet", "dog"]
    rng = np.random.default_rng(0)
    images, embeds = unit(rng, 4, 3), unit(rng, 3, 3)
    right = np.array([[c in own for c in texts] for own in captions])
    assert {tuple(pair) for pair in pairs} == set(zip(*np.nonzero(right), strict=True))
    found = recall_at_k(images, embeds, pairs, ks=(1, 2))
    scores = images @ embeds.T  # the image without captions distracts, but is not asked about
    for k in (1, 2):
        assert found.image_to_text[k].value == pytest.approx(brute_force_recall(scores, right, k))
        assert found.text_to_image[k].value == pytest.approx(
            brute_force_recall(scores.T, right.T, k)
        )


def test_an_embedding_of_nan_finds_nothing() -> None:
    images = np.eye(4, dtype=np.float32)
    images[1] = np.nan
    pairs = np.array([[0, 3], [1, 1], [2, 2], [3, 0]])
    found = recall_at_k(images, np.eye(4, dtype=np.float32), pairs, ks=(1,))
    assert found.image_to_text[1].value == 0.25  # image 2 alone


def test_images_with_the_same_captions_are_one_cluster() -> None:
    rng = np.random.default_rng(0)
    images, texts = unit(rng, 60, 4), unit(rng, 60, 4)
    pairs = np.stack([np.arange(60), np.arange(60)], axis=1)
    once = recall_at_k(images, texts, pairs).image_to_text[10]
    copies = np.stack([np.arange(180), np.repeat(np.arange(60), 3)], axis=1)
    thrice = recall_at_k(np.repeat(images, 3, axis=0), texts, copies).image_to_text[10]
    assert thrice.value == pytest.approx(once.value)
    assert thrice.standard_error == pytest.approx(once.standard_error)


def test_recall_keeps_no_full_score_matrix() -> None:
    """12,000 x 12,000 scores would take 576 MB; the peak rises by less than half of that."""
    vectors = unit(np.random.default_rng(0), 12_000, 8)
    pairs = np.stack([np.arange(12_000)] * 2, axis=1)
    recall_at_k(vectors[:500], vectors[:500], pairs[:500])  # threads and their buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = peak_memory_mb()
    recall_at_k(vectors, vectors, pairs, ks=(1,))
    assert peak_memory_mb() - before < 250


def peak_memory_mb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1000
