"""Compact Convolutional Transformers of vit-pytorch (Hassani et al., arXiv:2104.05704)."""

from contrastive.files.weights import existing_file, load_weights, read_weights
from contrastive.vision.build import build_vision_tower
from contrastive.vision.formats.pixel_statistics import IMAGENET
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError

NAMES = ("cct_2", "cct_4", "cct_6", "cct_7", "cct_8", "cct_14", "cct_16")


def load_vit_pytorch(rest: str) -> VisionTower:
    """`NAME@FILE`: NAME is one of vit-pytorch's `cct_*`, FILE holds its state dict.

    Convolutions and image size are read from the file. Pixels are normalised as ImageNet's.
    """
    name, _, file = rest.partition("@")
    if name not in NAMES or not file:
        raise UsageError(
            f"image tower vit_pytorch:{rest}; allowed: vit_pytorch:NAME@FILE with NAME one of "
            f"{', '.join(NAMES)}"
        )
    weights = read_weights(existing_file(file))
    weights = {k: w for k, w in weights.items() if not k.startswith("classifier.fc.")}
    kernels = [w for k, w in weights.items() if k.startswith("tokenizer.conv_layers.")]
    positions = weights.get("classifier.positional_emb")
    if not kernels or positions is None:
        raise UsageError(f"{file} holds the weights of another model: no {name} with positions")
    args = {"n_conv_layers": len(kernels), "kernel_size": kernels[0].shape[-1], "num_classes": 1}

    def build(image_size: int) -> VisionTower:
        own = {**args, "img_size": image_size}
        return build_vision_tower(
            TowerConfig(name, own, image_size, (), *IMAGENET, library="vit_pytorch")
        )

    stride = build(64).native_patch_size  # the same at any image size
    tower = build(round(positions.shape[1] ** 0.5) * stride)
    load_weights(tower.net, weights, file)
    return tower
