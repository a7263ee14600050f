"""Labels for an image, ranked: those of a request, or a class set of the server."""

import asyncio
import time
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from data.class_names import DEFAULT_TEMPLATES
from retrieval.detail import Detail, answered
from retrieval.evaluation.classify import ZeroShotClassifier, close_calls
from retrieval.search.refine import blend
from retrieval.server.api.answers import ClassifyAnswer, ClassifyTimes, Label
from retrieval.server.api.stored_images import image_of
from retrieval.server.patch_sizes import afford, budget_of, check_encodable
from retrieval.server.refusals import RequestError
from retrieval.server.requests import MAX_LABELS, ClassifyRequest, check_text
from retrieval.server.served_index import ServedIndex
from retrieval.server.service import Service


async def answer_classify(service: Service, asked: ClassifyRequest) -> ClassifyAnswer:
    """Encode the image, rank the classes, re-encode it where the result is close. Raises
    `RequestError`."""
    start = time.perf_counter()
    index = service.index(asked.index)
    searcher, model = index.searcher, index.searcher.model
    coarse: Detail = asked.patch_size or min(model.patch_sizes)
    if (budget := budget_of(asked)) is not None:
        coarse = afford(searcher, budget)
    check_encodable("", coarse, searcher)
    if (refine := asked.refinement()) is not None:
        check_encodable("refine_", refine, searcher)
    classes = await _classes_of(service, index, asked)
    needed = [coarse] if refine in (None, coarse) else [coarse, refine]
    image = await image_of(index, asked)
    pixels = await service.uploads.pixels(model, image, asked.image_url, needed)
    encoded = await service.encoder.image(model, pixels, coarse)
    rows, similarities = await classes.rank(service, encoded.vector)
    refined = refine is not None and bool(close_calls(similarities[None], asked.margin)[0])
    ms = encoded.ms
    if refine is not None and refined:
        fine = await service.encoder.image(model, pixels, refine)
        ms += fine.ms
        rows, similarities = await classes.rank(service, blend(fine.vector, encoded.vector))
    size = refine if refine is not None and refined else coarse
    temperature = service.temperatures[index.name].get(size)
    confidence = None
    if service.refuse and len(rows):
        vector = fine.vector if refine is not None and refined else encoded.vector
        confidence = await _confidence(service, index, classes.names[rows[0]], vector, size)
    shares: list[float | None] = [None] * len(rows)
    if len(classes.names) <= MAX_LABELS:  # then all of them are ranked
        logits = model.text.scale().item() / (temperature or 1.0) * similarities
        powers = np.exp(logits - logits.max())
        shares = (powers / powers.sum()).tolist()
    best = list(zip(rows.tolist(), similarities.tolist(), shares, strict=True))[: asked.k]
    return ClassifyAnswer(
        **answered("", size),
        refined=refined,
        found=None if confidence is None else confidence > service.refuse,
        confidence=confidence,
        temperature=temperature,
        labels=[Label(label=classes.names[row], similarity=s, share=p) for row, s, p in best],
        ms=ClassifyTimes(image=round(ms, 3), total=round(1e3 * (time.perf_counter() - start), 3)),
    )


async def _confidence(
    service: Service,
    index: ServedIndex,
    label: str,
    image: Float[np.ndarray, " d"],
    patch_size: Detail,
) -> float | None:
    """The share of images that fit their own caption as badly as this one its best label."""
    calibration = index.searcher.calibration
    if calibration is None or patch_size not in calibration.labels:
        return None
    text = await service.labels.vectors(index.searcher.model, [label], ["{c}"])
    scores = calibration.scores(image[None], text)
    (found,) = calibration.confidence(scores, patch_size, labels=True).tolist()
    return None if np.isnan(found) else found


@dataclass(frozen=True)
class _Classes:
    """Class names, and their vectors or the classifier that has them."""

    names: list[str]
    embeds: Float[np.ndarray, "c d"] | None = None
    classifier: ZeroShotClassifier | None = None

    async def rank(
        self, service: Service, vector: Float[np.ndarray, " d"]
    ) -> tuple[Int[np.ndarray, " c"], Float[np.ndarray, " c"]]:
        """Rows and similarities, best first: all classes, or the best of a large set."""
        if self.embeds is not None:
            similarities = self.embeds @ vector
            order = np.argsort(-similarities, kind="stable")
            return order, similarities[order]
        assert self.classifier is not None
        loop = asyncio.get_running_loop()
        rows, similarities = await loop.run_in_executor(
            service.pool, self.classifier.classify_embeddings, vector[None], MAX_LABELS
        )
        return rows[0], similarities[0]


async def _classes_of(service: Service, index: ServedIndex, asked: ClassifyRequest) -> _Classes:
    """The classes that a request means. Raises `RequestError`."""
    model = index.searcher.model
    if asked.class_set is not None:
        found = service.class_sets.get(asked.class_set)
        if found is None:
            allowed = ", ".join(service.class_sets) or "none; send labels"
            raise RequestError(404, f"class_set: no {asked.class_set[:80]!r}; allowed: {allowed}")
        if found.model.text is not model.text:  # which models of other fits share
            raise RequestError(
                400, f"class_set: was made for another model than index {index.name}'s"
            )
        return _Classes(found.class_names, classifier=found)
    labels = list(asked.labels or ())
    return _Classes(labels, embeds=await embed_labels(service, model, labels, asked.templates))


async def embed_labels(
    service: Service, model: LitModel, labels: list[str], templates: list[str] | None
) -> Float[np.ndarray, "c d"]:
    """The vectors of a request's labels. Raises `RequestError`."""
    templates = templates or list(DEFAULT_TEMPLATES)
    if len(labels) > service.limits.max_labels:
        sentence = f"labels: {len(labels)} are given; at most {service.limits.max_labels}"
        raise RequestError(400, sentence)
    if not all(label.strip() for label in labels):
        raise RequestError(400, "labels: one is empty; each needs a letter or more")
    for label in labels:
        check_text(label, service.limits, "labels")
    for template in templates:
        check_text(template, service.limits, "templates")
    return await service.labels.vectors(model, labels, templates)
