"""A tower that gives other tokens of other blocks than its own."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from contrastive.vision.build import build_vision_tower
from contrastive.vision.feature_terms import OWN, Term, resolve_features
from contrastive.vision.tower import VisionTower
from data.errors import UsageError

POOLING = {"cls": "token", "mean": "avg"}  # timm's names


def select_features(tower: VisionTower, expression: str) -> VisionTower:
    """`tower` with these features; itself for "own".

    A plain ViT is cut after the last block that is needed, and one vector of one block becomes the
    cut network's own pooling, which every export and every training takes like any other ViT.
    Raises `UsageError` for what the tower does not have.
    """
    if expression == OWN:
        return tower
    net, family = tower.net, tower.family
    num_blocks = len(net.blocks) if tower.flexible else 0
    terms = resolve_features(expression, num_blocks, family.terms(net), tower.config.name)
    changes: dict[str, Any] = {"features": "+".join(map(str, terms))}
    if Term(OWN) not in terms:
        changes["projection"] = 0
    if not tower.is_plain_vit:
        return _carry_over(
            tower, VisionTower(net, replace(tower.config, **changes)), net.state_dict()
        )
    depth = max(term.block or num_blocks for term in terms)
    args: dict[str, Any] = {"depth": depth} if depth < num_blocks else {}
    weights = {name: value for name, value in net.state_dict().items() if _within(name, depth)}
    if Term(OWN) in terms and tower.config.features != OWN:
        raise UsageError(
            f"features {expression!r}: {tower.config.name} was saved with the features "
            f"{tower.config.features}; allowed: own alone, or cls and mean of blocks"
        )
    if len(terms) == 1 and terms[0].token != OWN and _ends_in_layer_norm(net):
        changes["features"] = OWN
        args |= {"global_pool": POOLING[terms[0].token], "fc_norm": False, "num_classes": 0}
        if getattr(net, "pool_include_prefix", False):
            args["pool_include_prefix"] = False
        if terms[0] == Term("mean") and "fc_norm.weight" in weights:
            args["fc_norm"] = True
        width = tower.width if terms[0].block is not None else 0
        weights = _one_pooling(weights, width, "fc_norm" if args["fc_norm"] else "norm")
    if args:
        config = replace(tower.config, args={**tower.config.args, **args}, **changes)
        return _carry_over(tower, build_vision_tower(config), weights)
    return _carry_over(tower, VisionTower(net, replace(tower.config, **changes)), weights)


def _ends_in_layer_norm(net: Any) -> bool:
    """Whether a layer norm with weights stands before or after the pooling."""
    norms = (net.norm, net.fc_norm)
    return any(isinstance(n, nn.LayerNorm) and n.bias is not None for n in norms)


def _within(name: str, depth: int) -> bool:
    parts = name.split(".")
    return parts[0] != "blocks" or int(parts[1]) < depth


def _one_pooling(weights: dict[str, Tensor], plain: int, norm: str) -> dict[str, Tensor]:
    """Weights without a class head or attention pooling, and with one norm after the blocks.

    plain: one that has no weights, of so many dimensions; 0: the network's own. norm: its name.
    """
    parts = ("head", "attn_pool", "norm", "fc_norm")
    out = {k: v for k, v in weights.items() if k.split(".")[0] not in parts}
    for end, value in (("weight", 1.0), ("bias", 0.0)):
        own = weights.get(f"norm.{end}", weights.get(f"fc_norm.{end}"))
        if plain:
            out[f"{norm}.{end}"] = torch.full((plain,), value)
        elif own is not None:
            out[f"{norm}.{end}"] = own
    return out


def _carry_over(old: VisionTower, new: VisionTower, weights: dict[str, Tensor]) -> VisionTower:
    if new.net is not old.net:
        new.net.load_state_dict(weights)
    if isinstance(new.projection, nn.Linear):
        new.projection.load_state_dict(old.projection.state_dict())
    new.to(next(old.parameters()))
    return new.lock() if old.locked else new.train(old.training)
