"""A tower as its difference from another one that is at hand: what a small change weighs.

    python -m contrastive.vision.delta runs/dinov2s/model dinov2s changed.safetensors

The file holds, in float16, the difference of each parameter that changed, and in its metadata what
`TowerConfig` says, where the rest comes from, and the digest of the rest.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from contrastive.vision.load import TowerConfig, VisionTower, build_vision_tower, load_vision_tower
from data.errors import UsageError, exit_on_usage_error


def save_delta(tower: VisionTower, base: VisionTower, base_spec: str, file: str | Path) -> int:
    """Write what turns `base` into `tower`, up to float16's rounding of the difference.

    base_spec: what `load_vision_tower` loads `base` by. Returns the file's bytes. Raises
    `UsageError` where the two have other shapes, or a projection (`TowerConfig`), a difference is
    no number of float16, or the file cannot be written.
    """
    old, new = base.net.state_dict(), tower.net.state_dict()
    if base.config.projection:
        raise UsageError(f"{base_spec} ends in a projection, which a difference leaves out")
    if {k: v.shape for k, v in old.items()} != {k: v.shape for k, v in new.items()}:
        raise UsageError(f"{base_spec} has other parameters; a difference needs the same ones")
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
        save_file(changed, file, facts)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be written: {error}") from error
    return Path(file).stat().st_size


def apply_delta(base: VisionTower, file: str | Path) -> VisionTower:
    """The tower that `save_delta` was given. Raises `UsageError` for a file of another base."""
    try:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
            changed = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        config = TowerConfig.from_json(json.loads(facts["vision"]))
        spec, digest = facts["base"], facts["base_weights"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is no difference of towers: {error}") from error
    weights = base.net.state_dict()
    strange = [n for n, d in changed.items() if n not in weights or weights[n].shape != d.shape]
    if strange:
        raise UsageError(f"{file} changes {strange[0]}, which the base does not have")
    if digest != base.made_of["weights"]:
        raise UsageError(f"{file} is the difference from another tower; expected the base {spec}")
    tower = build_vision_tower(config)
    tower.net.load_state_dict(
        {n: w + changed[n].to(w.dtype) if n in changed else w for n, w in weights.items()}
    )
    return tower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tower", help="a tower folder")
    parser.add_argument("base", help="the tower it was made from")
    parser.add_argument("file", help="what to write")
    args = parser.parse_args()
    with exit_on_usage_error():
        tower, base = load_vision_tower(args.tower), load_vision_tower(args.base)
        size = save_delta(tower, base, args.base, args.file)
        print(f"{args.file}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
