"""What a similarity means in an index: what good hits of words reach there, and what luck does.

A cosine says little by itself: towers differ in the range that they use, and every query has a
background, its mean similarity to images at random (`SearchAnswer.background`). How far a best hit
lies above it is compared with the best hits of words that albums answer, and of texts that no image
answers: theirs are the luckiest of all images.
"""

import asyncio
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from retrieval.detail import Detail, answered
from retrieval.search.background import NONSENSE, WORDS
from retrieval.server.api.answers import ScaleAnswer
from retrieval.server.queues.searching import SearchKey
from retrieval.server.served_index import ServedIndex
from retrieval.server.service import Service

# No album answers all of the words: the best tenth are those that it answers well.
QUANTILE = 0.9


async def similarity_scale(service: Service, index: ServedIndex, patch_size: Detail) -> ScaleAnswer:
    """Of the index's present state, by a search per text. Raises `RequestError`."""
    words = luck = None
    if len(index.searcher):
        words = float(
            np.quantile(await _above_background(service, index, patch_size, WORDS), QUANTILE)
        )
        luck = float(np.median(await _above_background(service, index, patch_size, NONSENSE)))
    return ScaleAnswer(index=index.name, words=words, luck=luck, **answered("", patch_size))


async def _above_background(
    service: Service, index: ServedIndex, patch_size: Detail, texts: Sequence[str]
) -> Float[np.ndarray, " t"]:
    """How far the best hit of each text lies above the text's background."""
    vectors = await service.labels.vectors(index.searcher.model, texts, ["{c}"])
    key = SearchKey(index.name, patch_size, 1)
    found = await asyncio.gather(*(service.search_queue.search(key, row) for row in vectors))
    best = np.array([hits[0].similarity if hits else 0.0 for hits, _ in found])
    return best - vectors @ await index.mean_vector(patch_size)
