"""Vectors of labels, kept between requests."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from contrastive.model.lit import LitModel
from data.class_names import fill_template
from retrieval.server.queues.encoding import Encoder

MAX_KEPT = 20_000


class LabelCache:
    """The latest labels' vectors, by model and templates."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._kept: OrderedDict[tuple[int, str, tuple[str, ...]], np.ndarray] = OrderedDict()

    async def vectors(
        self, model: LitModel, labels: Sequence[str], templates: Sequence[str]
    ) -> Float[np.ndarray, "c d"]:
        """One vector per label, as `embed_classes` makes it."""
        number, frame = id(model), tuple(templates)
        found = {label: self._kept.get((number, label, frame)) for label in labels}
        new = [label for label, vector in found.items() if vector is None]
        if new:
            prompts = [fill_template(template, label) for label in new for template in frame]
            encoded = await self._encoder.texts(model, prompts)
            embeds = np.stack([one.vector for one in encoded])
            means = embeds.reshape(len(new), len(frame), -1).mean(axis=1)
            for label, row in zip(new, means, strict=True):
                unit = row / max(float(np.linalg.norm(row)), 1e-12)
                found[label] = self._kept[number, label, frame] = unit
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return np.stack([row for label in labels if (row := found[label]) is not None])
