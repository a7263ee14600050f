"""The table of network families, which tells a tower how to run its network.

A new kind of network is a class in `flexible_families` or `fixed_families`, and a line here.
"""

from typing import Any

from contrastive.vision.fixed_families import (
    CompactTransformer,
    Family,
    OpenClipVisual,
    SegFormerEncoder,
)
from contrastive.vision.flexible_families import (
    ClassLast,
    DistilledViT,
    NaFlex,
    PlainViT,
    Rotary,
)

FAMILIES: tuple[Family, ...] = (
    PlainViT(), DistilledViT(), ClassLast(), Rotary(), NaFlex(),
    SegFormerEncoder(), CompactTransformer(), OpenClipVisual(), Family(),
)  # fmt: skip


def family_of(net: Any) -> Family:
    """The first family that `net` fits."""
    return next(family for family in FAMILIES if family.fits(net))
