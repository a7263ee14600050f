"""clip-retrieval's HTTP endpoints, so that its client and its page work unchanged.

Bodies are JSON whatever content type they claim. Aesthetic scores, safety models and M-CLIP are
that project's own models: the fields are accepted and change nothing.
"""

import base64
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from retrieval.search.searcher import Hit
from retrieval.server.json_responses import columns_of, json_response
from retrieval.server.limits import RequestError
from retrieval.server.patch_sizes import Patches
from retrieval.server.queries import encode
from retrieval.server.requests import KnnRequest, MetadataRequest, Term, read
from retrieval.server.schemas import KNN, METADATA
from retrieval.server.service import SearchKey, Service

SIDE = 224  # pixels of an image in an answer
MAX_IMAGES = 200  # of one answer


def routes(service: Service) -> APIRouter:
    """/knn-service, /metadata, /indices-list and /metrics of a service."""
    router = APIRouter()

    @router.post("/knn-service", **KNN)
    async def knn_service(request: Request) -> Response:
        asked = await read(request, KnnRequest)
        with service.metrics.timed("full_knn_request_time"):
            return json_response(await _search(service, asked))

    @router.post("/metadata", **METADATA)
    async def metadata(request: Request) -> Response:
        asked = await read(request, MetadataRequest)
        name, _ = service.searcher(asked.indice_name or None, "indice_name")
        if len(asked.ids) > service.limits.max_k:
            raise RequestError(400, f"ids: at most {service.limits.max_k}")
        rows = await service.rows_of(name, asked.ids)
        entries = await _entries(service, [Hit.of(0.0, row) for _, row in rows])
        found = [{"id": id, "metadata": e} for (id, _), e in zip(rows, entries, strict=True)]
        return json_response(found)

    @router.get("/indices-list", summary="Names of the indexes")
    async def indices_list() -> Response:
        return json_response(list(service.searchers))

    @router.get("/metrics", summary="Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def term_of(asked: KnnRequest) -> Term:
    """What a request looks for. Raises `RequestError` when it is nothing."""
    if asked.text:
        return Term(text=asked.text)
    if asked.image:
        return Term(image=asked.image)
    if asked.image_url:
        return Term(image_url=asked.image_url)
    if asked.embedding_input:
        return Term(vector=asked.embedding_input)
    raise RequestError(400, "one of text, image, image_url and embedding_input is needed")


async def _search(service: Service, asked: KnnRequest) -> list[dict[str, Any]]:
    # "" comes from clip-retrieval's page before it knows the names of the indexes
    name, searcher = service.searcher(asked.indice_name or None, "indice_name")
    if asked.modality != "image":
        raise RequestError(400, f"modality: {asked.modality[:20]!r}; allowed: image")
    size = min(searcher.patch_sizes)
    term = term_of(asked)
    # clip-retrieval's page asks for thousands of ids; it gets as many as a search may give
    wanted = asked.num_result_ids or max(1, asked.num_images)
    k = min(wanted, service.limits.max_k)
    encoding = await encode(service, name, [term], Patches(size, size))
    key = SearchKey(name, size, k, deduplicate=asked.deduplicate)
    hits = await service.search(key, encoding.vector)
    entries = await _entries(service, hits[: asked.num_images])
    entries += [{} for _ in hits[len(entries) :]]
    return [
        {**entry, "id": hit.id, "similarity": hit.similarity}
        for hit, entry in zip(hits, entries, strict=True)
    ]


async def _entries(service: Service, hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """What is known of each, and a small JPEG of the first `MAX_IMAGES`.

    A column that holds nothing is left out: the page would take a null `url` for an address.
    """
    locations = [hit.location for hit in hits[:MAX_IMAGES]]
    jpegs = await service.small_jpegs(locations, SIDE)
    entries = [
        {name: value for name, value in columns_of(hit).items() if value is not None}
        for hit in hits
    ]
    for entry, jpeg in zip(entries, jpegs, strict=False):
        if jpeg is not None:
            entry["image"] = base64.b64encode(jpeg).decode()
    return entries
