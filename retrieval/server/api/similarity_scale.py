"""What a similarity means in an index: how similar the best hits of ordinary words are.

A cosine says little by itself: towers differ in the range that they use, and every query has a
background, its mean similarity to images at random (`SearchAnswer.background`). What the best hits
of words that most albums answer reach above their background is what a good hit is; nonsense, whose
best hit is the luckiest of many, stays well below.
"""

import asyncio

import numpy as np

from retrieval.server.patch_sizes import check_size
from retrieval.server.queues.searching import SearchKey
from retrieval.server.served_index import ServedIndex
from retrieval.server.service import Service

WORDS = (
    "animal", "baby", "beach", "bicycle", "bird", "boat", "building", "cake", "car", "cat",
    "child", "dog", "face", "flower", "food", "forest", "fruit", "garden", "house", "lake",
    "mountain", "night", "people", "portrait", "river", "road", "sea", "sky", "snow", "street",
    "sun", "toy", "train", "tree", "a drawing", "text on paper",
)  # fmt: skip
# No album answers all of the words: the best tenth are those that it answers well.
QUANTILE = 0.9


async def words_scale(
    service: Service, index: ServedIndex, patch_size: int | None
) -> tuple[int, float | None]:
    """The patch size that is meant, and how far above their background the best hits of ordinary
    words lie there; None for an empty index. Raises `RequestError`."""
    sizes = index.searcher.patch_sizes
    size = patch_size or min(sizes)
    check_size("patch_size", size, sizes, f"index {index.name}")
    if not len(index.searcher):
        return size, None
    vectors = await service.labels.vectors(index.searcher.model, WORDS, ["{c}"])
    backgrounds = vectors @ await index.mean_vector(size)
    key = SearchKey(index.name, size, 1)
    found = await asyncio.gather(*(service.search_queue.search(key, row) for row in vectors))
    best = np.array([hits[0].similarity if hits else 0.0 for hits in found])
    above = float(np.quantile(best - backgrounds, QUANTILE))
    return size, max(above, 1e-6)
