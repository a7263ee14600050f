"""A whole model at one patch size for other people's tools, checked before it is handed over."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from contrastive.export_open_clip import read_open_clip, write_open_clip
from contrastive.lit import LitModel
from data.errors import UsageError

MIN_COSINE = 0.9999
TEXTS = ["a red bicycle", "two dogs", "Something longer: words, and commas; to the end. " * 9, "a"]

FORMATS: dict[str, tuple[Callable[..., None], Callable[[Path], tuple[Any, Any]]]] = {
    "open_clip": (write_open_clip, read_open_clip),
}
"""Writer and reader; a reader gives (encode_image, encode_text) of the other library."""


@torch.no_grad()
def export_model(model: LitModel, to: str, patch_size: int, folder: Path) -> tuple[float, float]:
    """Write `folder` and return the least cosine of its image and text embeddings to ours.

    The folder is written under a temporary name, read back by the other library, compared, and
    renamed. Raises `UsageError` for what the format cannot express.
    """
    model.vision.check_patch_size(patch_size)
    model = model.cpu().float().eval()
    write, read = FORMATS[to]
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(model, patch_size, part, folder)
        least = _compare(model, patch_size, *read(part))
        if min(least) < MIN_COSINE:
            raise UsageError(
                f"{to} computes this model differently: cosine {least[0]:.5f} of image, "
                f"{least[1]:.5f} of text embeddings; at least {MIN_COSINE} is wanted"
            )
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return least


def _compare(
    model: LitModel, patch_size: int, encode_image: Any, encode_text: Any
) -> tuple[float, float]:
    size = model.image_size
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    pairs = (
        (encode_image(images), model.encode_image(images, patch_size)),
        (encode_text(TEXTS), model.encode_text(TEXTS)),
    )
    image, text = (float(F.cosine_similarity(theirs, ours).min()) for theirs, ours in pairs)
    return image, text
