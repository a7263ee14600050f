"""Where in an image the labels of a request are: a mask."""

import asyncio
import base64
import io
import time

import numpy as np
from jaxtyping import Float
from PIL import Image

from contrastive.vision.patch_features import check_has_patches
from data.errors import UsageError
from retrieval.dense.segment import ZeroShotSegmenter
from retrieval.server.api.answers import ClassifyTimes, Region, SegmentAnswer
from retrieval.server.api.classification import embed_labels
from retrieval.server.patch_sizes import check_size, usable_sizes
from retrieval.server.refusals import RequestError
from retrieval.server.requests import SegmentRequest
from retrieval.server.service import Service

MAX_SIDE = 1024  # of a mask, pixels; of a square with 200 labels, 210 million cosines


async def answer_segment(service: Service, asked: SegmentRequest) -> SegmentAnswer:
    """Embed the labels, read the image's patches, say which label each pixel is of. Raises
    `RequestError`."""
    start = time.perf_counter()
    searcher = service.index(asked.index).searcher
    model = searcher.model
    patch_size = asked.patch_size or min(model.patch_sizes)
    check_size("patch_size", patch_size, usable_sizes(searcher), "the model")
    try:
        check_has_patches(model.vision)
        embeds = await embed_labels(service, model, asked.labels, asked.templates)
        segmenter = ZeroShotSegmenter(
            model, asked.labels, background=asked.background, class_embeds=embeds
        )
    except UsageError as error:
        raise RequestError(400, str(error)) from error
    picture = await service.uploads.picture(asked.image, asked.image_url)

    def read() -> Float[np.ndarray, "r c k"]:
        return segmenter.similarities(picture, patch_size)[0]

    similarities, ms = await service.encoder.patches(read)
    scale = min(1.0, MAX_SIDE / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)

    def paint() -> tuple[str, Float[np.ndarray, " k"]]:
        mask = segmenter.mask(similarities, (height, width))
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
        ms=ClassifyTimes(image=round(ms, 3), total=round(1e3 * (time.perf_counter() - start), 3)),
    )
