"""Features of patches, and targets, of the pictures of a training step: cached, or computed."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive import distributed
from contrastive.dense.targets import MaskTargets, Targets
from contrastive.image_features import full_batch
from contrastive.run.lock import locked
from contrastive.vision.patch_features import patch_features
from contrastive.vision.tower import VisionTower
from data.cache.patch_tokens import PatchTokenCache
from data.dense.dense_dataset import DenseDataset
from data.dense.picture import AnnotatedPicture
from data.errors import UsageError
from data.files import bytes_digest
from data.problems import BadSample
from data.progress import Progress
from data.shards.identity import Identity, identity

LOOKED_AT = 1000  # pictures, before a set is refused


class PatchSource:
    """Gives pictures by their numbers: features (b, rows, columns, f), and targets.

    A picture is read as a square of the tower's image size, whatever its aspect ratio, and its
    target with it; nothing is cut away. Targets stay in memory once they are read. What cannot be
    used has one that does not count. targets: None makes masks.
    """

    def __init__(
        self, tower: VisionTower, dataset: DenseDataset, targets: Targets | None = None
    ) -> None:
        self.tower, self.dataset = tower, dataset
        self.targets: Targets = targets or MaskTargets()
        self._transform = replace(tower.transform, fit="aspect")
        self._found: dict[int, np.ndarray] = {}
        self._bad: dict[int, str] = {}
        self._cache: PatchTokenCache | None = None
        self._keys = [dataset.pictures.key(row) for row in range(len(dataset))]
        self.fingerprint = bytes_digest(*map(_name_and_size, self._keys))
        """Of the pictures."""

    def check_usable(self) -> None:
        """Raises `UsageError` where no picture, of a large set none of the first, can be used."""
        rows = range(min(len(self.dataset), LOOKED_AT))
        if all(self._load(row) is None for row in rows):
            kinds = ", ".join(f"{kind} {n:,}" for kind, n in Counter(self._bad.values()).items())
            raise UsageError(
                f"{self.dataset.name}: none of the first {len(rows):,} pictures can be trained on "
                f"({kinds}); this decoder needs pictures with {self.targets.what}"
            )

    @torch.no_grad()
    def use_cache(self, folder: str, patch_sizes: Sequence[int]) -> None:
        """Read features from a folder, first computing what it lacks; ranks share the pictures.

        Raises `UsageError` as `PatchTokenCache`, and for a picture that is another by now.
        """
        made_of = {"tower": self.tower.fingerprint, "pictures": self.fingerprint}
        self._cache = cache = PatchTokenCache(folder, made_of)
        distributed.from_main(lambda: cache.check_pictures(self._keys))
        if distributed.from_main(lambda: cache.missing(patch_sizes)):
            with locked(cache.folder):
                self._fill(cache, distributed.from_main(lambda: cache.missing(patch_sizes)))

    @torch.no_grad()
    def __call__(
        self, rows: Int[np.ndarray, " b"], patch_size: int
    ) -> tuple[Float[Tensor, "b r c f"], Tensor, dict[str, int]]:
        """Features, targets, and how many pictures cannot be used, by the reason."""
        device = distributed.device()
        if self._cache is None:
            features = self._compute([self._load(int(row)) for row in rows], patch_size)
        else:
            kept = self._cache.read(patch_size, rows)
            features = torch.from_numpy(kept).to(device, torch.float32, non_blocking=True)
        for row in rows:
            if int(row) not in self._found:
                self._load(int(row))
        targets = torch.from_numpy(self.targets.stack([self._found[int(row)] for row in rows]))
        errors = Counter(self._bad[int(row)] for row in rows if int(row) in self._bad)
        return features, targets.to(device), dict(errors)

    def _load(self, row: int) -> AnnotatedPicture | None:
        """The picture, its target being kept; None where it cannot be used."""
        side = self.tower.image_size
        try:
            picture = self.dataset.pictures.load(row)
            self._found[row] = self.targets.of(picture, side)
        except BadSample as bad:
            self._bad[row] = bad.kind
            self._found[row] = self.targets.of_unusable(side)
            return None
        return picture

    def _compute(
        self, pictures: Sequence[AnnotatedPicture | None], patch_size: int
    ) -> Float[Tensor, "b r c f"]:
        """Zeros for None."""
        side, device = self.tower.image_size, distributed.device()
        pixels = torch.zeros(len(pictures), 3, side, side, dtype=torch.uint8)
        for slot, picture in enumerate(pictures):
            if picture is not None:
                pixels[slot] = self._transform.at(picture.image, side, side)
        parts = pixels.split(full_batch(self.tower.num_tokens(patch_size), device))
        found = [
            patch_features(self.tower, self._transform.normalise(part.to(device)), patch_size)
            for part in parts
        ]
        return torch.cat(found)

    def _fill(self, cache: PatchTokenCache, missing: Sequence[int]) -> None:
        count, side = len(self.dataset), self.tower.image_size
        if distributed.is_main():
            cache.claim()
            for size in missing:
                grid = (side // size, side // size)
                cache.begin(size, (count, *grid, self.tower.embed_dim))
        distributed.barrier()
        own = range(distributed.rank(), count, distributed.world_size())
        together = full_batch(self.tower.num_tokens(min(missing)), distributed.device())
        noted: dict[int, Identity] = {}
        what = f"features of patches at patch {', '.join(map(str, missing))}"
        with Progress(
            total=len(own), desc=what, unit="img", disable=not distributed.is_main()
        ) as bar:
            for start in range(0, len(own), together):
                rows = own[start : start + together]
                noted |= {row: _identity(self._keys[row]) for row in rows}
                pictures = [self._load(row) for row in rows]
                for size in missing:
                    features = self._compute(pictures, size).half().cpu().numpy()
                    cache.write(size, rows, features)
                bar.update(len(rows))
        distributed.barrier(patient=True)
        for others in distributed.gather_objects(noted):
            noted |= others
        if distributed.is_main():
            cache.note_pictures([noted[row] for row in range(count)])
            for size in missing:
                cache.finish(size)
        distributed.barrier()


def _name_and_size(key: str) -> bytes:
    """Of a picture's file: in another place of the disk it is the same."""
    size = os.path.getsize(key) if os.path.isfile(key) else 0
    return f"{Path(key).name}\0{size}\0".encode()


def _identity(key: str) -> Identity:
    """Nothing of a file that cannot be read, which is skipped as a picture."""
    try:
        return identity(key) if os.path.isfile(key) else {}
    except OSError:
        return {}
