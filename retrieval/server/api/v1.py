"""The service's own endpoints for queries: search, classify, segment, detect, map."""

import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from data.errors import UsageError
from retrieval.detail import Detail, answered
from retrieval.server.api.answers import (
    ClassifyAnswer,
    DetectAnswer,
    FoundImage,
    MapAnswer,
    SearchAnswer,
    SearchTimes,
    SegmentAnswer,
)
from retrieval.server.api.classification import answer_classify
from retrieval.server.api.place_requests import DetectRequest, MapRequest, SegmentRequest
from retrieval.server.api.route import ModelRoute, form_of
from retrieval.server.api.segmentation import answer_detect, answer_map, answer_segment
from retrieval.server.api.stored_images import image_of
from retrieval.server.config import Limits
from retrieval.server.patch_sizes import PatchSizes, choose_patch_sizes
from retrieval.server.queues.searching import SearchKey
from retrieval.server.refusals import RequestError
from retrieval.server.requests import (
    ClassifyRequest,
    SearchRequest,
    Term,
    check_text,
)
from retrieval.server.served_index import ServedIndex
from retrieval.server.service import Service

MAX_WHERE = 20_000  # characters of a filter as JSON
MAX_TESTS = 64  # comparisons of a filter


def routes(service: Service) -> APIRouter:
    """/v1 of a service."""
    router = APIRouter(prefix="/v1", route_class=ModelRoute)

    @router.post(
        "/search",
        summary="Images for a text, an image, a vector, or a mix",
        openapi_extra=form_of(SearchRequest),
    )
    async def search(asked: SearchRequest) -> SearchAnswer:
        return await answer_search(service, asked)

    @router.post("/classify", summary="Labels for an image", openapi_extra=form_of(ClassifyRequest))
    async def classify(asked: ClassifyRequest) -> ClassifyAnswer:
        return await answer_classify(service, asked)

    @router.post(
        "/segment", summary="Where in an image labels are", openapi_extra=form_of(SegmentRequest)
    )
    async def segment(asked: SegmentRequest) -> SegmentAnswer:
        return await answer_segment(service, asked)

    @router.post(
        "/detect", summary="Boxes around labels in an image", openapi_extra=form_of(DetectRequest)
    )
    async def detect(asked: DetectRequest) -> DetectAnswer:
        return await answer_detect(service, asked)

    @router.post(
        "/map",
        summary="How alike a text and each part of an image are",
        openapi_extra=form_of(MapRequest),
    )
    async def map(asked: MapRequest) -> MapAnswer:
        return await answer_map(service, asked)

    return router


# ---- search --------------------------------------------------------------------------------


async def answer_search(service: Service, asked: SearchRequest) -> SearchAnswer:
    """Choose patch sizes, encode the query, search, answer. Raises `RequestError`."""
    start = time.perf_counter()
    index = service.index(asked.index)
    key, patch_sizes = _plan(index, asked, service.limits)
    for term in asked.terms():
        check_text(term.text or "", service.limits, "text")
    terms = [await _with_file(index, term) for term in asked.read_terms()]
    query = await service.encoder.query(index, terms, patch_sizes)
    background = None
    if asked.background:
        background = float(await index.mean_vector(patch_sizes.index) @ query.vector)
    encoded = time.perf_counter()
    with service.metrics.timed("full_knn_request_time"):
        texts = asked.word_query() if asked.words else ()
        found = await service.search_queue.search(key, query.vector, query.fine, texts)
    hits = found.hits
    confidence = None
    judged = asked.text is not None and not asked.words and not asked.regions
    if judged and service.refuse:
        confidence = await index.confidence(query.vector, hits, patch_sizes.index)
    wanted = asked.offset + asked.k
    return SearchAnswer(
        index=index.name,
        **answered("", patch_sizes.index),
        **answered("query_", patch_sizes.query if query.image_ms > 0 else None),
        **answered("refine_", patch_sizes.refine),
        hits=[FoundImage.of(index.name, hit) for hit in hits[asked.offset : wanted]],
        background=background,
        found=None if confidence is None else confidence > service.refuse,
        confidence=confidence,
        next_offset=wanted if len(hits) > wanted else None,
        near_duplicates=found.num_left_out(wanted),
        text_cut=query.text_cut,
        warning=index.searcher.warning(patch_sizes.index, patch_sizes.refine, asked.regions),
        ms=SearchTimes(
            text=round(query.text_ms, 3),
            image=round(query.image_ms, 3),
            search=round(1e3 * (time.perf_counter() - encoded), 3),
            total=round(1e3 * (time.perf_counter() - start), 3),
        ),
    )


