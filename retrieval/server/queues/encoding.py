"""From what a request looks for to a unit-norm vector."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from retrieval.server.fetch import fetch
from retrieval.server.patch_sizes import Patches
from retrieval.server.refusals import RequestError
from retrieval.server.requests import Term
from retrieval.server.service import Service
from retrieval.server.thumbnails import from_base64

FETCH_S = 10.0


@dataclass(frozen=True)
class Encoding:
    """A query as the index sees it, as the refinement sees it, and what its forwards took."""

    vector: Float[np.ndarray, " d"]
    fine: Float[np.ndarray, " d"]
    text_ms: float = 0.0
    image_ms: float = 0.0


async def encode(service: Service, name: str, terms: Sequence[Term], patches: Patches) -> Encoding:
    """The weighted sum of unit-norm vectors, unit norm again. Raises `RequestError`."""
    if len(terms) == 1 and terms[0].weight > 0:
        return await _encode_term(service, name, terms[0], patches)
    parts = await asyncio.gather(*(_encode_term(service, name, term, patches) for term in terms))
    weights = [term.weight for term in terms]
    width = len(parts[0].vector)
    if any(len(part.vector) != width for part in parts):
        raise RequestError(400, "mix: vectors of different widths")
    vector = sum(w * part.vector.astype(np.float64) for w, part in zip(weights, parts, strict=True))
    fine = sum(w * part.fine.astype(np.float64) for w, part in zip(weights, parts, strict=True))
    rounding = 1e-4 * sum(map(abs, weights))  # equal texts of two forwards differ by less
    return Encoding(
        unit(np.asarray(vector), "mix", rounding),
        unit(np.asarray(fine), "mix", rounding),
        sum(part.text_ms for part in parts),
        sum(part.image_ms for part in parts),
    )


async def _encode_term(service: Service, name: str, term: Term, patches: Patches) -> Encoding:
    searcher = service.searchers[name]
    model = searcher.model
    if term.text is not None:
        check_text(service, term.text, "text")
        (one,) = await service.encode_text(model, [term.text])
        return Encoding(one.vector, one.vector, text_ms=one.ms)
    if term.vector is not None:
        width = searcher.snapshot.width
        if len(term.vector) != width:
            sentence = f"vector: has {len(term.vector)} numbers; allowed: {width}"
            raise RequestError(400, sentence)
        vector = unit(np.array(term.vector, np.float64), "vector")
        return Encoding(vector, vector)
    if term.id is not None:
        vector = await service.vector_of(name, term.id, patches.index)
        return Encoding(vector, vector)
    pixels = await read_image(service, name, term.image, term.image_url)
    one = await service.encode_image(model, pixels, patches.query)
    if patches.refine in (None, patches.query):
        return Encoding(one.vector, one.vector, image_ms=one.ms)
    fine = await service.encode_image(model, pixels, patches.refine)
    return Encoding(one.vector, fine.vector, image_ms=one.ms + fine.ms)


async def read_image(
    service: Service, name: str, image: str | bytes | None, image_url: str | None
) -> Float[torch.Tensor, "3 s s"]:
    """The pixels of a picture that a request brings, or names where that is allowed."""
    field = "image"
    if image is None:
        field = "image_url"
        image = await _download(service, image_url or "")
    data = image if isinstance(image, bytes) else from_base64(image, field)
    return await service.prepare(service.searchers[name].model, data, field)


async def _download(service: Service, url: str) -> bytes:
    if not service.image_urls:
        raise RequestError(400, "image_url: this server fetches nothing; send the file as image")

    def download() -> bytes:
        with service.metrics.timed("download_time"):
            return fetch(url, service.limits.max_body_bytes, FETCH_S)

    return await asyncio.get_running_loop().run_in_executor(service.fetch_pool, download)


def check_text(service: Service, text: str, field: str) -> None:
    """Raises `RequestError` for a text that is too long."""
    if len(text) > service.limits.max_text:
        sentence = f"{field}: has {len(text)} characters; at most {service.limits.max_text}"
        raise RequestError(400, sentence)


def unit(
    vector: Float[np.ndarray, " d"], field: str, rounding: float = 0.0
) -> Float[np.ndarray, " d"]:
    """The direction of a float64 vector, float32. Raises `RequestError` where it has none.

    rounding: up to which numbers count as zero.
    """
    largest = float(np.abs(vector).max())
    if not largest > rounding:
        raise RequestError(400, f"{field}: is zero, which points nowhere")
    scaled = vector / largest  # squares of large numbers would be infinite
    return (scaled / np.linalg.norm(scaled)).astype(np.float32)
