"""The two contrastive losses against known image embeddings, for one micro-batch of texts.

All B image embeddings of the global batch are known before a text is read. So a loss needs only m
of the texts, and the sum over micro-batches (and ranks) is the global loss, exactly. `loss_share`
returns the m texts' share of the *mean* loss over the B pairs; shares add up. The maths is free of
collectives.

Texts, scale and bias take a gradient, and a share and its gradients are computed together, in one
pass over tiles of images: no more than a tile of the B x m logits is ever in memory. The products
are in the images' precision, sums in the texts'. Where a head is trained over the images, the
gradient with respect to their embeddings adds up over micro-batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

TILE = {"cpu": 2**18, "cuda": 2**23}  # logits at once: what a CPU's cache holds, what fills a GPU

Logsumexps = tuple[Float[Tensor, " b"], Float[Tensor, " m"]]
"""Of each image's logits over texts, and of each text's over images."""


@dataclass(frozen=True)
class Positives:
    """Image i and text j are a positive pair where their labels are equal.

    Labels are rows of the global batch, or concepts, which are equal where captions are equal.
    """

    images: Int[Tensor, " b"]
    texts: Int[Tensor, " m"]
    texts_of: Int[Tensor, " b"] | None = None
    """How many of all micro-batches' texts are positives of each image. None: as many as images
    with its label, where each image has one text."""
    num_texts: int = 0
    """Of all micro-batches; 0: as many as images."""

    def among(self, rows: slice) -> Bool[Tensor, "rows m"]:
        """Which pairs of these images are positive."""
        return self.images[rows, None] == self.texts

    def targets(
        self, rows: slice, counts: Float[Tensor, " m"], per_text: float
    ) -> Float[Tensor, "rows m"]:
        """Softmax: the share of each pair among an image's texts, and `per_text` times that among
        a text's images. counts: of positive images of each text."""
        if self.texts_of is None:  # both shares are the same
            return self.among(rows) * (2 / counts)
        shares = 1 / self.texts_of[rows, None].to(counts.dtype) + per_text / counts
        return self.among(rows) * shares

    def counts(self) -> Int[Tensor, " m"]:
        """How many positive images each text has."""
        ordered = self.images.sort().values
        first, last = (torch.searchsorted(ordered, self.texts, side=s) for s in ("left", "right"))
        return last - first


def loss_share(
    kind: Literal["sigmoid", "softmax"],
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "m d"],
    positives: Positives,
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""] | None,
    lse: Logsumexps | None = None,
    image_slopes: Float[Tensor, "b d"] | None = None,
) -> Float[Tensor, ""]:
    """The share of m texts in either loss; the bias is for sigmoid, `lse` for softmax.

    image_embeds: of unit norm, in the precision of the products; autograd gives them no gradient.
    logit_scale: the multiplier t itself, not its logarithm.
    lse: over *all* texts, per image, and over all images, per text. Not given: these m are all.
    image_slopes: in the texts' precision; to it the share's gradient with respect to image_embeds
    is added.
    """
    texts, scale = text_embeds.detach(), logit_scale.detach()
    with torch.no_grad(), torch.autocast(texts.device.type, enabled=False):
        if kind == "softmax":
            lse = lse or logsumexps(image_embeds, texts, scale)
            value, slopes = _softmax(image_embeds, texts, scale, positives, lse, image_slopes)
        else:
            assert logit_bias is not None
            bias = logit_bias.detach()
            value, slopes = _sigmoid(image_embeds, texts, scale, bias, positives, image_slopes)
    parameters = (text_embeds, logit_scale, logit_bias)
    return _WithGradients.apply(value, slopes, *parameters[: len(slopes)])


