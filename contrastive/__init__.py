"""The model and its training: a flexible locked image tower, and a text tower that reads it."""

from contrastive.flexi import resample_patch_embed
from contrastive.lit import LitModel
from contrastive.vision import VisionTower, load_vision_tower

__all__ = ["LitModel", "VisionTower", "load_vision_tower", "resample_patch_embed"]
