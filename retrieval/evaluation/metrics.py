"""Zero-shot accuracy and retrieval recall, exact, with standard errors that respect clusters.

Images of one class (drawings of one thing, frames of one clip) are not independent, so every
standard error here treats whole clusters as the unit of sampling (the linearised ratio estimator,
Cochran, Sampling Techniques, 1977, section 6.3), and so does the bootstrap.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import faiss
import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Estimate:
    """A share in [0, 1] and its standard error (nan where one cluster alone gives none)."""

    value: float
    standard_error: float
    interval: tuple[float, float] | None = None  # 95%, of accuracies

    def percent(self) -> str:
        """`29.1 ±1.3`: both in per cent."""
        error = "" if math.isnan(self.standard_error) else f" ±{100 * self.standard_error:.1f}"
        return f"{100 * self.value:.1f}{error}"

    def percent_interval(self) -> str:
        """`26.7-31.4`, or nothing where there is no interval."""
        return "-".join(f"{100 * bound:.1f}" for bound in self.interval or ())


def share_of_counts(hits: Float[np.ndarray, " c"], totals: Float[np.ndarray, " c"]) -> Estimate:
    """sum(hits) / sum(totals) over clusters, with its clustered standard error.

    hits, totals: per cluster, how many observations were right and how many there were (empty
    clusters count for nothing). Without any observation both numbers are nan.
    """
    seen = totals > 0
    hits, totals = hits[seen], totals[seen]
    clusters, count = len(totals), float(totals.sum())
    if not clusters:
        return Estimate(math.nan, math.nan)
    value = float(hits.sum()) / count
    if clusters == 1:
        return Estimate(value, math.nan)
    deviations = hits - value * totals
    variance = clusters / (clusters - 1) * float((deviations**2).sum()) / count**2
    return Estimate(value, math.sqrt(variance))


def bootstrap_interval(
    hits: Float[np.ndarray, " c"], totals: Float[np.ndarray, " c"], draws: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95% interval of sum(hits) / sum(totals): percentiles over `draws` samples of whole clusters.

    The clusters that have observations are drawn with replacement, as many as there are (Efron and
    Tibshirani, 1993, chapter 13); what is drawn is how many of each kind, those with equal numbers
    being one kind. A pure function of its arguments; None for fewer than two.
    """
    seen = totals > 0
    hits, totals = hits[seen], totals[seen]
    if len(totals) < 2:
        return None
    kinds, count = np.unique(np.stack([hits, totals], axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    block = max(1, 2**20 // len(kinds))
    sums = [
        rng.multinomial(len(totals), count / len(totals), min(block, draws - start)) @ kinds
        for start in range(0, draws, block)
    ]
    values = np.divide(*np.concatenate(sums).T)
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


class ClassCounts:
    """Right answers per class, for top-k accuracy. Adds up over batches and ranks exactly.

    `counts` is (num_classes, 1 + len(ks)) int64: images seen, then images right within each k.
    """

    def __init__(self, num_classes: int, ks: Sequence[int] = (1, 5)) -> None:
        self.ks = tuple(ks)
        self.counts = np.zeros((num_classes, 1 + len(self.ks)), np.int64)

    def add(
        self,
        labels: Int[np.ndarray, "n k"],
        targets: Int[np.ndarray, " n"],
        accepted: Sequence[Sequence[int]] = (),
    ) -> Bool[np.ndarray, " n"]:
        """Count images; returns of which the first class is right.

        labels: predicted classes, best first, at least as many as the classes or max(ks).

        accepted: per image, all the classes that are right, where there may be several; the
        image counts for the class `targets` says.
        """
        right = labels == targets[:, None]
        if accepted:
            right = np.array([np.isin(row, own) for row, own in zip(labels, accepted, strict=True)])
        columns = [np.ones(len(targets), bool)] + [right[:, :k].any(axis=1) for k in self.ks]
        np.add.at(self.counts, targets, np.stack(columns, axis=1).astype(np.int64))
        return right[:, 0]

    def accuracy(self) -> dict[int, Estimate]:
        """Top-k accuracy per k; standard errors and intervals by class."""
        counts = self.counts.astype(np.float64)
        return {k: _with_interval(counts[:, i], counts[:, 0]) for i, k in enumerate(self.ks, 1)}

    def class_recall(self) -> Estimate:
        """The mean over classes of each one's top-1 accuracy; classes without images aside."""
        seen = self.counts[:, 0] > 0
        shares = self.counts[seen, 1] / self.counts[seen, 0]
        return _with_interval(shares, np.ones_like(shares))


def _with_interval(hits: Float[np.ndarray, " c"], totals: Float[np.ndarray, " c"]) -> Estimate:
    return replace(share_of_counts(hits, totals), interval=bootstrap_interval(hits, totals))


def topk_accuracy(
    labels: Int[np.ndarray, "n k"], targets: Int[np.ndarray, " n"], ks: Sequence[int] = (1, 5)
) -> dict[int, Estimate]:
    """Share of images whose class is among the first k labels, per k; clustered by class.

    labels: predicted classes, best first. targets: the right classes, not negative.
    """
    counts = ClassCounts(int(targets.max(initial=-1)) + 1, ks)
    counts.add(labels, targets)
    return counts.accuracy()


def caption_pairs(captions: Iterable[Sequence[str]]) -> tuple[list[str], Int[np.ndarray, "p 2"]]:
    """The distinct texts of many images, and which text describes which image.

    captions: per image, its list of captions. Returns the texts in order of first appearance and
    the pairs (image, text) of all images and their captions, for `recall_at_k`.
    """
    numbers: dict[str, int] = {}
    pairs = {
        (image, numbers.setdefault(text, len(numbers))): None
        for image, texts in enumerate(captions)
        for text in texts
    }
    return list(numbers), np.array(list(pairs), np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Recall:
    """Recall@k both ways, per k."""

    image_to_text: dict[int, Estimate]
    text_to_image: dict[int, Estimate]


def recall_at_k(
    image_embeds: Float[np.ndarray, "n d"],
    text_embeds: Float[np.ndarray, "m d"],
    pairs: Int[np.ndarray, "p 2"],
    ks: Sequence[int] = (1, 5, 10),
) -> Recall:
    """Exact recall@k, both ways, for any pairing of unit-norm images and texts.

    pairs: every right (image, text) pair. An image counts as found if any of its texts is among
    the k texts nearest to it; a text counts as found if any image that carries it is among the k
    images nearest to it. So images that share one caption list are all right for each caption in
    it, and texts that appear once in `text_embeds` (see `caption_pairs`) are never in competition
    with their own copies. Flickr30k and COCO as usually scored are the special case of five texts
    for each image and one image for each text.

    Images and texts without any pair are candidates (distractors) but are not asked about.
    Standard errors cluster images with the same texts, and texts by the first image that carries
    them. Neighbours come from FAISS's blockwise exact search: there is no n x m matrix, and beside
    the embeddings, which may be memory-mapped, memory is some ten numbers per pair.
    """
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    of_image = _text_sets(pairs, len(image_embeds))
    _, first = np.unique(pairs[:, 1], return_index=True)  # the lowest image of each text
    of_text = np.full(len(text_embeds), -1)
    of_text[pairs[first, 1]] = of_image[pairs[first, 0]]
    return Recall(
        _recall_one_way(image_embeds, text_embeds, pairs, of_image, ks),
        _recall_one_way(text_embeds, image_embeds, pairs[:, ::-1], of_text, ks),
    )


def _text_sets(pairs: Int[np.ndarray, "p 2"], num_images: int) -> Int[np.ndarray, " n"]:
    """The number of the set of texts that each image carries, -1 for none.

    Sets are hashed as the sum of one random 64-bit number per text.
    """
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**63, int(pairs[:, 1].max(initial=-1)) + 1, np.int64)
    sums = np.zeros(num_images, np.int64)
    np.add.at(sums, pairs[:, 0], numbers[pairs[:, 1]])
    clusters = np.full(num_images, -1)
    carrying = np.unique(pairs[:, 0])
    clusters[carrying] = np.unique(sums[carrying], return_inverse=True)[1]
    return clusters


def _recall_one_way(
    queries: Float[np.ndarray, "n d"],
    candidates: Float[np.ndarray, "m d"],
    pairs: Int[np.ndarray, "p 2"],
    clusters: Int[np.ndarray, " n"],
    ks: Sequence[int],
    block: int = 4096,
) -> dict[int, Estimate]:
    """pairs: (query, candidate); clusters: of every query, -1 for those that have no pair."""
    asked = np.flatnonzero(clusters >= 0)
    depth = min(max(ks), len(candidates))
    right_keys = np.sort(pairs[:, 0] * len(candidates) + pairs[:, 1])
    totals = np.zeros(int(clusters.max(initial=-1)) + 1)
    hits = {k: np.zeros_like(totals) for k in ks}
    for start in range(0, len(asked), block):
        rows = asked[start : start + block]
        _, nearest = faiss.knn(
            np.ascontiguousarray(queries[rows], np.float32),
            np.ascontiguousarray(candidates, np.float32),
            depth,
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        keys = rows[:, None] * len(candidates) + nearest
        places = np.minimum(np.searchsorted(right_keys, keys), len(right_keys) - 1)
        right = (right_keys[places] == keys) & (nearest >= 0)  # FAISS says -1 where it found none
        np.add.at(totals, clusters[rows], 1.0)
        for k in ks:
            np.add.at(hits[k], clusters[rows], right[:, :k].any(axis=1).astype(np.float64))
    return {k: share_of_counts(hits[k], totals) for k in ks}