async def _with_file(index: ServedIndex, term: Term) -> Term:
    """A part of a stored image as a part of its file."""
    if term.id is None or term.box is None:
        return term
    return term.model_copy(update={"id": None, "image": await image_of(index, term)})


def _plan(index: ServedIndex, asked: SearchRequest, limits: Limits) -> tuple[SearchKey, PatchSizes]:
    """Which patch sizes a search means, and how deep it goes. Raises `RequestError`."""
    wanted = asked.offset + asked.k
    if wanted > limits.max_k:
        raise RequestError(400, f"k: k and offset together may be at most {limits.max_k}")
    patch_sizes = choose_patch_sizes(index.searcher, index.name, asked)
    depth = min(limits.max_k, wanted + 1)  # one more shows whether there is a next page
    candidates = 0
    if patch_sizes.refine is not None:
        candidates = _candidates(index, asked, patch_sizes.index, patch_sizes.refine)
        if candidates > limits.max_candidates:
            raise RequestError(400, f"candidates: at most {limits.max_candidates}")
        if candidates < wanted:
            raise RequestError(400, f"candidates: at least k and offset together ({wanted})")
        depth = min(depth, candidates)
    key = SearchKey(
        index.name, patch_sizes.index, depth, where_of(asked.where), asked.deduplicate,
        asked.nprobe, asked.ef, patch_sizes.refine, candidates, asked.words, asked.regions,
    )  # fmt: skip
    return key, patch_sizes


def _candidates(index: ServedIndex, asked: SearchRequest, coarse: Detail, fine: Detail) -> int:
    """How many are refined. Raises `RequestError` where that many do not keep a promise."""
    if asked.lost is None:
        return asked.candidates
    calibration = index.searcher.calibration
    if calibration is None:
        raise RequestError(400, f"lost: index {index.name} is not calibrated")
    if asked.text is None or asked.where or asked.words:
        raise RequestError(
            400, "lost: is promised of texts without a filter and without words; give candidates"
        )
    try:
        return calibration.candidates(coarse, fine, asked.offset + asked.k, asked.lost)
    except UsageError as error:
        raise RequestError(400, str(error)) from error


def where_of(where: Mapping[str, Any] | None) -> str:
    """A filter as JSON, equal for equal filters. Raises `RequestError` for a large one."""
    if not where:
        return ""
    try:
        text = json.dumps(where, sort_keys=True)
    except (ValueError, RecursionError):
        raise RequestError(400, "where: has too many filters within filters") from None
    if len(text) > MAX_WHERE or _num_tests(where) > MAX_TESTS:
        sentence = f"where: at most {MAX_TESTS} comparisons in {MAX_WHERE} characters of JSON"
        raise RequestError(400, sentence)
    return text


def _num_tests(where: Any) -> int:
    if not isinstance(where, Mapping):
        return 0
    count = 0
    for name, value in where.items():
        if name in ("any", "all") and isinstance(value, list):
            count += 1 + sum(map(_num_tests, value))
        elif name == "not":
            count += 1 + _num_tests(value)
        else:
            count += len(value) if isinstance(value, Mapping) else 1
    return count
