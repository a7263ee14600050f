"""Batches of images to embeddings, at several patch sizes or within several budgets of tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from contrastive.distributed import send
from contrastive.fetching import one_ahead, start_fetch
from contrastive.model.lit import LitModel
from contrastive.model.shaped import ShapedPixels, grid_of, read_pixels
from contrastive.vision.grids import GridCuts
from data.batch import EvalBatch, ShapedImages
from data.transform import AnyImage, Cuts
from retrieval.detail import Detail, MaxTokens, num_tokens
from retrieval.embed.config import check_sizes


def embed_batches(
    model: LitModel, reader: Iterable[EvalBatch], details: Sequence[Detail]
) -> Iterator[tuple[EvalBatch, dict[Detail, Float[np.ndarray, "b d"]]]]:
    """Each batch of `reader` with its unit-norm float32 embeddings by patch size or budget; the
    next one is begun before."""
    return one_ahead((batch, start_batch(model, batch, details)) for batch in reader)


def start_batch(
    model: LitModel, batch: EvalBatch, details: Sequence[Detail]
) -> Callable[[], dict[Detail, Float[np.ndarray, "b d"]]]:
    """Start the embeddings of one batch, of a reader with `reader_cuts(model, details)`; call the
    result to wait for them."""
    return _start(model, (batch.images, batch.shaped), details)


def embed_pixels(
    model: LitModel,
    pixels: tuple[UInt8[Tensor, "b 3 s s"] | None, list[ShapedImages]],
    details: Sequence[Detail],
) -> dict[Detail, Float[np.ndarray, "b d"]]:
    """The embeddings of `batch_pixels`, made by `ImageTransform.pixels` with `reader_cuts`."""
    return _start(model, pixels, details)()


def _start(
    model: LitModel,
    pixels: tuple[UInt8[Tensor, "b 3 s s"] | None, list[ShapedImages]],
    details: Sequence[Detail],
) -> Callable[[], dict[Detail, Float[np.ndarray, "b d"]]]:
    images, shaped = pixels
    if images is not None:
        images = model.transform.normalise(send(images, model.device))
        embeds = [model.encode_image(images, patch_size=_size(detail)) for detail in details]
    else:
        cuts = zip(details, shaped, strict=True)
        embeds = [model.embed_shaped(read_pixels(model.vision, part)) for _, part in cuts]
    fetched = start_fetch(embeds)
    return lambda: {d: rows.numpy() for d, rows in zip(details, fetched(), strict=True)}


def _size(detail: Detail) -> int:
    assert isinstance(detail, int), "budgets are read by cuts"
    return detail


def reader_cuts(model: LitModel, details: Sequence[Detail]) -> Cuts | None:
    """What a reader resizes images to; None: the square that all patch sizes share."""
    size, fit = model.image_size, model.transform.fit
    if fit != "aspect" and all(isinstance(detail, int) for detail in details):
        return None
    asked = ((num_tokens(d, size), d if isinstance(d, int) else None) for d in details)
    return GridCuts(size, fit, tuple(asked))


def read_image(
    model: LitModel, data: bytes, max_pixels: int, details: Sequence[Detail]
) -> dict[Detail, ShapedPixels]:
    """Normalised pixels of an image file, for each of `details`. Raises as
    `data.images.decode_image`."""
    return normalised_pixels(model, model.transform.decode(data, max_pixels), details)


def normalised_pixels(
    model: LitModel, picture: AnyImage, details: Sequence[Detail]
) -> dict[Detail, ShapedPixels]:
    """Normalised pixels of a picture, for each of `details`."""
    transform = model.transform
    pixels = transform.pixels(picture, reader_cuts(model, details))
    if isinstance(pixels, Tensor):
        square = transform.normalise(pixels)
        return {detail: ShapedPixels(_size(detail), square) for detail in details}
    return {
        detail: ShapedPixels(cut.patch_size, transform.normalise(part))
        for detail, (cut, part) in zip(details, pixels, strict=True)
    }


def check_details(
    model: LitModel, patch_sizes: Sequence[int], max_tokens: Sequence[int] = ()
) -> tuple[Detail, ...]:
    """The distinct patch sizes or budgets in the order given, or all of the model's patch sizes
    when none are given.

    Raises `UsageError` for what the model cannot run at, and where both are given.
    """
    check_sizes(patch_sizes, max_tokens)
    check_encodes(model, *patch_sizes, *map(MaxTokens, max_tokens))
    if max_tokens:
        return tuple(dict.fromkeys(map(MaxTokens, max_tokens)))
    return tuple(dict.fromkeys(patch_sizes)) or tuple(model.patch_sizes)


def check_encodes(model: LitModel, *details: Detail) -> None:
    """Raises `UsageError` for what the model cannot run at, saying what is allowed."""
    square = (model.image_size, model.image_size)
    for detail in details:
        if isinstance(detail, MaxTokens):
            grid_of(model.vision, square, None, detail.count)
        else:
            model.vision.check_patch_size(detail)
