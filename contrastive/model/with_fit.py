"""A model that reads images by another fit, beside the one that it is made of."""

import copy

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.transform import Fit


def with_fit(model: LitModel, fit: Fit | None) -> LitModel:
    """`model` where it reads by `fit` (None: whatever it reads by), else another with the same
    weights, which take no memory twice.

    Raises `UsageError` for aspect, where the tower reads squares alone.
    """
    if fit is None or fit == model.transform.fit:
        return model
    tower = model.vision
    if fit == "aspect" and not tower.flexible:
        raise UsageError(
            f"fit aspect: {tower.config.name} reads squares of {tower.image_size} px at patch size "
            f"{tower.patch_sizes[0]} alone; allowed: crop, squash"
        )
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.vision = copy.copy(tower).use_transform(fit=fit)
    return other
