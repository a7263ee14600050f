"""Losses of decoders: sums over a micro-batch, and how much of it counts.

Both are summed over micro-batches and ranks before one is divided by the other, so that neither
changes the gradient.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from contrastive.dense.box_heads import BoxHeads, Detections
from contrastive.dense.targets import UNUSABLE
from data.dense.picture import IGNORED

ALPHA, GAMMA = 0.3, 2.0
"""Of the focal loss, as OWL-ViT has them (arXiv:2205.06230, section A1.3)."""
EXCUSED = 0.5  # share of a found box in a crowd, from which it is not judged


class MaskLoss(nn.Module):
    """Cross-entropy of logits, resized bilinearly to the masks."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, features: Float[Tensor, "b r c f"], masks: UInt8[Tensor, "b h w"]
    ) -> Float[Tensor, ""]:
        """The sum over what is counted."""
        logits = self.decoder(features).float()
        logits = F.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="sum")

    @staticmethod
    def count(masks: UInt8[Tensor, "b h w"]) -> Int[Tensor, ""]:
        """Pixels that are counted."""
        return (masks != IGNORED).sum()


class BoxLoss(nn.Module):
    """OWL-ViT's loss of sets (arXiv:2205.06230, section A1.3): after a one-to-one matching of
    patches and true boxes, the focal loss of all logits, and of matched boxes the L1 distance and
    the generalised IoU, equally weighted.

    A patch that is matched to no box is of none of the classes. A crowd is matched to nothing, and
    what is found in it is not judged, as COCO's evaluation has it.
    """

    class_embeds: Tensor

    def __init__(self, decoder: BoxHeads, class_embeds: Float[Tensor, "k d"]) -> None:
        """class_embeds: of the labels 1, 2, ..., unit norm: constants, in no checkpoint."""
        super().__init__()
        self.decoder = decoder
        self.register_buffer("class_embeds", class_embeds, persistent=False)

    def forward(
        self, features: Float[Tensor, "b r c f"], boxes: Float[Tensor, "b m 6"]
    ) -> Float[Tensor, ""]:
        """The sum over true boxes. boxes: as `BoxTargets` stacks them."""
        from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

        found: Detections = self.decoder(features, self.class_embeds)
        labels, is_crowd, true = boxes[..., 0].long(), boxes[..., 1] > 0, boxes[..., 2:]
        wanted = torch.zeros_like(found.logits)
        judged = (labels[:, :1] != UNUSABLE)[..., None].expand_as(wanted).clone()
        total = found.boxes.new_zeros(())
        for one in range(len(boxes)):
            things = torch.nonzero((labels[one] > 0) & ~is_crowd[one])[:, 0]
            crowds = torch.nonzero((labels[one] > 0) & is_crowd[one])[:, 0]
            classes = labels[one, things] - 1
            seen = Detections(found.logits[one : one + 1], found.boxes[one : one + 1])
            patches, chosen = match(seen, classes, true[one, things])
            if len(crowds):
                excused = _within(corners(found.boxes[one]), corners(true[one, crowds]))
                judged[one][:, labels[one, crowds] - 1] &= ~excused
                judged[one, patches] = True
            wanted[one, patches, classes[chosen]] = 1
            own, theirs = found.boxes[one, patches], true[one, things][chosen]
            total = total + (own - theirs).abs().sum()
            total = total + generalized_box_iou_loss(corners(own), corners(theirs), "sum")
        focal = sigmoid_focal_loss(found.logits, wanted, ALPHA, GAMMA)
        return total + (focal * judged).sum()

    @staticmethod
    def count(boxes: Float[Tensor, "b m 6"]) -> Int[Tensor, ""]:
        """True boxes that are to be found."""
        return ((boxes[..., 0] > 0) & (boxes[..., 1] == 0)).sum()


@torch.no_grad()
def match(
    found: Detections, classes: Int[Tensor, " m"], true: Float[Tensor, "m 4"]
) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """Which patch finds which true box of one picture: (patches, numbers of boxes), the pairs of
    least cost in sum (the Hungarian algorithm, as DETR has it, arXiv:2005.12872, section 3.1); of
    more boxes than patches some are found by none.

    found: of one picture. classes: of the true boxes, from 0.
    """
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import generalized_box_iou

    logits, boxes = found.logits[0][:, classes], found.boxes[0]
    chance = logits.sigmoid()
    # the focal loss of finding the class, less that of not finding it (Deformable DETR's cost)
    right = ALPHA * (1 - chance) ** GAMMA * F.softplus(-logits)
    wrong = (1 - ALPHA) * chance**GAMMA * F.softplus(logits)
    apart = torch.cdist(boxes, true, p=1)
    cost = right - wrong + apart - generalized_box_iou(corners(boxes), corners(true))
    patches, numbers = linear_sum_assignment(cost.cpu().numpy())
    place = boxes.device
    return torch.as_tensor(patches, device=place), torch.as_tensor(numbers, device=place)


def corners(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Left, top, right and bottom, of middles and sizes."""
    from torchvision.ops import box_convert

    return box_convert(boxes, "cxcywh", "xyxy")


def _within(found: Float[Tensor, "n 4"], crowds: Float[Tensor, "m 4"]) -> Bool[Tensor, "n m"]:
    """Whether each found box lies in each crowd, for the most part."""
    low = torch.maximum(found[:, None, :2], crowds[None, :, :2])
    high = torch.minimum(found[:, None, 2:], crowds[None, :, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    return both >= EXCUSED * (found[:, 2:] - found[:, :2]).prod(-1)[:, None]
