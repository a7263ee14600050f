"""Where in an image the texts of a request are: masks of labels, boxes, the map of one text."""

import asyncio
import base64
import io
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from contrastive.model.lit import LitModel
from contrastive.vision.patch_features import check_has_patches
from data.errors import UsageError
from retrieval.dense.average_precision import ScoredBox
from retrieval.dense.detect import ZeroShotDetector
from retrieval.dense.examples import example_embed, whole_embeds
from retrieval.dense.segment import ZeroShotSegmenter
from retrieval.regions.boxes import check_box
from retrieval.regions.parts import part_of
from retrieval.server.api.answers import (
    ClassifyTimes,
    DetectAnswer,
    Detection,
    MapAnswer,
    Region,
    SegmentAnswer,
)
from retrieval.server.api.classification import embed_labels
from retrieval.server.api.place_requests import DetectRequest, Example, MapRequest, SegmentRequest
from retrieval.server.api.stored_images import image_of
from retrieval.server.patch_sizes import check_size, usable_sizes
from retrieval.server.refusals import RequestError
from retrieval.server.requests import Picture, check_text
from retrieval.server.service import Service

MAX_SIDE = 1024  # of a mask, pixels; of a square with 200 labels, 210 million cosines


async def answer_segment(service: Service, asked: SegmentRequest) -> SegmentAnswer:
    """Embed the labels, read the image's patches, say which label each pixel is of. Raises
    `RequestError`."""
    start = time.perf_counter()
    model, patch_size = _model_and_size(service, asked)
    embeds = await embed_labels(service, model, asked.labels, asked.templates)
    segmenter = _segmenter(model, asked, asked.labels, embeds, asked.background)
    picture, similarities, ms = await _read(service, asked, segmenter, patch_size)
    width, height = _size(picture)

    def paint() -> tuple[str, Float[np.ndarray, " k"]]:
        mask, _ = segmenter.judged(similarities, (height, width))
        file = io.BytesIO()
        Image.fromarray(mask).save(file, "PNG")
        shares = np.bincount(mask.ravel(), minlength=len(asked.labels) + 1)[1:] / mask.size
        return base64.b64encode(file.getvalue()).decode(), shares

    loop = asyncio.get_running_loop()
    encoded, shares = await loop.run_in_executor(service.pool, paint)
    return SegmentAnswer(
        patch_size=patch_size,
        width=width,
        height=height,
        mask=encoded,
        regions=[
            Region(label=asked.labels[number], share=float(shares[number]))
            for number in np.argsort(-shares, kind="stable")
            if shares[number]
        ],
        ms=_times(ms, start),
    )


async def answer_detect(service: Service, asked: DetectRequest) -> DetectAnswer:
    """Embed labels and examples, read the image's patches, draw boxes. Raises `RequestError`."""
    start = time.perf_counter()
    model, patch_size = _model_and_size(service, asked)
    if asked.labels is not None:
        names = asked.labels
        embeds = await embed_labels(service, model, asked.labels, asked.templates)
    else:
        examples = asked.examples or []
        names = [f"example {number}" for number in range(len(examples))]
        found = (_example(service, asked, patch_size, one) for one in examples)
        embeds = np.stack(await asyncio.gather(*found))
    try:
        detector = ZeroShotDetector(
            model,
            names,
            background=asked.background,
            windows=asked.windows or (),
            class_embeds=embeds,
        )
    except UsageError as error:
        raise RequestError(400, str(error)) from error
    picture, similarities, ms = await _read(service, asked, detector.segmenter, patch_size)
    width, height = _size(picture)
    loop = asyncio.get_running_loop()
    boxes = await loop.run_in_executor(service.pool, detector.boxes, similarities, (height, width))
    return DetectAnswer(
        patch_size=patch_size,
        boxes=[_detection(box, (width, height), asked.labels) for box in boxes],
        ms=_times(ms, start),
    )


def _detection(box: ScoredBox, size: tuple[int, int], labels: Sequence[str] | None) -> Detection:
    (left, top, width, height), number = box.box, box.label - 1
    return Detection(
        box=[left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1]],
        label=None if labels is None else labels[number],
        example=number if labels is None else None,
        score=box.score,
    )


async def _example(
    service: Service, asked: DetectRequest, patch_size: int, example: Example
) -> Float[np.ndarray, " d"]:
    """The vector of an example."""
    model = service.index(asked.index).searcher.model
    picture = await _picture(service, asked.index, example)

    def read() -> Float[np.ndarray, " d"]:
        shown = picture if example.box is None else part_of(picture, check_box(example.box))
        if asked.windows:
            return whole_embeds(model, [shown], patch_size)[0]
        return example_embed(model, shown, patch_size)

    return (await service.encoder.patches(read))[0]


async def _picture(service: Service, index: str | None, asked: Picture) -> Image.Image:
    """A request's image at its own resolution."""
    image = await image_of(service.index(index), asked)
    return await service.uploads.picture(image, asked.image_url)


async def answer_map(service: Service, asked: MapRequest) -> MapAnswer:
    """Embed the text, read the image's patches, say how alike they are. Raises `RequestError`."""
    start = time.perf_counter()
    model, patch_size = _model_and_size(service, asked)
    check_text(asked.text, service.limits, "text")
    (text,) = await service.encoder.texts(model, [asked.text])
    segmenter = _segmenter(model, asked, [asked.text], text.vector[None])
    _, similarities, ms = await _read(service, asked, segmenter, patch_size)
    rows = similarities[..., 0].astype(np.float64).round(4).tolist()
    return MapAnswer(patch_size=patch_size, similarities=rows, ms=_times(ms, start))


def _model_and_size(
    service: Service, asked: SegmentRequest | DetectRequest | MapRequest
) -> tuple[LitModel, int]:
    """The model that reads a request's image, and at which patch size."""
    searcher = service.index(asked.index).searcher
    model = searcher.model
    patch_size = asked.patch_size or min(model.patch_sizes)
    check_size("patch_size", patch_size, usable_sizes(searcher), "the model")
    try:
        if not asked.windows:
            check_has_patches(model.vision)
    except UsageError as error:
        raise RequestError(400, str(error)) from error
    return model, patch_size


def _segmenter(
    model: LitModel,
    asked: SegmentRequest | MapRequest,
    texts: Sequence[str],
    embeds: Float[np.ndarray, "c d"],
    background: float | None = None,
) -> ZeroShotSegmenter:
    try:
        return ZeroShotSegmenter(
            model,
            texts,
            background=background,
            windows=asked.windows or (),
            class_embeds=embeds,
        )
    except UsageError as error:
        raise RequestError(400, str(error)) from error


async def _read(
    service: Service,
    asked: SegmentRequest | DetectRequest | MapRequest,
    segmenter: ZeroShotSegmenter,
    patch_size: int,
) -> tuple[Image.Image, Float[np.ndarray, "r c k"], float]:
    """A request's image, its map, and milliseconds of the forward."""
    picture = await _picture(service, asked.index, asked)

    def read() -> Float[np.ndarray, "r c k"]:
        return segmenter.similarities(picture, patch_size)[0]

    return picture, *(await service.encoder.patches(read))


def _size(picture: Image.Image) -> tuple[int, int]:
    """Width and height at which an image's pixels are told apart, at most `MAX_SIDE`."""
    scale = min(1.0, MAX_SIDE / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return width, height


def _times(ms: float, start: float) -> ClassifyTimes:
    total = 1e3 * (time.perf_counter() - start)
    return ClassifyTimes(image=round(ms, 3), total=round(total, 3))
