"""clip-retrieval's HTTP endpoints, so that its client and its page work unchanged.

Bodies are JSON whatever content type they claim. Aesthetic scores, safety models and M-CLIP are
that project's own models: the fields are accepted and change nothing.
"""

import base64
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from retrieval.detail import finest
from retrieval.search.hit import Hit
from retrieval.server.api.answers import KnnEntry, MetadataEntry
from retrieval.server.api.route import ModelRoute
from retrieval.server.patch_sizes import PatchSizes
from retrieval.server.queues.searching import SearchKey
from retrieval.server.refusals import RequestError
from retrieval.server.requests import Id, Term
from retrieval.server.served_index import ServedIndex
from retrieval.server.service import Service

SIDE = 224  # pixels of an image in an answer
MAX_IMAGES = 200  # of one answer


class KnnRequest(BaseModel):
    """The first that is given of text, image, image_url and embedding_input counts. Other fields
    are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)
    text: str | None = None
    image: str | None = Field(default=None, description="A file in base64.")
    image_url: str | None = None
    embedding_input: list[float] | None = Field(default=None, max_length=65536)
    modality: str = "image"
    num_images: int = Field(default=100, ge=0, description="Hits with metadata.")
    num_result_ids: int | None = Field(default=None, ge=1, description="Hits in all.")
    indice_name: str | None = None
    deduplicate: bool = False


class MetadataRequest(BaseModel):
    """Images of an index. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)
    ids: list[Id]
    indice_name: str | None = None


def routes(service: Service) -> APIRouter:
    """/knn-service, /metadata, /indices-list and /metrics of a service."""
    router = APIRouter(route_class=ModelRoute)

    # A column that holds nothing is left out: clip-retrieval's page would load a null `url`.
    @router.post(
        "/knn-service", summary="clip-retrieval's search", response_model_exclude_none=True
    )
    async def knn_service(asked: KnnRequest) -> list[KnnEntry]:
        with service.metrics.timed("full_knn_request_time"):
            return await _search(service, asked)

    @router.post("/metadata", summary="clip-retrieval's metadata by id")
    async def metadata(asked: MetadataRequest) -> list[MetadataEntry]:
        index = service.index(asked.indice_name or None, "indice_name")
        if len(asked.ids) > service.limits.max_k:
            raise RequestError(400, f"ids: at most {service.limits.max_k}")
        rows = await index.rows(asked.ids)
        described = await _describe(index, [Hit.of(0.0, row) for _, row in rows])
        return [
            MetadataEntry(id=id, metadata={k: v for k, v in one.items() if v is not None})
            for (id, _), one in zip(rows, described, strict=True)
        ]

    @router.get("/indices-list", summary="Names of the indexes")
    async def indices_list() -> list[str]:
        return [name for name, index in service.indexes.items() if not index.damage]

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


async def _search(service: Service, asked: KnnRequest) -> list[KnnEntry]:
    # "" comes from clip-retrieval's page before it knows the names of the indexes
    index = service.index(asked.indice_name or None, "indice_name")
    if asked.modality != "image":
        raise RequestError(400, f"modality: {asked.modality[:20]!r}; allowed: image")
    size = finest(index.searcher.patch_sizes)
    term = term_of(asked)
    # clip-retrieval's page asks for thousands of ids; it gets as many as a search may give
    wanted = asked.num_result_ids or max(1, asked.num_images)
    k = min(wanted, service.limits.max_k)
    query = await service.encoder.query(index, [term], PatchSizes(size, size))
    key = SearchKey(index.name, size, k, deduplicate=asked.deduplicate)
    hits = (await service.search_queue.search(key, query.vector)).hits
    described = await _describe(index, hits[: asked.num_images])
    described += [{} for _ in hits[len(described) :]]
    return [
        KnnEntry(**{**one, "id": hit.id, "similarity": hit.similarity})
        for hit, one in zip(hits, described, strict=True)
    ]


async def _describe(index: ServedIndex, hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """The metadata of each hit, and a small JPEG of the first `MAX_IMAGES`; not where an image lies
    on this machine."""
    jpegs = await index.small_jpegs([hit.location for hit in hits[:MAX_IMAGES]], SIDE)
    described = [{**hit.columns, "key": hit.key, "caption": hit.caption} for hit in hits]
    for one, jpeg in zip(described, jpegs, strict=False):
        if jpeg is not None:
            one["image"] = base64.b64encode(jpeg).decode()
    return described
