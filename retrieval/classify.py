"""Zero-shot classification: search in an index of class embeddings."""

from collections.abc import Sequence

import faiss
import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from contrastive.lit import LitModel
from data.classes import SIMPLE_TEMPLATES, fill
from data.errors import UsageError


def embed_classes(
    model: LitModel, class_names: Sequence[str], templates: Sequence[str], batch_size: int = 256
) -> Float[np.ndarray, "c d"]:
    """One unit-norm vector per class: its prompts' unit-norm embeddings, averaged, renormalised.

    templates: texts with a `{c}` where the class name goes (CLIP, arXiv:2103.00020, section
    3.1.4). At most about batch_size prompts are in flight at a time.
    """
    per_chunk = max(1, batch_size // len(templates))
    rows = []
    for start in range(0, len(class_names), per_chunk):
        names = class_names[start : start + per_chunk]
        prompts = [fill(template, name) for name in names for template in templates]
        with torch.no_grad():
            embeds = torch.cat(
                [
                    model.encode_text(prompts[i : i + batch_size])
                    for i in range(0, len(prompts), batch_size)
                ]
            )
        means = embeds.unflatten(0, (len(names), len(templates))).mean(dim=1)
        rows.append(torch.nn.functional.normalize(means, dim=-1).float().cpu().numpy())
    return np.concatenate(rows)


class ZeroShotClassifier:
    """Names the class of an image among any number of classes, at any patch size.

    class_names: at least one; templates: at least one, with `{c}` where the name goes.
    Raises `UsageError` when either is empty or a template has no `{c}`.
    """

    def __init__(
        self,
        model: LitModel,
        class_names: Sequence[str],
        templates: Sequence[str] = SIMPLE_TEMPLATES,
    ) -> None:
        if not class_names or not templates:
            raise UsageError(
                f"{len(class_names)} class names and {len(templates)} templates; "
                "at least one of each is needed"
            )
        for template in templates:
            if "{c}" not in template:
                raise UsageError(f"template {template!r} has no {{c}} where the class name goes")
        self.model = model
        self.class_names = list(class_names)
        self.index = faiss.IndexFlatIP(model.embed_dim)
        self.index.add(embed_classes(model, class_names, templates))

    def classify_embeddings(
        self, image_embeds: Float[np.ndarray, "n d"], k: int = 5
    ) -> tuple[Int[np.ndarray, "n k2"], Float[np.ndarray, "n k2"]]:
        """Classes, best first, and their cosine similarities; k2 = min(k, number of classes).

        image_embeds: unit norm, float32.
        """
        scores, labels = self.index.search(
            np.ascontiguousarray(image_embeds, np.float32), min(k, self.index.ntotal)
        )
        return labels, scores

    def predict(
        self,
        images: Float[Tensor, "b 3 s s"] | list[Image.Image],
        patch_size: int | None = None,
        k: int = 5,
    ) -> tuple[Int[np.ndarray, "b k2"], Float[np.ndarray, "b k2"]]:
        """Classes, best first, and their cosine similarities; k2 = min(k, number of classes).

        images: normalised pixels, or pictures. patch_size: None takes the model's finest.
        """
        with torch.no_grad():
            embeds = self.model.encode_image(images, patch_size=patch_size)
        return self.classify_embeddings(embeds.float().cpu().numpy(), k)
