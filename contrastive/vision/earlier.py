"""Towers go on reading pixels as they did when a cache or a run was begun with them."""

import sys
from collections.abc import Callable
from pathlib import Path

from contrastive import distributed
from contrastive.vision.tower import VisionTower
from data.cache.manifest import Manifest


def keep_transform(
    tower: VisionTower,
    fingerprint: str,
    made: str | Path,
    current_fingerprint: Callable[[], str] | None = None,
) -> bool:
    """Let `tower` read pixels by version 1 of the transform, which cuts out squares, where
    `fingerprint` is of the same tower with that; says so, once. Returns whether it is.

    made: what carries the fingerprint. current_fingerprint: its kind; the tower's own when not
    given. Towers that are named rather than loaded from a folder have had version 2 since 0.2.
    """
    current, fit = tower.config.transform, tower.config.fit
    found = current_fingerprint or (lambda: tower.fingerprint)
    if current == 1 or found() == fingerprint:
        return False
    for earlier in dict.fromkeys((fit, "crop")):
        tower.use_transform(1, earlier)
        if found() == fingerprint:
            break
    else:
        tower.use_transform(current, fit)
        return False
    if distributed.is_main():
        print(
            f"{made} was begun with images resized by Pillow, and goes on with them (version 1 of "
            "the transform)",
            file=sys.stderr,
            flush=True,
        )
    return True


def keep_cached_transform(tower: VisionTower, folder: str) -> bool:
    """`keep_transform` for a folder of features, "" for none. Raises `UsageError` for a damaged
    manifest."""
    manifest = Manifest.read(Path(folder)) if folder else None
    return manifest is not None and keep_transform(tower, manifest.image_fingerprint, folder)
