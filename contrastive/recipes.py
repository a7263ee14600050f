"""Experiments: each is a function that returns its whole configuration.

deepspeed launch/lit.py                  # the default: `demo`
deepspeed launch/lit.py cc12m --data.shards '/data/cc12m/{00000..01242}.tar'
deepspeed launch/flexify.py              # the default: `dinov2s`
deepspeed launch/dense.py                # the default: `scenes`
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from contrastive.dense.config import DecoderConfig, DenseConfig, PicturesConfig
from contrastive.flexify.config import (
    AugmentConfig,
    DistillationConfig,
    FlexifyConfig,
    StudentConfig,
    TeacherConfig,
)
from contrastive.model.config import LossConfig
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.run.config_file import Config
from contrastive.text.config import TextConfig
from contrastive.train.config import TrainConfig
from contrastive.vision.config import VisionConfig
from data.config import DataConfig
from data.errors import UsageError


def default_data() -> Path:
    """Where the default drawings are: $FLEXILIT_DATA, or runs/data/emoji."""
    return Path(os.environ.get("FLEXILIT_DATA", "runs/data/emoji"))


def demo() -> TrainConfig:
    """DINOv2-S made flexible, and MiniLM, on 3,945 emoji drawings: minutes on two cores.

    make demo
    """
    data = default_data()
    return TrainConfig(
        name="demo",
        data=DataConfig(shards=(f"{data}/train/*.tar",), features="runs/features"),
        vision=VisionConfig(tower="dinov2s-flexi", patch_sizes=(56, 32, 28, 16), dtype="fastest"),
        text=TextConfig(tower="minilm", context_length=16, dropout=0.1, freeze_embeddings=True),
        loss=LossConfig(kind="softmax", positives="caption", temperature_init=12.0),
        optim=OptimConfig(lr=2e-4, weight_decay=0.01, warmup_steps=20),
        zero=ZeroConfig(precision="fastest"),
        global_batch_size=128,
        steps=600,
        checkpoint_every=200,
    )


def demo_large() -> TrainConfig:
    """As `demo`, from more of the image tower: three blocks' class tokens, 768 numbers an image,
    and heads over both towers, which stay as they are. No export expresses it.

    deepspeed launch/lit.py demo-large
    """
    small = demo()
    return replace(
        small,
        name="demo-large",
        data=replace(small.data, features="runs/features-large", captions_per_image=4),
        vision=replace(small.vision, features="cls@9+cls@10+cls@11", head="mlp"),
        text=TextConfig(tower="minilm", context_length=16, frozen=True, head="mlp"),
        optim=replace(small.optim, lr=1e-3),
        embed_dim=768,
        steps=400,
    )


def cc12m() -> TrainConfig:
    """SigLiT on img2dataset shards, one machine: FlexiViT-S against BERT-base.

    deepspeed launch/lit.py cc12m --data.shards 'cc12m/{00000..01242}.tar' --data.features cache
    """
    return TrainConfig(
        name="cc12m",
        vision=VisionConfig(tower="timm:flexivit_small.1200ep_in1k", dtype="fastest"),
        text=TextConfig(tower="hf:google-bert/bert-base-uncased", pooling="cls", context_length=32),
        loss=LossConfig(kind="sigmoid"),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, warmup_steps=500),
        zero=ZeroConfig(stage=1, precision="bfloat16"),
        global_batch_size=16_384,
        steps=20_000,
        log_every=20,
        checkpoint_every=1000,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "demo-large": demo_large,
    "cc12m": cc12m,
}


def dinov2s() -> FlexifyConfig:
    """DINOv2-S on the default drawings: its features at patch 14 teach all patch sizes.

    deepspeed launch/flexify.py dinov2s      # six minutes on two cores with AMX

    Few enough parameters train to ship as a difference of 6.4 MB: `dinov2s-flexi` is the result.
    """
    data = default_data()
    return FlexifyConfig(
        name="dinov2s",
        data=DataConfig(shards=(f"{data}/train/*.tar",), features="runs/teacher"),
        teacher=TeacherConfig(tower="dinov2s", patch_size=14, dtype="fastest"),
        student=StudentConfig(
            patch_sizes=(56, 32, 28, 16, 14),
            patch_weights=(3.0, 3.0, 2.0, 1.0, 1.0),  # coarse ones are further away, and cheaper
            trainable=(
                *("patch_embed", "pos_embed", "cls_token", "norm", "gamma", "bias"),
                *(r"blocks\.0\.", r"blocks\.1\.attn"),
            ),
        ),
        loss=DistillationConfig(features=1.0, distance="cosine"),
        optim=OptimConfig(lr=2e-4, weight_decay=1e-5, warmup_steps=20),
        zero=ZeroConfig(precision="fastest"),
        val_shards=(f"{data}/heldout_captions/*.tar",),
        global_batch_size=64,
        steps=300,
        checkpoint_every=100,
    )


def imagenet() -> FlexifyConfig:
    """FlexiViT-S from a fixed ViT-S/16 on ImageNet, by the paper's recipe (arXiv:2212.08013).

    deepspeed launch/flexify.py imagenet --data.shards 'imagenet/train-{0000..1023}.tar'
    """
    return FlexifyConfig(
        name="imagenet",
        data=DataConfig(views=1000, crop=0.2, flip=True),
        teacher=TeacherConfig(tower="timm:vit_small_patch16_224.augreg_in21k_ft_in1k"),
        student=StudentConfig(image_size=240, kernel_size=32, grid=15),
        loss=DistillationConfig(kl=1.0, features=0.0),
        augment=AugmentConfig(mixup=0.2),
        optim=OptimConfig(lr=1e-4, weight_decay=1e-5, beta2=0.999, warmup_steps=5000),
        zero=ZeroConfig(stage=1, precision="bfloat16"),
        global_batch_size=1024,
        steps=112_000,  # 90 epochs of 1,281,167 images / 1,024
        log_every=50,
        eval_every=5000,
        checkpoint_every=5000,
    )


def clip() -> FlexifyConfig:
    """A CLIP or SigLIP made flexible on any images; its own texts go on reading it, no caption is
    needed. The result is a whole model.

    deepspeed launch/flexify.py clip --data.shards 'photos/{000..099}.tar' \\
        --teacher.tower open_clip:ViT-B-32@laion2b_s34b_b79k

    mse, since cosines between images and texts see how long features are before they are centred.
    """
    return FlexifyConfig(
        name="clip",
        data=DataConfig(views=1000, crop=0.5, flip=True),
        teacher=TeacherConfig(tower="open_clip:ViT-B-32@laion2b_s34b_b79k", dtype="fastest"),
        loss=DistillationConfig(features=1.0, distance="mse"),
        optim=OptimConfig(lr=3e-5, weight_decay=1e-5, warmup_steps=100),
        zero=ZeroConfig(precision="fastest"),
        global_batch_size=256,
        steps=5000,
        eval_every=1000,
        checkpoint_every=1000,
    )


FLEXIFY_RECIPES: dict[str, Callable[[], FlexifyConfig]] = {
    "clip": clip,
    "dinov2s": dinov2s,
    "imagenet": imagenet,
}


def default_scenes() -> Path:
    """Where the scenes of drawings that decoders are trained on are."""
    return default_data().parent / "scenes"


def default_box_scenes() -> Path:
    """Where the scenes that heads of boxes are trained on are."""
    return default_data().parent / "scenes-boxes"


def scenes() -> DenseConfig:
    """A linear decoder of six kinds of things on DINOv2-S made flexible, on scenes of drawings.

    deepspeed launch/dense.py
    deepspeed launch/dense.py --decoder.kind mask_transformer
    deepspeed launch/dense.py --decoder.kind mlp --vision.features mean@3+mean@6+mean@9+mean@12
    """
    folder = default_scenes()
    return DenseConfig(
        name="scenes",
        data=PicturesConfig(f"{folder}/train", features="runs/features-scenes"),
        vision=VisionConfig(tower="dinov2s-flexi", features="mean", dtype="fastest"),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, warmup_steps=20),
        eval_data=(f"{folder}/heldout_captions", f"{folder}/heldout_style"),
        global_batch_size=16,
        steps=600,
        eval_every=600,
    )


def boxes() -> DenseConfig:
    """Heads that find boxes by any words, on the demo's model, on scenes of all trained drawings.

    deepspeed launch/dense.py boxes      # after make demo
    """
    folder = default_box_scenes()
    return DenseConfig(
        name="boxes",
        data=PicturesConfig(f"{folder}/train", features="runs/features-boxes"),
        vision=VisionConfig(tower="runs/demo/model", dtype="fastest"),
        decoder=DecoderConfig("boxes"),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, warmup_steps=20),
        eval_data=(f"{folder}/heldout_captions", f"{folder}/heldout_style"),
        global_batch_size=16,
        steps=1000,
        eval_every=1000,
    )


DENSE_RECIPES: dict[str, Callable[[], DenseConfig]] = {"scenes": scenes, "boxes": boxes}


def choose_recipe(name: str, recipes: Mapping[str, Callable[[], Config]]) -> Config:
    """The configuration of one of `recipes`; `UsageError` for an unknown name."""
    if name not in recipes:
        raise UsageError(f"unknown recipe {name!r}; allowed: {', '.join(sorted(recipes))}")
    return recipes[name]()
