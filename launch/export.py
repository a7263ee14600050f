"""Write a tower at one patch size for other programs.

    python launch/export.py --model runs/dinov2s/model --to timm --patch-size 28 --out exported

then `timm.create_model("local-dir:exported", pretrained=True)`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from contrastive.export import export_timm
from contrastive.vision import load_vision_tower
from data.errors import UsageError, exit_on_usage_error


@dataclass(frozen=True)
class Args:
    model: str
    """Folder of a model or a tower, or any tower that training accepts: dinov2s, timm:NAME, ..."""
    to: Literal["timm"]
    """The format."""
    patch_size: int
    """Pixels; the exported model knows no other."""
    out: str
    """Folder to write; must not exist."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    with exit_on_usage_error():
        if Path(args.out).exists():
            raise UsageError(f"--out {args.out} exists; name a new folder")
        export_timm(load_vision_tower(args.model), args.patch_size, Path(args.out))
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
