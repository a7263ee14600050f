"""The models that benchmarks/dense.py compares: the same training, over other tokens."""

import shutil
from dataclasses import replace
from pathlib import Path

from contrastive.recipes import default_data, demo
from contrastive.text.config import TextConfig
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from lib.alignment_rows import COARSE_SIZES, TERMS, TOWER
from lib.joined_features import JoinedFeatures


def trained_model(expression: str, seed: int, out: Path) -> Path:
    """The folder of a model; one that is there already is kept.

    The demo's drawings; MiniLM frozen under a trained head, as `demo-large` has it.
    """
    folder = out / "runs" / f"{expression}.{seed}"
    if (folder / "model").exists():
        return folder / "model"
    shards = sorted(map(str, default_data().glob("train/*.tar")))
    features = JoinedFeatures(out, TOWER, TERMS)
    features.add("train", shards, COARSE_SIZES)
    small = demo()
    cfg: TrainConfig = replace(
        small,
        name=folder.name,
        out=str(folder.parent),
        seed=seed,
        steps=400,
        checkpoint_every=0,
        data=replace(
            small.data,
            features=features.cache("train", shards, expression, COARSE_SIZES),
            captions_per_image=4,
            num_workers=1,
        ),
        vision=replace(small.vision, patch_sizes=COARSE_SIZES, features=expression),
        text=TextConfig(tower="minilm", context_length=16, frozen=True, head="mlp"),
        optim=replace(small.optim, lr=1e-3),
    )
    shutil.rmtree(folder, ignore_errors=True)
    train(cfg)
    return folder / "model"
