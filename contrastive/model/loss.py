"""The two contrastive losses against constant image features, for one micro-batch of texts.

All B image embeddings of the global batch are known before a text is read, and are constants: the
tower is locked. So a loss needs only m of the texts, and the sum over micro-batches (and ranks) is
the global loss, exactly. Each function returns the m texts' share of the *mean* loss over the B
pairs; shares add up. The maths is free of collectives.

`targets[i, j]` is the share of image i in the positives of text j: 1 for its own image, or 1/n for
each of n images that carry the same caption. Columns sum to 1.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Reduce = Callable[[Float[Tensor, " b"]], Float[Tensor, " b"]]


def pair_targets(
    num_images: int,
    own_image: Int[Tensor, " m"],
    concepts: Int[Tensor, " b"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b m"]:
    """Targets of m texts whose own images stand at rows `own_image` of the global batch.

    With `concepts` (one id per image, equal ids = equal captions) every image of the text's concept
    is a positive.
    """
    if concepts is None:
        targets = torch.zeros(num_images, len(own_image), dtype=dtype, device=own_image.device)
        targets[own_image, torch.arange(len(own_image), device=own_image.device)] = 1
        return targets
    same = (concepts[:, None] == concepts[own_image][None, :]).to(dtype)
    return same / same.sum(dim=0, keepdim=True)


def sigmoid_loss(
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "m d"],
    targets: Float[Tensor, "b m"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """SigLIP's loss (Zhai et al., arXiv:2303.15343, equation 1), the share of m texts.

    logit_scale is the multiplier t itself, not its logarithm. Embeddings have unit norm.
    """
    logits = logit_scale * image_embeds @ text_embeds.T + logit_bias
    signs = torch.where(targets > 0, 1.0, -1.0)
    return -F.logsigmoid(signs * logits).sum() / len(image_embeds)


def softmax_loss(
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "m d"],
    targets: Float[Tensor, "b m"],
    logit_scale: Float[Tensor, ""],
    reduce_lse: Reduce = lambda partial: partial,
) -> Float[Tensor, ""]:
    """CLIP's symmetric cross-entropy (Radford et al., arXiv:2103.00020), the share of m texts.

    Text to image is local to each text. Image to text needs, per image, the logsumexp over all
    texts: `reduce_lse` gets that over these m texts (B numbers, no gradient) and returns that over
    all. The gradient of `sum_i exp(m_i - LSE_i)`, with m_i the part of these texts and LSE_i
    constant, is the exact gradient of `sum_i LSE_i` with respect to these texts.
    """
    logits = logit_scale * image_embeds @ text_embeds.T
    text_to_image = torch.logsumexp(logits, dim=0).sum()
    partial = torch.logsumexp(logits, dim=1)
    total = reduce_lse(partial.detach())
    share = torch.exp(partial - total).sum()  # of each image's softmax mass; 1 over all texts
    value = (torch.exp(partial.detach() - total) * total).sum()
    image_to_text = value + share - share.detach()  # value of the loss, gradient of the share
    positives = (targets * logits).sum()
    return (text_to_image + image_to_text - 2 * positives) / (2 * len(image_embeds))


def loss_share(
    kind: Literal["sigmoid", "softmax"],
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "m d"],
    targets: Float[Tensor, "b m"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""] | None,
    reduce_lse: Reduce = lambda partial: partial,
) -> Float[Tensor, ""]:
    """The share of m texts in either loss; the bias is for sigmoid, `reduce_lse` for softmax."""
    if kind == "softmax":
        return softmax_loss(image_embeds, text_embeds, targets, logit_scale, reduce_lse)
    assert logit_bias is not None
    return sigmoid_loss(image_embeds, text_embeds, targets, logit_scale, logit_bias)


def partial_lse(
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "m d"],
    logit_scale: Float[Tensor, ""],
) -> Float[Tensor, " b"]:
    """Per image, the logsumexp over m texts, which the first of two passes collects."""
    return torch.logsumexp(logit_scale * image_embeds @ text_embeds.T, dim=1)
