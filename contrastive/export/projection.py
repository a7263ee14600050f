"""From features to embeddings by the one linear map that other libraries have room for."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.model.lit import LitModel
from data.errors import UsageError


@torch.no_grad()
def affine(model: LitModel) -> tuple[Float[Tensor, " w"], Float[Tensor, "w d"]]:
    """What follows `timm_net(..., projected=True)`: a mean to take off and a matrix, of the model's
    own affine and of its tower's projection.

    Raises `UsageError` where no mean before the projection gives the one after it.
    """
    mean, whiten, projection = model.feature_mean, model.feature_whiten, model.vision.projection
    if not isinstance(projection, nn.Linear):
        return mean, whiten
    weight = projection.weight.float()
    before = torch.linalg.pinv(weight) @ mean
    if not torch.allclose(weight @ before, mean, atol=1e-4 * float(mean.abs().max() + 1e-9)):
        raise UsageError(
            f"{model.vision.config.name} widens its features by a projection, and then takes a "
            "mean off, which no export expresses; allowed: a mean of zero (init_samples 0)"
        )
    return before, weight.T @ whiten


def image_projection(model: LitModel, to: str) -> tuple[Float[Tensor, " w"], Float[Tensor, "w d"]]:
    """`affine` with a linear head behind it: to embeddings that are not yet of unit norm.

    Raises `UsageError` for a head that is no linear map, which `to` cannot express.
    """
    mean, whiten = affine(model)
    if model.head is None:
        return mean, whiten
    if model.head.kind != "linear":
        raise UsageError(
            f"{to} cannot express this model's image head, a gated MLP; allowed: onnx, or a model "
            "with vision.head none or linear"
        )
    return mean, whiten + whiten @ model.head.out.weight.T


def text_projection(model: LitModel, to: str) -> Float[Tensor, "d w"]:
    """The matrix from the text tower's vectors to embeddings that are not yet of unit norm.

    Raises `UsageError` for a head, which `to` cannot express.
    """
    if model.text.encoder.head is not None:
        raise UsageError(
            f"{to} cannot express this model's text head, a gated MLP; allowed: onnx, or a model "
            "with text.head none"
        )
    return model.text.encoder.projection.weight
