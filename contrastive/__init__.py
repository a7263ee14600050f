"""The model and its training: a flexible locked image tower, and a text tower that reads it."""

from contrastive.model.lit import LitModel
from contrastive.vision.load import load_vision_tower
from contrastive.vision.resize import resample_patch_embed
from contrastive.vision.tower import VisionTower

__all__ = ["LitModel", "VisionTower", "load_vision_tower", "resample_patch_embed"]
