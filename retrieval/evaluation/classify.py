"""Zero-shot classification: search in an index of class embeddings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive.distributed import is_main
from contrastive.model.lit import LitModel
from data.class_names import DEFAULT_TEMPLATES, fill_template
from data.errors import UsageError
from data.files import check_seal, file_digest, load_array, replaced_folder, sealed, write_json
from data.given import Images, list_images
from data.progress import Progress
from retrieval.detail import Detail, encoding
from retrieval.index.faiss_setup import faiss
from retrieval.search.config import PatchSizeOrBudget
from retrieval.search.cost_profile import CostProfile
from retrieval.search.refine import blend


def embed_classes(
    model: LitModel, class_names: Sequence[str], templates: Sequence[str], batch_size: int = 256
) -> Float[np.ndarray, "c d"]:
    """One unit-norm vector per class: its prompts' unit-norm embeddings, averaged, renormalised.

    templates: texts with a `{c}` where the class name goes (CLIP, arXiv:2103.00020, section
    3.1.4). At most about batch_size prompts are in flight at a time.
    """
    per_chunk = max(1, batch_size // len(templates))
    rows = []
    starts = range(0, len(class_names), per_chunk)
    quiet = not is_main()
    for start in Progress(
        starts, "embedding class names", unit="batch", delay=5, leave=False, disable=quiet
    ):
        names = class_names[start : start + per_chunk]
        prompts = [fill_template(template, name) for name in names for template in templates]
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


def close_calls(scores: Float[np.ndarray, "n k"], margin: float) -> Bool[np.ndarray, " n"]:
    """Which images' two best classes lie less than `margin` (a cosine) apart."""
    if scores.shape[1] < 2:
        return np.zeros(len(scores), bool)
    return scores[:, 0] - scores[:, 1] < margin


class NamedClass(NamedTuple):
    """A class that an image may be of, and the cosine similarity of the two."""

    name: str
    similarity: float


