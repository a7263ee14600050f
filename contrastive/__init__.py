"""The model and its training: a flexible locked image tower, and a text tower that reads it.

The public names load on first use, so that importing a configuration loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contrastive.model.lit import LitModel
    from contrastive.vision.load import load_vision_tower
    from contrastive.vision.resize import resample_patch_embed
    from contrastive.vision.tower import VisionTower

_HOME = {
    "LitModel": "contrastive.model.lit",
    "VisionTower": "contrastive.vision.tower",
    "load_vision_tower": "contrastive.vision.load",
    "resample_patch_embed": "contrastive.vision.resize",
}

__all__ = ["LitModel", "VisionTower", "load_vision_tower", "resample_patch_embed"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