@torch.no_grad()
def logsumexps(
    image_embeds: Float[Tensor, "b d"],
    text_embeds: Float[Tensor, "m d"],
    logit_scale: Float[Tensor, ""],
) -> Logsumexps:
    """Over these m texts, per image, and over the images, per text; without gradient."""
    over_texts = []
    over_images = torch.full_like(text_embeds[:, 0], -torch.inf)
    for _, _, logits in _tiles(image_embeds, text_embeds, logit_scale):
        over_texts.append(logits.logsumexp(1))
        over_images = torch.logaddexp(over_images, logits.logsumexp(0))
    return torch.cat(over_texts), over_images


def _sigmoid(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "m d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    positives: Positives,
    image_slopes: Float[Tensor, "b d"] | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """SigLIP's loss (Zhai et al., arXiv:2303.15343, equation 1), and its gradients.

    The mean over texts of the sum over images: of several texts of an image, each weighs the same.
    """
    b = positives.num_texts or len(images)
    value, bias_slope = torch.zeros_like(scale), torch.zeros_like(bias)
    pull = torch.zeros_like(texts)  # sum over images of d loss / d logit, times the image
    for rows, part, logits in _tiles(images, texts, scale):
        logits += bias
        is_pair = positives.among(rows)
        margins = torch.where(is_pair, logits, -logits)
        value -= F.logsigmoid(margins).sum()
        slopes = torch.sigmoid(margins.neg_())
        slopes = torch.where(is_pair, -slopes, slopes)
        bias_slope += slopes.sum()
        pull += _product(slopes.T, part)
        if image_slopes is not None:
            image_slopes[rows] += _product(slopes, texts.to(part.dtype)).mul_(scale / b)
    return value / b, (pull * (scale / b), (pull * texts).sum() / b, bias_slope / b)


def _softmax(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "m d"],
    scale: Float[Tensor, ""],
    positives: Positives,
    lse: Logsumexps,
    image_slopes: Float[Tensor, "b d"] | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """CLIP's symmetric cross-entropy (Radford et al., arXiv:2103.00020), and its gradients.

    Text to image is local to each text. Image to text needs, per image, the logsumexp over all
    texts, of which each of these texts takes its part. Both directions are means, over texts and
    over images, and the positives of a text or an image count in equal shares (SupCon's L_out,
    Khosla et al., arXiv:2004.11362).
    """
    over_texts, over_images = lse
    b = 2 * len(images)
    per_text = len(images) / (positives.num_texts or len(images))
    value = over_images.sum() * per_text
    counts = positives.counts().to(texts.dtype)
    pull = torch.zeros_like(texts)
    for rows, part, logits in _tiles(images, texts, scale):
        total = over_texts[rows, None]
        slopes = torch.exp(logits - total)  # of each image's softmax over texts
        value += (slopes.sum(1, keepdim=True) * total).sum()
        targets = positives.targets(rows, counts, per_text)
        value -= (targets * logits).sum()
        slopes.add_(torch.exp(logits - over_images), alpha=per_text)
        slopes -= targets
        pull += _product(slopes.T, part)
        if image_slopes is not None:
            image_slopes[rows] += _product(slopes, texts.to(part.dtype)).mul_(scale / b)
    return value / b, (pull * (scale / b), (pull * texts).sum() / b)


def _tiles(
    images: Float[Tensor, "b d"], texts: Float[Tensor, "m d"], scale: Float[Tensor, ""]
) -> Iterator[tuple[slice, Float[Tensor, "rows d"], Float[Tensor, "rows m"]]]:
    """Some images at a time: which, their embeddings, and their logits without bias."""
    columns = texts.to(images.dtype).T
    size = max(1, TILE[images.device.type] // len(texts))
    for first in range(0, len(images), size):
        rows = slice(first, first + size)
        yield rows, images[rows], _product(images[rows], columns).mul_(scale)


def _product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """a b in the lower of both precisions, its sums and result in float32 at least."""
    if a.dtype == b.dtype and a.dtype != torch.bfloat16:
        return a @ b
    if not a.is_cuda:  # CPUs round the result, too
        return a.float() @ b.float()
    return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(above[0] * gradient for gradient in ctx.saved_tensors)
