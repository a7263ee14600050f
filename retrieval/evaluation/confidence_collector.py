"""Collect what calibration errors need from batches and ranks, however many images there are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from contrastive.distributed import gather_objects
from data.batch import EvalBatch
from retrieval.detail import Detail
from retrieval.evaluation.calibration_error import (
    CalibrationError,
    ConfidenceBins,
    confidence,
    fit_temperature,
)
from retrieval.evaluation.recall_collector import RowFile

BLOCK = 4096  # images whose logits are in memory


class ConfidenceCollector:
    """Takes batches as they come, then measures calibration errors over the images of all ranks.

    folder: empty, of this rank alone. class_embeds, scale: an image's logits are scale times its
    inner products with the classes. examples: so many images, at most half of all, are drawn for a
    temperature and not measured on; all images' embeddings then wait in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        patch_sizes: Sequence[Detail],
        class_embeds: Float[np.ndarray, "c d"],
        scale: float,
        examples: int = 0,
    ) -> None:
        self._classes, self._scale, self._examples = class_embeds, scale, examples
        self._bins = {size: ConfidenceBins() for size in patch_sizes}
        width = class_embeds.shape[1]
        files = {size: folder / f"sure_{size}" for size in patch_sizes} if examples else {}
        self._rows = {size: RowFile(file, width) for size, file in files.items()}
        self._positions: list[np.ndarray] = []  # of each image in the data set
        self._targets: list[np.ndarray] = []
        self._right: dict[Detail, list[np.ndarray]] = {size: [] for size in patch_sizes}

    def add(
        self,
        batch: EvalBatch,
        targets: Int[np.ndarray, " b"],
        embeds: Mapping[Detail, Float[np.ndarray, "b d"]],
        right: Mapping[Detail, Bool[np.ndarray, " b"]],
    ) -> None:
        """embeds, right: per patch size, unit-norm embeddings, and whether the first class is
        right."""
        if self._examples:
            self._positions.append((batch.shard << 40) + batch.indices.numpy().astype(np.int64))
            self._targets.append(targets)
        for size, rows in embeds.items():
            if self._examples:
                self._rows[size].append(rows)
                self._right[size].append(right[size])
            else:
                self._bins[size].add(confidence(self._logits(rows)), right[size])

    def errors(self) -> dict[Detail, CalibrationError]:
        """Patch size -> error, equal on every rank. Ranks call it together."""
        if self._examples:
            return self._errors_with_temperatures()
        found = {}
        for size, bins in self._bins.items():
            _add_ranks(bins)
            images = int(bins.counts[:, 0].sum())
            found[size] = CalibrationError(bins.error(), images, chance=bins.chance())
        return found

    def _errors_with_temperatures(self) -> dict[Detail, CalibrationError]:
        positions = np.concatenate([np.zeros(0, np.int64), *self._positions])
        targets = np.concatenate([np.zeros(0, np.int64), *self._targets])
        everywhere = np.sort(np.concatenate(gather_objects(positions)))
        drawn = np.random.default_rng(0).permutation(everywhere)
        drawn = np.sort(drawn[: min(self._examples, len(drawn) // 2)])
        is_example = np.isin(positions, drawn)
        found = {}
        for size, file in self._rows.items():
            rows = file.mapped()
            own = positions[is_example], self._logits(rows[is_example]), targets[is_example]
            order, logits, wanted = map(np.concatenate, zip(*gather_objects(own), strict=True))
            in_order = np.argsort(order, kind="stable")
            # ranks' batches differ in the last bits
            temperature = round(fit_temperature(logits[in_order], wanted[in_order]), 4)
            right = np.concatenate([np.zeros(0, bool), *self._right[size]])
            before, after = ConfidenceBins(), ConfidenceBins()
            measured = np.flatnonzero(~is_example)
            for start in range(0, len(measured), BLOCK):
                part = measured[start : start + BLOCK]
                logits = self._logits(rows[part])
                before.add(confidence(logits), right[part])
                after.add(confidence(logits / temperature), right[part])
            _add_ranks(before)
            _add_ranks(after)
            found[size] = CalibrationError(
                before.error(), int(before.counts[:, 0].sum()),
                temperature if len(drawn) else None,
                after.error() if len(drawn) else None, after.chance(), len(drawn),
            )  # fmt: skip
        return found

    def _logits(self, embeds: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        return self._scale * (np.asarray(embeds, np.float32) @ self._classes.T)


def _add_ranks(bins: ConfidenceBins) -> None:
    bins.counts = sum(gather_objects(bins.counts), np.zeros_like(bins.counts))
