"""Where the teacher is the image tower of a whole model, so is the student: with the model's own
texts, which learn nothing new."""

import json
from pathlib import Path

from contrastive.flexify.config import FlexifyConfig
from contrastive.model.lit import LitModel
from contrastive.vision.config import is_library_spec
from contrastive.vision.feature_terms import OWN
from data.errors import UsageError
from data.progress import say_once


def teachers_model(cfg: FlexifyConfig) -> LitModel | None:
    """The model that the teacher is a part of; None where it is none, or where the student does not
    learn the teacher's features, and so not the space of its texts."""
    spec = cfg.teacher.tower
    if not cfg.loss.features or cfg.teacher.features != OWN:
        return None
    if is_library_spec(spec):
        try:
            return LitModel.from_pretrained(spec)
        except UsageError as error:
            say_once(f"the result is an image tower alone: {error}")
            return None
    return LitModel.from_pretrained(spec) if _has_texts(Path(spec)) else None


def _has_texts(folder: Path) -> bool:
    try:
        return "text" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
