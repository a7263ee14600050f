"""Export a model at one patch size for other libraries.

    python launch/export.py --model runs/demo/model --to open_clip --patch-size 28 --out exported

then `open_clip.create_model_and_transforms("local-dir:exported")`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from contrastive.export.config import ModelFormat
from contrastive.vision.config import check_tower_spec
from data.errors import UsageError, exit_on_usage_error
from data.files import make_folder
from retrieval.model_folder import check_model_folder


@dataclass(frozen=True)
class Args:
    model: str
    """open_clip:ARCHITECTURE@TAG or @FILE, transformers:FOLDER, or a model's folder; for timm also
    any image tower that training accepts: timm:NAME, ..."""
    to: Literal[ModelFormat, "timm"]
    """The format; timm gets the image tower alone."""
    patch_size: int
    """In pixels; the exported model has this one only."""
    out: str
    """Folder to write; must not exist."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    with exit_on_usage_error(Args):
        out = Path(args.out)
        if out.exists():
            raise UsageError(f"out {args.out} exists; name a new folder")
        hub_name = args.model.count("/") == 1 and not args.model.startswith((".", "/"))
        if args.to != "timm" and not hub_name:
            check_model_folder(args.model)
        make_folder(out.parent)
        if args.to == "timm":
            check_tower_spec(args.model)

        from contrastive import LitModel, load_vision_tower
        from contrastive.export.export_model import export_model
        from contrastive.export.timm import export_timm

        if args.to == "timm":
            export_timm(load_vision_tower(args.model), args.patch_size, out)
            print(f"wrote {args.out}")
        else:
            model = LitModel.from_pretrained(args.model)
            image, text = export_model(model, args.to, args.patch_size, out)
            print(f"wrote {args.out}; least cosine to ours: image {image:.6f}, text {text:.6f}")


if __name__ == "__main__":
    main()
