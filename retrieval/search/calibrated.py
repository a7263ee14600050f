"""The calibration of an open index, as long as it holds, and what it says of a search."""

from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float

from contrastive.model.lit import LitModel
from retrieval.detail import Detail
from retrieval.index_interface import IndexState
from retrieval.search.calibration import Calibration, read_calibration


class Calibrated:
    """Reads an index's calibration again when its file or the index changes. Safe for threads."""

    def __init__(self, folder: Path, model: LitModel) -> None:
        self._folder = folder
        self._model = model
        self._held: tuple[int, Calibration | None, Calibration | None] = (-1, None, None)

    @cached_property
    def _fingerprints(self) -> tuple[str, str]:
        return self._model.image_fingerprint, self._model.text_fingerprint  # reads all weights

    def of(self, snapshot: IndexState) -> Calibration | None:
        """That of this state of the index; None where nobody has calibrated it, where it has
        changed by a fifth since, or was done with another model."""
        generation, read, holds = self._held
        found = read_calibration(self._folder)
        if found is None:
            return None
        if generation != snapshot.generation or found is not read:
            holds = found if found.holds(snapshot.ids(), *self._fingerprints) else None
            self._held = (snapshot.generation, found, holds)
        return holds

    def confidence(
        self,
        snapshot: IndexState,
        embeds: Float[np.ndarray, "q d"],
        best: list[int | None],
        patch_size: Detail,
    ) -> list[float | None]:
        """Per text, the share of texts with an answer whose best image fits as badly. best: its id;
        None where there is none: nothing is said of that text."""
        found = self.of(snapshot)
        known = [number for number, id in enumerate(best) if id is not None]
        said: list[float | None] = [None] * len(best)
        if found is None or not known or patch_size not in found.present:
            return said
        try:
            images = snapshot.vectors([id for id in best if id is not None], patch_size)
        except KeyError:  # deleted meanwhile
            return said
        values = found.confidence(found.scores(images, embeds[known]), patch_size)
        for number, value in zip(known, values.tolist(), strict=True):
            said[number] = None if np.isnan(value) else value
        return said
