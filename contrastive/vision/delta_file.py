"""A tower stored as its difference from another one.

The file holds, in float16, the difference of each parameter that changed; in its metadata, the
tower's `TowerConfig`, and the spec and the digest of the weights of the base that it is added to.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from contrastive.files.weights import read_sealed_tensors, sealed_tensors
from contrastive.vision.build import build_vision_tower
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError
from data.files import write_atomically


def save_delta(tower: VisionTower, base: VisionTower, base_spec: str, file: str | Path) -> int:
    """Write the file from which `apply_delta` makes `tower` out of `base`; differences are rounded
    to float16.

    base_spec: what `load_vision_tower` loads `base` by. Returns the file's size in bytes. Raises
    `UsageError` where the towers' parameters differ in name or shape, where the base ends in a
    projection, where float16 cannot hold a difference, or where the file cannot be written.
    """
    old, new = base.net.state_dict(), tower.net.state_dict()
    if base.config.projection:
        raise UsageError(f"{base_spec} ends in a projection, which such a file does not hold")
    if {k: v.shape for k, v in old.items()} != {k: v.shape for k, v in new.items()}:
        raise UsageError(f"{base_spec} has other parameters than this tower; the same are needed")
    changed = {
        name: (new[name].float() - weight.float()).half().contiguous()
        for name, weight in old.items()
        if not torch.equal(new[name], weight)
    }
    for name, difference in changed.items():
        if not difference.isfinite().all():
            raise UsageError(f"{name} differs by nan or by more than float16 holds, 65504")
    facts = {
        "format": "1",
        "base": base_spec,
        "base_weights": base.made_of["weights"],
        "vision": json.dumps(tower.describe()),
    }
    try:
        file = Path(file).parent.resolve(strict=True) / Path(file).name
        write_atomically(file, lambda out: out.write(sealed_tensors(changed, facts)))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be written: {error}") from error
    return Path(file).stat().st_size


def apply_delta(base: VisionTower, file: str | Path) -> VisionTower:
    """The tower that `save_delta` was given; `UsageError` for a file made from another base."""
    try:
        changed, facts = read_sealed_tensors(Path(file))
        config = TowerConfig.from_json(json.loads(facts["vision"]))
        spec, digest = facts["base"], facts["base_weights"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is not a file of save_delta: {error}") from error
    weights = base.net.state_dict()
    unknown = [n for n, d in changed.items() if n not in weights or weights[n].shape != d.shape]
    if unknown:
        raise UsageError(f"{file} changes {unknown[0]}, which the base does not have")
    if digest != base.made_of["weights"]:
        raise UsageError(f"{file} was made from other weights; it can only be added to {spec}")
    tower = build_vision_tower(config)
    tower.net.load_state_dict(
        {n: w + changed[n].to(w.dtype) if n in changed else w for n, w in weights.items()}
    )
    return tower
