"""The service's own endpoints: search, classify, what indexes there are, and their pictures."""

import hashlib
import json
import random
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import Response

from data.shards.location import ImageLocation
from retrieval.search.searcher import Hit, Searcher
from retrieval.server.classify import classify
from retrieval.server.json_responses import json_response
from retrieval.server.limits import RequestError
from retrieval.server.patch_sizes import choose_patches
from retrieval.server.queries import encode
from retrieval.server.requests import MAX_ID, ClassifyRequest, SearchRequest, read
from retrieval.server.schemas import CLASSIFY, IMAGE, INDICES, SAMPLE, SEARCH
from retrieval.server.service import SearchKey, Service
from retrieval.server.thumbnails import MAX_SIDE

MAX_WHERE = 20_000  # characters of a filter as JSON
MAX_TESTS = 64  # comparisons of a filter
MAX_SAMPLE = 100
MIN_SIDE = 16


def routes(service: Service) -> APIRouter:
    """/v1 of a service."""
    router = APIRouter(prefix="/v1")

    @router.post("/search", **SEARCH)
    async def search(request: Request) -> Response:
        return json_response(await answer_search(service, await read(request, SearchRequest)))

    @router.post("/classify", **CLASSIFY)
    async def classify_(request: Request) -> Response:
        return json_response(await classify(service, await read(request, ClassifyRequest)))

    @router.get("/indices", **INDICES)
    async def indices() -> Response:
        sets = [{"name": n, "count": len(c.class_names)} for n, c in service.class_sets.items()]
        return json_response(
            {
                "indices": [_describe(name, s) for name, s in service.searchers.items()],
                "class_sets": sets,
                "limits": vars(service.limits),
            }
        )

    @router.get("/indices/{index}/sample", **SAMPLE)
    async def sample(index: str, n: int = 24) -> Response:
        name, searcher = service.searcher(index)
        if not 1 <= n <= MAX_SAMPLE:
            raise RequestError(400, f"n: {n}; allowed: 1 to {MAX_SAMPLE}")
        ids = searcher.snapshot.ids()
        chosen = random.sample(range(len(ids)), min(n, len(ids)))
        rows = await service.rows_of(name, [int(ids[row]) for row in chosen])
        return json_response({"index": name, "hits": [_hit(name, Hit.of(0.0, r)) for _, r in rows]})

    @router.get("/images/{index}/{id}", **IMAGE)
    async def image(request: Request, index: str, id: int, size: int = 224) -> Response:
        name, _ = service.searcher(index)
        if not 0 <= id <= MAX_ID:
            raise RequestError(400, f"id: {id}; allowed: 0 to {MAX_ID}")
        if not MIN_SIDE <= size <= MAX_SIDE:
            raise RequestError(400, f"size: {size}; allowed: {MIN_SIDE} to {MAX_SIDE} pixels")
        rows = await service.rows_of(name, [id])
        if not rows:
            raise RequestError(404, f"id: {id} is not in index {name}")
        row = rows[0][1]
        location = ImageLocation(row["shard"], row["offset"], row["size"])
        mark = hashlib.blake2b(f"{location}{size}".encode(), digest_size=12).hexdigest()
        headers = {"ETag": f'"{mark}"', "Cache-Control": "private, max-age=300"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        (jpeg,) = await service.small_jpegs([location], size)
        if jpeg is None:
            raise RequestError(404, f"id: the file of image {id} cannot be read any more")
        return Response(jpeg, headers=headers, media_type="image/jpeg")

    return router


def _describe(name: str, searcher: Searcher) -> dict[str, Any]:
    snapshot, model = searcher.snapshot, searcher.model
    ms = searcher.profile.ms(model.patch_sizes)
    sizes = [
        {
            "patch_size": size,
            "in_index": size in snapshot.patch_sizes,
            "gflops": round(searcher.profile.gflops(size), 3),
            "ms": round(ms[size], 3),
        }
        for size in sorted(model.patch_sizes, reverse=True)
    ]
    columns = {} if snapshot.columns is None else {f.name: str(f.type) for f in snapshot.columns}
    return {
        "name": name,
        "count": len(snapshot),
        "kind": snapshot.manifest.index_type,
        "width": snapshot.width,
        "generation": snapshot.generation,
        "image_size": model.image_size,
        "patch_sizes": sizes,
        "columns": columns,
    }


# ---- search --------------------------------------------------------------------------------


async def answer_search(service: Service, asked: SearchRequest) -> dict[str, Any]:
    """What /v1/search answers. Raises `RequestError`."""
    start = time.perf_counter()
    limits = service.limits
    name, searcher = service.searcher(asked.index)
    if asked.offset + asked.k > limits.max_k:
        raise RequestError(400, f"k: k and offset together may be at most {limits.max_k}")
    patches = choose_patches(searcher, name, asked)
    wanted = asked.offset + asked.k
    depth = min(limits.max_k, wanted + 1)  # one more tells whether there is a next page
    if patches.refine is not None:
        if asked.candidates > limits.max_candidates:
            raise RequestError(400, f"candidates: at most {limits.max_candidates}")
        if asked.candidates < wanted:
            raise RequestError(400, f"candidates: at least k and offset together ({wanted})")
        depth = min(depth, asked.candidates)
    encoding = await encode(service, name, asked.terms(), patches)
    encoded = time.perf_counter()
    key = SearchKey(
        name, patches.index, depth, where_of(asked.where), asked.deduplicate,
        asked.nprobe, asked.ef, patches.refine, asked.candidates if patches.refine else 0,
    )  # fmt: skip
    with service.metrics.timed("full_knn_request_time"):
        hits = await service.search(key, encoding.vector, encoding.fine)
    more = len(hits) > wanted
    looked_at = encoding.image_ms > 0
    return {
        "index": name,
        "patch_size": patches.index,
        "query_patch_size": patches.query if looked_at else None,
        "refine_patch_size": patches.refine,
        "hits": [_hit(name, hit) for hit in hits[asked.offset : wanted]],
        "next_offset": wanted if more else None,
        "ms": {
            "text": round(encoding.text_ms, 3),
            "image": round(encoding.image_ms, 3),
            "search": round(1e3 * (time.perf_counter() - encoded), 3),
            "total": round(1e3 * (time.perf_counter() - start), 3),
        },
    }


def _hit(name: str, hit: Hit) -> dict[str, Any]:
    return {
        "id": hit.id,
        "similarity": hit.similarity,
        "key": hit.key,
        "caption": hit.caption,
        "image": f"/v1/images/{quote(name, safe='')}/{hit.id}",
        "columns": dict(hit.columns),
    }


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