class ZeroShotClassifier:
    """Names the class of an image among any number of classes, at any patch size.

    class_names: a list of at least one; templates: at least one, with `{c}` where the name goes.
    Raises `UsageError` when either is empty, a template has no `{c}`, or a single text is given for
    the list of names.
    """

    def __init__(
        self,
        model: LitModel,
        class_names: Sequence[str],
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        class_embeds: Float[np.ndarray, "c d"] | None = None,
    ) -> None:
        """class_embeds: of these names and templates, where they were computed before."""
        if isinstance(class_names, str):
            raise UsageError(
                f"class_names {class_names[:80]!r} is one text; a list is needed, such as "
                '["cat", "dog"]'
            )
        templates = [templates] if isinstance(templates, str) else list(templates)
        class_names = list(class_names)
        if not class_names or not templates:
            raise UsageError(
                f"{len(class_names)} class names and {len(templates)} templates; "
                "at least one of each is needed"
            )
        for template in templates:
            if "{c}" not in template:
                raise UsageError(f"template {template!r} has no {{c}} where the class name goes")
        self.model = model
        self.class_names, self.templates = class_names, templates
        self.profile = CostProfile(model)
        if class_embeds is None:
            class_embeds = embed_classes(model, class_names, templates)
        self.index = faiss.IndexFlatIP(model.embed_dim)
        self.index.add(class_embeds)

    def __repr__(self) -> str:
        names = ", ".join(self.class_names[:3]) + (", ..." if len(self.class_names) > 3 else "")
        num_templates = len(self.templates)
        return (
            f"ZeroShotClassifier({len(self.class_names):,} classes ({names}), "
            f"{num_templates} template{'s' * (num_templates > 1)})"
        )

    @property
    def class_embeds(self) -> Float[np.ndarray, "c d"]:
        """One unit-norm vector per class."""
        found: np.ndarray = self.index.reconstruct_n(0, self.index.ntotal)
        return found

    # ---- classify --------------------------------------------------------------------------

    def classify_embeddings(
        self, image_embeds: Float[np.ndarray, "n d"], k: int = 5
    ) -> tuple[Int[np.ndarray, "n k2"], Float[np.ndarray, "n k2"]]:
        """Classes, best first, and their cosine similarities; k2 = min(k, number of classes).

        image_embeds: unit norm (or what `blend` made of such), float32.
        """
        scores, labels = self.index.search(
            np.ascontiguousarray(image_embeds, np.float32), min(k, self.index.ntotal)
        )
        return labels, scores

    def predict(
        self,
        images: Images,
        patch_size: PatchSizeOrBudget = None,
        k: int = 5,
        *,
        refine_patch_size: PatchSizeOrBudget = None,
        margin: float = 0.02,
    ) -> tuple[Int[np.ndarray, "b k2"], Float[np.ndarray, "b k2"]]:
        """Classes, best first, and their cosine similarities; k2 = min(k, number of classes).

        images: as `LitModel.encode_image` takes them, one or many. patch_size: None takes the
        model's finest; a `Budget` or `MaxTokens` may stand for either size. refine_patch_size:
        images whose first two classes lie less than `margin` apart at `patch_size` are encoded
        again at this one, and classified by two thirds of the new similarities and one third of
        the old.
        """
        is_batch = isinstance(images, Tensor) and images.ndim == 4
        given: Any = images if is_batch else list_images(images)
        sizes = self.model.patch_sizes
        coarse = self.profile.encoding(patch_size, sizes)
        embeds = self._encode(given, coarse)
        labels, scores = self.classify_embeddings(embeds, max(k, 2))
        if refine_patch_size is not None:
            close = close_calls(scores, margin)
            if close.any():
                chosen = np.flatnonzero(close)
                again = (
                    given[torch.from_numpy(chosen)]
                    if isinstance(given, Tensor)
                    else [given[i] for i in chosen]
                )
                fine = self._encode(again, self.profile.encoding(refine_patch_size, sizes))
                both = blend(fine, embeds[close])
                labels[close], scores[close] = self.classify_embeddings(both, max(k, 2))
        return labels[:, :k], scores[:, :k]

    def predict_names(
        self, images: Images, patch_size: PatchSizeOrBudget = None, k: int = 5, **refinement: Any
    ) -> list[list[NamedClass]]:
        """`predict`, with the names of the classes: per image the best, best first."""
        labels, scores = self.predict(images, patch_size, k, **refinement)
        return [
            [NamedClass(self.class_names[n], s) for n, s in zip(*line, strict=True)]
            for line in zip(labels.tolist(), scores.tolist(), strict=True)
        ]

    def _encode(self, images: Images, patch_size: Detail) -> Float[np.ndarray, "b d"]:
        return self.model.encode_image(images, **encoding(patch_size)).float().cpu().numpy()

    # ---- files -----------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the class set, so that its names need not be embedded again."""
        manifest = {
            "format": 1,
            "text_fingerprint": self.model.text_fingerprint,
            "class_names": self.class_names,
            "templates": self.templates,
        }
        with replaced_folder(Path(folder)) as part:
            np.save(part / "classes.npy", self.class_embeds, allow_pickle=False)
            manifest["vectors"] = file_digest(part / "classes.npy")
            write_json(part / "manifest.json", sealed(manifest))

    @classmethod
    def load(cls, folder: str | Path, model: LitModel) -> "ZeroShotClassifier":
        """Read what `save` wrote. Raises `UsageError` for anything else, or where another text
        tower embedded the names."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            check_seal(folder / "manifest.json", manifest)
            if manifest.get("vectors") not in (None, file_digest(folder / "classes.npy")):
                raise UsageError(f"{folder}/classes.npy is damaged; embed the names again")
            vectors = load_array(folder / "classes.npy")
            names, templates = manifest["class_names"], manifest["templates"]
            fits = manifest["format"] == 1 and vectors.shape == (len(names), model.embed_dim)
            text_fingerprint = manifest["text_fingerprint"]
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{folder} holds no class set of format 1 ({error})") from error
        if not fits:
            raise UsageError(f"{folder} holds no class set of this model's width")
        if text_fingerprint != model.text_fingerprint:
            raise UsageError(
                f"the class names of {folder} were embedded by another text tower; embed them again"
            )
        return cls(model, names, templates, vectors.astype(np.float32))
