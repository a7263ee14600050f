"""Texts and images, mixed as they come, to one list of vectors."""

import os
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from data.given import list_images
from data.image_headers import names_image
from data.progress import Progress


def is_one(inputs: Any) -> bool:
    """Whether it is one text or image, rather than several."""
    if isinstance(inputs, str | os.PathLike | Image.Image):
        return True
    return getattr(inputs, "ndim", 0) in (2, 3)  # an array, a tensor


Encode = Callable[[list[Any]], Float[Tensor, "n d"]]


def encode_mixed(
    inputs: Any,
    width: int,
    encode_text: Encode,
    encode_image: Encode,
    batch_size: int,
    show_progress_bar: bool | None,
) -> Float[Tensor, "n d"]:
    """On the CPU, in the order given. Raises as `LitModel.encode`."""
    given = list_images(inputs)
    is_text = [isinstance(one, str) and not names_image(one) for one in given]
    texts = [n for n, text in enumerate(is_text) if text]
    images = [n for n, text in enumerate(is_text) if not text]
    rows = torch.empty(len(given), width)
    with Progress(
        total=len(given),
        desc="encoding",
        unit="input",
        delay=0 if show_progress_bar else 5,
        leave=False,
        disable=show_progress_bar is False,
    ) as bar:
        for numbers, encode in ((texts, encode_text), (images, encode_image)):
            for start in range(0, len(numbers), batch_size):
                part = numbers[start : start + batch_size]
                rows[part] = encode([given[n] for n in part]).float().cpu()
                bar.update(len(part))
    return rows
