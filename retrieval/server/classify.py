"""Zero-shot classification of one picture: labels of the request, or a class set of the server."""

import asyncio
import time
from typing import Any

import numpy as np
from jaxtyping import Float

from data.class_names import DEFAULT_TEMPLATES
from retrieval.evaluation.classify import close_calls
from retrieval.search.refine import blend
from retrieval.server.limits import RequestError
from retrieval.server.patch_sizes import afford, budget_of, check_size
from retrieval.server.queries import check_text, read_image
from retrieval.server.requests import MAX_LABELS, ClassifyRequest
from retrieval.server.service import Encoded, Service


async def classify(service: Service, asked: ClassifyRequest) -> dict[str, Any]:
    """What /v1/classify answers. Raises `RequestError`."""
    start = time.perf_counter()
    name, searcher = service.searcher(asked.index)
    model = searcher.model
    coarse = asked.patch_size or min(model.patch_sizes)
    if (budget := budget_of(asked)) is not None:
        coarse = afford(searcher, budget, model.patch_sizes)
    check_size("patch_size", coarse, model.patch_sizes, "the model")
    if asked.refine_patch_size is not None:
        check_size("refine_patch_size", asked.refine_patch_size, model.patch_sizes, "the model")
    classes = await _Classes.of(service, name, asked)
    pixels = await read_image(service, name, asked.image, asked.image_url)
    encoded = await service.encode_image(model, pixels, coarse)
    rows, similarities = await classes.rank(service, encoded)
    refine = asked.refine_patch_size
    refined = refine is not None and bool(close_calls(similarities[None], asked.margin)[0])
    ms = encoded.ms
    if refine is not None and refined:
        fine = await service.encode_image(model, pixels, refine)
        ms += fine.ms
        both = Encoded(blend(fine.vector, encoded.vector), ms)
        rows, similarities = await classes.rank(service, both)
    shares: list[float | None] = [None] * len(rows)
    if len(classes.names) <= MAX_LABELS:  # then all of them are ranked
        logits = model.text.scale().item() * similarities
        powers = np.exp(logits - logits.max())
        shares = (powers / powers.sum()).tolist()
    ranked = zip(rows.tolist(), similarities.tolist(), shares, strict=True)
    labels = [{"label": classes.names[r], "similarity": s, "share": p} for r, s, p in ranked]
    return {
        "patch_size": refine if refined else coarse,
        "refined": refined,
        "labels": labels[: asked.k],
        "ms": {"image": round(ms, 3), "total": round(1e3 * (time.perf_counter() - start), 3)},
    }


class _Classes:
    """Class names and where they lie."""

    def __init__(
        self, names: list[str], embeds: Float[np.ndarray, "c d"] | None, named: Any
    ) -> None:
        self.names, self._embeds, self._named = names, embeds, named

    @classmethod
    async def of(cls, service: Service, name: str, asked: ClassifyRequest) -> "_Classes":
        """Those that a request means. Raises `RequestError`."""
        model = service.searchers[name].model
        if asked.class_set is not None:
            found = service.class_sets.get(asked.class_set)
            if found is None:
                allowed = ", ".join(service.class_sets) or "none; send labels"
                raise RequestError(
                    404, f"class_set: no {asked.class_set[:80]!r}; allowed: {allowed}"
                )
            if found.model is not model:
                raise RequestError(
                    400, f"class_set: was made for another model than index {name}'s"
                )
            return cls(found.class_names, None, found)
        labels = list(asked.labels or ())
        templates = asked.templates or list(DEFAULT_TEMPLATES)
        if len(labels) > service.limits.max_labels:
            sentence = f"labels: {len(labels)} are given; at most {service.limits.max_labels}"
            raise RequestError(400, sentence)
        if not all(label.strip() for label in labels):
            raise RequestError(400, "labels: one is empty; each needs a letter or more")
        for label in labels:
            check_text(service, label, "labels")
        for template in templates:
            check_text(service, template, "templates")
        return cls(labels, await service.embed_labels(model, labels, templates), None)

    async def rank(
        self, service: Service, encoded: Encoded
    ) -> tuple[np.ndarray, Float[np.ndarray, " c"]]:
        """Rows and similarities, best first: all classes, or the best of a large set."""
        if self._embeds is not None:
            similarities = self._embeds @ encoded.vector
            order = np.argsort(-similarities, kind="stable")
            return order, similarities[order]
        loop = asyncio.get_running_loop()
        rows, similarities = await loop.run_in_executor(
            service.pool, self._named.classify_embeddings, encoded.vector[None], MAX_LABELS
        )
        return rows[0], similarities[0]
