"""From features to embeddings by the one linear map that other libraries have room for."""

from jaxtyping import Float
from torch import Tensor

from contrastive.model.lit import LitModel
from data.errors import UsageError


def image_projection(model: LitModel, to: str) -> Float[Tensor, "f d"]:
    """The matrix from centred features to embeddings that are not yet of unit norm.

    Raises `UsageError` for a head that is no linear map, which `to` cannot express.
    """
    if model.head is None:
        return model.feature_whiten
    if model.head.kind != "linear":
        raise UsageError(
            f"{to} cannot express this model's image head, a gated MLP; allowed: onnx, or a model "
            "with vision.head none or linear"
        )
    return model.feature_whiten + model.feature_whiten @ model.head.out.weight.T


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
