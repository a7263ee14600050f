"""A whole model at one patch size for other people's tools, checked before it is handed over."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from contrastive.export.onnx import read_onnx, write_onnx
from contrastive.export.open_clip import read_open_clip, write_open_clip
from contrastive.export.transformers import read_transformers, write_transformers
from contrastive.model.card import front_matter
from contrastive.model.lit import LitModel
from data.errors import UsageError

MIN_COSINE = 0.9999
TEXTS = ["a red bicycle", "two dogs", "Something longer: words, and commas; to the end. " * 9, "a"]

FORMATS: dict[str, tuple[Callable[..., None], Callable[..., tuple[Any, Any]]]] = {
    "open_clip": (write_open_clip, read_open_clip),
    "transformers": (write_transformers, read_transformers),
    "onnx": (write_onnx, read_onnx),
}
"""Writer and reader; a reader gives (encode_image, encode_text) of the other library."""

NOTES = {
    "open_clip": """```python
net, _, preprocess = open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:THIS_FOLDER")
```

open_clip looks for the configuration of a transformers text tower where `hf_model_name` in
open_clip_config.json says, a path or hub name. When the folder has moved, in it:

    sed -i "s|\\"hf_\\(.*\\)_name\\": .*,|\\"hf_\\1_name\\": \\"$PWD\\",|" open_clip_config.json""",
    "transformers": """```python
net = VisionTextDualEncoderModel.from_pretrained("THIS_FOLDER")
processor = VisionTextDualEncoderProcessor.from_pretrained("THIS_FOLDER")
```

The sigmoid loss's bias has no place in this class; it changes no ranking. timm must be installed.
Where an odd number of pixels is cropped, transformers' square lies one pixel before ours. A text
tower that is pooled by the mean of its tokens ends in one more layer that does it.""",
    "onnx": """`config.json` tells files, inputs, opset and what pixels are expected: shorter side
to `image_size` (bicubic), centre crop, (pixel / 255 - mean) / std. `tokenizer.json` makes the token
ids, cut at `context_length`; embeddings have unit norm.""",
}


@torch.no_grad()
def export_model(model: LitModel, to: str, patch_size: int, folder: Path) -> tuple[float, float]:
    """Write `folder` and return the least cosine of its image and text embeddings to ours.

    to: a name of `FORMATS`. The model is left on the CPU in float32.
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
        (part / "README.md").write_text(_readme(model, to, patch_size), encoding="utf-8")
        least = _compare(model, patch_size, *read(model, part))
        if min(least) < MIN_COSINE:
            raise UsageError(
                f"--to {to} cannot express this model: cosine to ours {least[0]:.5f} of image, "
                f"{least[1]:.5f} of text embeddings, {MIN_COSINE} is the least; try --to "
                f"{', '.join(other for other in FORMATS if other != to)}"
            )
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return least


def _readme(model: LitModel, to: str, patch_size: int) -> str:
    title = f"# An image-text model at patch size {patch_size}, {model.image_size} px"
    parts = [front_matter(to, model.card.license), title, NOTES[to]]
    if to != "onnx":
        parts.append(
            "Preprocessing: shorter side resized by bicubic, centre crop. Put transparent pictures "
            "over white first."
        )
    return "\n\n".join([*parts, "Written by FlexiLiT (`launch/export.py`)."]) + "\n"


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
