"""From a request's query to a unit-norm vector; concurrent requests share forwards."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from contrastive.model.lit import LitModel
from contrastive.model.shaped import ShapedPixels
from retrieval.detail import Detail
from retrieval.server.config import Limits
from retrieval.server.monitoring import Metrics
from retrieval.server.patch_sizes import PatchSizes
from retrieval.server.queues.batching import Batcher
from retrieval.server.refusals import RequestError
from retrieval.server.requests import Term, check_text
from retrieval.server.served_index import ServedIndex
from retrieval.server.uploads import Uploads

MAX_FORWARD = 64  # texts or images of one forward


@dataclass(frozen=True)
class EncodeKey:
    """Texts or images of equal keys can share a forward."""

    what: Literal["text", "image"]
    model: int
    patch_size: int = 0  # of images; those within budgets share forwards


@dataclass(frozen=True)
class Encoded:
    """A unit-norm vector, the milliseconds of the forward that it came from, and whether the end of
    a text was not read."""

    vector: Float[np.ndarray, " d"]
    ms: float
    cut: bool = False


@dataclass(frozen=True)
class EncodedQuery:
    """A query as the index sees it, as the refinement sees it, and what its forwards took."""

    vector: Float[np.ndarray, " d"]
    fine: Float[np.ndarray, " d"]
    text_ms: float = 0.0
    image_ms: float = 0.0
    text_cut: bool = False


class Encoder:
    """The models of a server behind one queue of forwards."""

    def __init__(
        self,
        models: Sequence[LitModel],
        uploads: Uploads,
        limits: Limits,
        metrics: Metrics,
        batcher: Callable[..., Batcher],
    ) -> None:
        """batcher: makes a `Batcher` of this server."""
        self._models, self._uploads = list(models), uploads
        self._limits, self._metrics = limits, metrics
        observe = metrics.batch_size.labels("encode").observe
        self._queue = batcher(self._forward, max_batch=MAX_FORWARD, observe=observe)

    def close(self) -> None:
        self._queue.close()

    # ---- queries ---------------------------------------------------------------------------

    async def query(
        self, index: ServedIndex, terms: Sequence[Term], patch_sizes: PatchSizes
    ) -> EncodedQuery:
        """The weighted sum of unit-norm vectors, unit norm again. Raises `RequestError`."""
        if len(terms) == 1 and terms[0].weight > 0:
            return await self._term(index, terms[0], patch_sizes)
        parts = await asyncio.gather(*(self._term(index, term, patch_sizes) for term in terms))
        weights = [term.weight for term in terms]
        width = len(parts[0].vector)
        if any(len(part.vector) != width for part in parts):
            raise RequestError(400, "mix: vectors of different widths")
        rounding = 1e-4 * sum(map(abs, weights))  # one text in two forwards differs by less

        def mixed(vectors: list[np.ndarray]) -> Float[np.ndarray, " d"]:
            pairs = zip(weights, vectors, strict=True)
            return unit(
                np.asarray(sum(w * v.astype(np.float64) for w, v in pairs)), "mix", rounding
            )

        return EncodedQuery(
            mixed([part.vector for part in parts]),
            mixed([part.fine for part in parts]),
            sum(part.text_ms for part in parts),
            sum(part.image_ms for part in parts),
            any(part.text_cut for part in parts),
        )

    async def _term(self, index: ServedIndex, term: Term, patch_sizes: PatchSizes) -> EncodedQuery:
        model = index.searcher.model
        if term.text is not None:
            check_text(term.text, self._limits, "text")
            (one,) = await self.texts(model, [term.text])
            return EncodedQuery(one.vector, one.vector, text_ms=one.ms, text_cut=one.cut)
        if term.vector is not None:
            width = index.searcher.snapshot.width
            if len(term.vector) != width:
                sentence = f"vector: has {len(term.vector)} numbers; allowed: {width}"
                raise RequestError(400, sentence)
            vector = unit(np.array(term.vector, np.float64), "vector")
            return EncodedQuery(vector, vector)
        if term.id is not None:
            vector = await index.vector(term.id, patch_sizes.index)
            return EncodedQuery(vector, vector)
        query, refine = patch_sizes.query, patch_sizes.refine
        needed = [query] if refine in (None, query) else [query, refine]
        pixels = await self._uploads.pixels(model, term.image, term.image_url, needed, term.box)
        one = await self.image(model, pixels, query)
        if refine is None or refine == query:
            return EncodedQuery(one.vector, one.vector, image_ms=one.ms)
        fine = await self.image(model, pixels, refine)
        return EncodedQuery(one.vector, fine.vector, image_ms=one.ms + fine.ms)

    # ---- texts and images ------------------------------------------------------------------

    async def texts(self, model: LitModel, texts: Sequence[str]) -> list[Encoded]:
        """One vector per text."""
        return await self._queue.submit(EncodeKey("text", self._number(model)), texts)

    async def image(
        self, model: LitModel, pixels: Mapping[Detail, ShapedPixels], detail: Detail
    ) -> Encoded:
        """The vector of an image at one of the patch sizes or budgets that it was read for."""
        patch_size = detail if isinstance(detail, int) else 0
        key = EncodeKey("image", self._number(model), patch_size)
        return (await self._queue.submit(key, [pixels[detail]]))[0]

    async def patches(self, read: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
        """What `read` makes of an image's patches in its turn among the forwards, and milliseconds.

        Each is a run of its own: none is begun for a request that has ended meanwhile.
        """
        return (await self._queue.submit(read, [read]))[0]

    def _number(self, model: LitModel) -> int:
        return next(n for n, other in enumerate(self._models) if other is model)

    def _forward(
        self, key: EncodeKey | Callable[[], np.ndarray], items: list[Any]
    ) -> Sequence[Any]:
        if not isinstance(key, EncodeKey):
            with self._metrics.timed("image_clip_inference_time") as clock:
                found = key()
            return [(found, clock.ms)]
        model = self._models[key.model]
        with self._metrics.timed(f"{key.what}_clip_inference_time") as clock:
            cut = [False] * len(items)
            if key.what == "text":
                rows, cut = model.encode_text(items), model.cut_texts(items)
            else:
                rows = model.embed_shaped(items)
            vectors = rows.float().cpu().numpy()
        return [Encoded(v, clock.ms, c) for v, c in zip(vectors, cut, strict=True)]


def unit(
    vector: Float[np.ndarray, " d"], field: str, rounding: float = 0.0
) -> Float[np.ndarray, " d"]:
    """The direction of a float64 vector, float32. Raises `RequestError` where it has none.

    rounding: numbers up to this count as zero.
    """
    largest = float(np.abs(vector).max())
    if not largest > rounding:
        raise RequestError(400, f"{field}: is zero, which points nowhere")
    scaled = vector / largest  # squares of large numbers would be infinite
    return (scaled / np.linalg.norm(scaled)).astype(np.float32)
