"""A whole model at one patch size in another library's format, read back and compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from contrastive.export.config import ModelFormat
from contrastive.model.card import front_matter
from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.files import replaced_folder

MIN_COSINE = 0.9999
TEXTS = ["a red bicycle", "two dogs", "Something longer: words, and commas; to the end. " * 9, "a"]


class Format(NamedTuple):
    """How a library's folder is written and read."""

    write: Callable[[LitModel, int, Path, Path], None]
    """(model, patch size, folder to write in, the name it gets afterwards)"""
    read: Callable[[LitModel, Path], tuple[Any, Any]]
    """Gives the other library's (encode_image, encode_text)."""
    usage: str
    """What the folder's README says."""


def _open_clip() -> Format:
    from contrastive.export import open_clip

    return Format(open_clip.write_open_clip, open_clip.read_open_clip, open_clip.USAGE)


def _transformers() -> Format:
    from contrastive.export import transformers as t

    return Format(t.write_transformers, t.read_transformers, t.USAGE)


def _onnx() -> Format:
    from contrastive.export import onnx

    return Format(onnx.write_onnx, onnx.read_onnx, onnx.USAGE)


# Functions, as each format imports its library.
FORMATS: dict[ModelFormat, Callable[[], Format]] = {
    "open_clip": _open_clip,
    "transformers": _transformers,
    "onnx": _onnx,
}


@torch.no_grad()
def export_model(
    model: LitModel, to: ModelFormat, patch_size: int, folder: Path
) -> tuple[float, float]:
    """Write `folder`; return the lowest cosine of its image and of its text embeddings to ours.

    The model is left on the CPU in float32. The other library reads the folder back and the
    embeddings are compared before the folder gets its name. Raises `UsageError` for what the format
    cannot express.
    """
    model.vision.check_patch_size(patch_size)
    model.transform.check_square()
    model = model.cpu().float().eval()
    form = FORMATS[to]()
    with replaced_folder(folder) as part:
        form.write(model, patch_size, part, folder)
        readme = _readme(model, to, form.usage, patch_size)
        (part / "README.md").write_text(readme, encoding="utf-8")
        least = _compare(model, patch_size, *form.read(model, part))
        if min(least) < MIN_COSINE:
            raise UsageError(
                f"{to} cannot express this model: cosine to ours {least[0]:.5f} of image, "
                f"{least[1]:.5f} of text embeddings, {MIN_COSINE} is the least; try "
                f"{' or '.join(other for other in FORMATS if other != to)}"
            )
    return least


FIT = {
    "crop": "shorter side resized by bicubic, centre crop",
    "squash": "both sides resized by bicubic, whatever the aspect ratio",
}


def _readme(model: LitModel, to: str, usage: str, patch_size: int) -> str:
    title = f"# An image-text model at patch size {patch_size}, {model.image_size} px"
    parts = [front_matter(to, model.card.license), title, usage]
    if to != "onnx":
        parts.append(
            f"Preprocessing: {FIT[model.transform.fit]}. Put transparent images over white first."
        )
    return "\n\n".join([*parts, "Written by FlexiLiT (`launch/export.py`)."]) + "\n"


def _compare(
    model: LitModel, patch_size: int, encode_image: Any, encode_text: Any
) -> tuple[float, float]:
    """The lowest cosine of the other library's image and text embeddings to ours."""
    size = model.image_size
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    pairs = (
        (encode_image(images), model.encode_image(images, patch_size)),
        (encode_text(TEXTS), model.encode_text(TEXTS)),
    )
    image, text = (float(F.cosine_similarity(theirs, ours).min()) for theirs, ours in pairs)
    return image, text
