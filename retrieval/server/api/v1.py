"""The service's own endpoints: search, classify, what indexes there are, and their images."""

import hashlib
import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from retrieval.search.searcher import Hit
from retrieval.server.api.answers import (
    ClassifyAnswer,
    ClassSetAnswer,
    FoundImage,
    IndexAnswer,
    IndexingAnswer,
    IndicesAnswer,
    SampleAnswer,
    SearchAnswer,
    SearchTimes,
)
from retrieval.server.api.classification import answer_classify
from retrieval.server.api.described_sizes import describe_sizes, own_patch_size
from retrieval.server.api.route import ModelRoute, form_of
from retrieval.server.config import Limits
from retrieval.server.patch_sizes import PatchSizes, choose_patch_sizes
from retrieval.server.queues.searching import SearchKey
from retrieval.server.refusals import RequestError
from retrieval.server.requests import MAX_ID, ClassifyRequest, SearchRequest
from retrieval.server.served_index import ServedIndex
from retrieval.server.service import Service
from retrieval.server.thumbnails import MAX_SIDE

MAX_WHERE = 20_000  # characters of a filter as JSON
MAX_TESTS = 64  # comparisons of a filter
MAX_SAMPLE = 100
MIN_SIDE = 16


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

    @router.get("/indices", summary="Indexes, what their patch sizes cost, class sets, limits")
    async def indices() -> IndicesAnswer:
        return IndicesAnswer(
            indices=[_describe(index) for index in service.indexes.values() if not index.damage],
            class_sets=[
                ClassSetAnswer(name=name, count=len(classes.class_names))
                for name, classes in service.class_sets.items()
            ],
            limits=service.limits,
        )

    @router.get("/indices/{index}/sample", summary="Images at random")
    async def sample(index: str, n: int = 24) -> SampleAnswer:
        found = service.index(index)
        if not 1 <= n <= MAX_SAMPLE:
            raise RequestError(400, f"n: {n}; allowed: 1 to {MAX_SAMPLE}")
        ids = found.searcher.snapshot.ids()
        chosen = random.sample(range(len(ids)), min(n, len(ids)))
        rows = await found.rows([int(ids[row]) for row in chosen])
        hits = [FoundImage.of(found.name, Hit.of(0.0, row)) for _, row in rows]
        return SampleAnswer(index=found.name, hits=hits)

    @router.get(
        "/images/{index}/{id}",
        summary="A thumbnail, JPEG",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}},
    )
    async def image(request: Request, index: str, id: int, size: int = 224) -> Response:
        found = service.index(index)
        if not 0 <= id <= MAX_ID:
            raise RequestError(400, f"id: {id}; allowed: 0 to {MAX_ID}")
        if not MIN_SIDE <= size <= MAX_SIDE:
            raise RequestError(400, f"size: {size}; allowed: {MIN_SIDE} to {MAX_SIDE} pixels")
        rows = await found.rows([id])
        if not rows:
            raise RequestError(404, f"id: {id} is not in index {found.name}")
        location = Hit.of(0.0, rows[0][1]).location
        mark = hashlib.blake2b(f"{location}{size}".encode(), digest_size=12).hexdigest()
        headers = {"ETag": f'"{mark}"', "Cache-Control": "private, max-age=300"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        (jpeg,) = await found.small_jpegs([location], size)
        if jpeg is None:
            changed = await found.has_changed(location)
            why = "has changed since it was indexed" if changed else "cannot be read any more"
            raise RequestError(404, f"id: the file of image {id} {why}")
        return Response(jpeg, headers=headers, media_type="image/jpeg")

    return router


def _describe(index: ServedIndex) -> IndexAnswer:
    searcher, snapshot = index.searcher, index.searcher.snapshot
    columns = {} if snapshot.columns is None else {f.name: str(f.type) for f in snapshot.columns}
    return IndexAnswer(
        name=index.name,
        count=len(snapshot),
        kind=snapshot.manifest.index_type,
        width=snapshot.width,
        generation=snapshot.generation,
        image_size=searcher.model.image_size,
        own_patch_size=own_patch_size(searcher),
        patch_sizes=describe_sizes(searcher),
        columns=columns,
        indexing=IndexingAnswer(**asdict(index.indexing)) if index.indexing else None,
    )


# ---- search --------------------------------------------------------------------------------


async def answer_search(service: Service, asked: SearchRequest) -> SearchAnswer:
    """Choose patch sizes, encode the query, search, answer. Raises `RequestError`."""
    start = time.perf_counter()
    index = service.index(asked.index)
    key, patch_sizes = _plan(index, asked, service.limits)
    query = await service.encoder.query(index, asked.terms(), patch_sizes)
    encoded = time.perf_counter()
    with service.metrics.timed("full_knn_request_time"):
        hits = await service.search_queue.search(key, query.vector, query.fine)
    wanted = asked.offset + asked.k
    return SearchAnswer(
        index=index.name,
        patch_size=patch_sizes.index,
        query_patch_size=patch_sizes.query if query.image_ms > 0 else None,
        refine_patch_size=patch_sizes.refine,
        hits=[FoundImage.of(index.name, hit) for hit in hits[asked.offset : wanted]],
        next_offset=wanted if len(hits) > wanted else None,
        text_cut=query.text_cut,
        warning=index.searcher.warning(patch_sizes.index, patch_sizes.refine),
        ms=SearchTimes(
            text=round(query.text_ms, 3),
            image=round(query.image_ms, 3),
            search=round(1e3 * (time.perf_counter() - encoded), 3),
            total=round(1e3 * (time.perf_counter() - start), 3),
        ),
    )


def _plan(index: ServedIndex, asked: SearchRequest, limits: Limits) -> tuple[SearchKey, PatchSizes]:
    """Which patch sizes a search means, and how deep it goes. Raises `RequestError`."""
    wanted = asked.offset + asked.k
    if wanted > limits.max_k:
        raise RequestError(400, f"k: k and offset together may be at most {limits.max_k}")
    patch_sizes = choose_patch_sizes(index.searcher, index.name, asked)
    depth = min(limits.max_k, wanted + 1)  # one more shows whether there is a next page
    candidates = 0
    if patch_sizes.refine is not None:
        candidates = asked.candidates
        if candidates > limits.max_candidates:
            raise RequestError(400, f"candidates: at most {limits.max_candidates}")
        if candidates < wanted:
            raise RequestError(400, f"candidates: at least k and offset together ({wanted})")
        depth = min(depth, candidates)
    key = SearchKey(
        index.name, patch_sizes.index, depth, where_of(asked.where), asked.deduplicate,
        asked.nprobe, asked.ef, patch_sizes.refine, candidates,
    )  # fmt: skip
    return key, patch_sizes


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
