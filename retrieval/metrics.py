"""Zero-shot accuracy and retrieval recall, exact, with standard errors that respect clusters.

Images of one class (drawings of one thing, frames of one clip) are not independent, so every
standard error here treats whole clusters as the unit of sampling (the linearised ratio estimator,
Cochran, Sampling Techniques, 1977, section 6.3).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Estimate:
    """A share in [0, 1] and its standard error (nan where one cluster alone gives none)."""

    value: float
    standard_error: float

    def percent(self) -> str:
        """`29.1 ±1.3`: both in per cent."""
        error = "" if math.isnan(self.standard_error) else f" ±{100 * self.standard_error:.1f}"
        return f"{100 * self.value:.1f}{error}"


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


class ClassCounts:
    """Right answers per class, for top-k accuracy. Adds up over batches and ranks exactly.

    `counts` is (num_classes, 1 + len(ks)) int64: images seen, then images right within each k.
    """

    def __init__(self, num_classes: int, ks: Sequence[int] = (1, 5)) -> None:
        self.ks = tuple(ks)
        self.counts = np.zeros((num_classes, 1 + len(self.ks)), np.int64)

    def add(self, labels: Int[np.ndarray, "n k"], targets: Int[np.ndarray, " n"]) -> None:
        """labels: predicted classes, best first, at least as many as the classes or max(ks)."""
        right = labels == targets[:, None]
        columns = [np.ones(len(targets), bool)] + [right[:, :k].any(axis=1) for k in self.ks]
        np.add.at(self.counts, targets, np.stack(columns, axis=1).astype(np.int64))

    def accuracy(self) -> dict[int, Estimate]:
        """Top-k accuracy per k; standard errors clustered by class."""
        counts = self.counts.astype(np.float64)
        return {k: share_of_counts(counts[:, i], counts[:, 0]) for i, k in enumerate(self.ks, 1)}


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
    them. Neighbours come from FAISS's blockwise exact search: memory is O((n + m) k), no n x m
    matrix; the embeddings may be memory-mapped.
    """
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    image_clusters = _image_clusters(pairs)
    _, first = np.unique(pairs[:, 1], return_index=True)  # the lowest image of each text
    text_clusters = {int(text): image_clusters[int(image)] for image, text in pairs[first]}
    return Recall(
        _recall_one_way(image_embeds, text_embeds, pairs, image_clusters, ks),
        _recall_one_way(text_embeds, image_embeds, pairs[:, ::-1], text_clusters, ks),
    )


def _image_clusters(pairs: Int[np.ndarray, "p 2"]) -> dict[int, int]:
    """image -> number of the set of texts it carries; `pairs` sorted by image, then text."""
    images, starts = np.unique(pairs[:, 0], return_index=True)
    numbers: dict[bytes, int] = {}
    texts = np.split(pairs[:, 1], starts[1:])
    return {
        int(image): numbers.setdefault(np.ascontiguousarray(own).tobytes(), len(numbers))
        for image, own in zip(images, texts, strict=False)  # split gives [empty] for no pairs
    }


def _recall_one_way(
    queries: Float[np.ndarray, "n d"],
    candidates: Float[np.ndarray, "m d"],
    pairs: Int[np.ndarray, "p 2"],
    clusters: dict[int, int],
    ks: Sequence[int],
    block: int = 65_536,
) -> dict[int, Estimate]:
    """pairs: (query, candidate); clusters: of every query that has a pair."""
    asked = np.array(sorted(clusters), np.int64)
    depth = min(max(ks), len(candidates))
    right_keys = np.sort(pairs[:, 0] * len(candidates) + pairs[:, 1])
    totals = np.zeros(max(clusters.values(), default=-1) + 1)
    hits = {k: np.zeros_like(totals) for k in ks}
    for start in range(0, len(asked), block):
        rows = asked[start : start + block]
        _, nearest = faiss.knn(
            np.ascontiguousarray(queries[rows], np.float32),
            np.ascontiguousarray(candidates, np.float32),
            depth,
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        right = np.isin(rows[:, None] * len(candidates) + nearest, right_keys)
        of_row = np.array([clusters[row] for row in rows.tolist()])
        np.add.at(totals, of_row, 1.0)
        for k in ks:
            np.add.at(hits[k], of_row, right[:, :k].any(axis=1).astype(np.float64))
    return {k: share_of_counts(hits[k], totals) for k in ks}
