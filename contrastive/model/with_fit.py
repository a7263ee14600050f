"""A model that reads images by another fit, beside the one that it is made of."""

import copy

from contrastive.model.lit import LitModel
from contrastive.model.shaped import check_reads_shapes
from data.transform import Fit


def with_fit(model: LitModel, fit: Fit | None) -> LitModel:
    """`model` where it reads by `fit` (None: whatever it reads by), else another with the same
    weights, which take no memory twice.

    Raises `UsageError` for aspect, where the tower reads squares alone.
    """
    if fit is None or fit == model.transform.fit:
        return model
    if fit == "aspect":
        check_reads_shapes(model.vision)
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.vision = copy.copy(model.vision).use_transform(fit=fit)
    return other
