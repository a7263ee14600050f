"""What an image tower gives of each patch, as it gives one vector of the whole image.

Where features hold the mean of the patches, each patch takes the mean's place, and what is of the
whole image (a class token) stays: the mean over the patches is the image's own feature, unless the
network's norm follows its pooling. Where they hold none, a patch takes the class token's place, or
is pooled alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.vision.feature_terms import OWN, Term
from contrastive.vision.flexible_families import ClassLast
from contrastive.vision.tower import VisionTower
from data.errors import UsageError


def patch_features(
    tower: VisionTower,
    images: Float[Tensor, "b 3 h w"],
    patch_size: int | None = None,
    value_path: bool = False,
) -> Float[Tensor, "b r c d"]:
    """The features of each patch, float32, in rows and columns; d = `tower.embed_dim`.

    images, patch_size: as `VisionTower.forward` takes them. value_path: in the block that a feature
    is read after, a patch attends to itself alone, so that what comes out is its own value and
    nothing of its surroundings (MaskCLIP, arXiv:2112.01071, section 3.2); the means are then those
    of other tokens than the image's own feature.
    Raises `UsageError` for a tower that has no tokens of patches.
    """
    check_has_patches(tower)
    patch_size = tower.patch_sizes[-1] if patch_size is None else patch_size
    tower.check_patch_size(patch_size, (images.shape[-2], images.shape[-1]))
    images = images.to(next(tower.net.parameters()).dtype)
    grid = (images.shape[-2] // patch_size, images.shape[-1] // patch_size)
    after = _after(tower, images, patch_size, grid)
    prefix = tower.num_prefix_tokens
    means = any(_is_mean(tower, term) for term in tower.terms)
    parts = []
    for term in tower.terms:
        number = term.block or len(tower.net.blocks)
        if means and not _is_mean(tower, term):
            whole = tower.pooled(term, tower.normed(term, after[number]))
            parts.append(whole[:, None].expand(-1, grid[0] * grid[1], -1))
            continue
        patches = after[number][:, prefix:]
        if value_path:
            alone = after[number - 1][:, prefix:].flatten(0, 1)[:, None]
            alone = tower.family.block(tower.net.blocks[number - 1], alone, None, None)
            patches = alone[:, 0].unflatten(0, patches.shape[:2])
        parts.append(_in_place_of_pooled(tower, term, tower.normed(term, patches), prefix))
    return torch.cat(parts, dim=-1).unflatten(1, grid).float()


def has_patches(tower: VisionTower) -> bool:
    """Whether there are tokens of patches to give."""
    last = isinstance(tower.family, ClassLast) and any(t.block is None for t in tower.terms)
    return tower.flexible and not last


def check_has_patches(tower: VisionTower) -> None:
    """Raises `UsageError` as `patch_features`."""
    if not has_patches(tower):
        raise UsageError(
            f"{tower.config.name} (features {tower.config.features}) has no tokens of patches "
            "to give; allowed are ViTs whose class token, mean or pooling reads its patches, and "
            "maps of windows"
        )


def _is_mean(tower: VisionTower, term: Term) -> bool:
    own = term.token == OWN and getattr(tower.net, "global_pool", "") == "avg"
    return term.token == "mean" or own


def _after(
    tower: VisionTower, images: Float[Tensor, "b 3 h w"], patch_size: int, grid: tuple[int, int]
) -> dict[int, Float[Tensor, "b n d"]]:
    """Tokens after each block that a term names, and before it; 0 is before the first."""
    family, net = tower.family, tower.net
    tokens = tower.embed_patches(images, patch_size)
    numbers = tower.needed_blocks | {number - 1 for number in tower.needed_blocks}
    found = family.after(net, tokens, tower.rotary_positions(grid), numbers)
    return found if 0 not in numbers else {0: family.enter(net, tokens), **found}


def _in_place_of_pooled(
    tower: VisionTower, term: Term, patches: Float[Tensor, "b n d"], prefix: int
) -> Float[Tensor, "b n e"]:
    """Each normed patch as it would be were it all that is pooled.

    The network's own pooling reads the patch as often as it expects tokens before the patches, and
    once more: the class token, the mean and what attention finds in one value are all that patch.
    """
    if term.token == OWN:
        repeated = patches.flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
        return tower.pool(repeated).unflatten(0, patches.shape[:2])
    return patches if term.block is not None else tower.norm_after_pooling(patches)
