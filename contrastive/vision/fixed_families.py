"""Networks that run at the one patch size they were built for: ConvNets, Mixers, Swin, and others.

Each class tells how wide the features are, how many pixels a feature cell covers, and how images
become one vector each.
"""

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from contrastive.vision.resize import PositionResize


class Family:
    """Any timm model, before its class head."""

    flexible = False

    def fits(self, net: Any) -> bool:
        return hasattr(net, "forward_features") and hasattr(net, "forward_head")

    def width(self, net: Any) -> int:
        return int(getattr(net, "head_hidden_size", None) or net.num_features)

    def patch_size(self, net: Any, image_size: int) -> int:
        """Pixels per feature cell: a ViT's patch, else the network's total stride."""
        info = getattr(net, "feature_info", None)
        return int(info[-1]["reduction"]) if info else image_size

    def features(self, net: Any, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        return net.forward_head(net.forward_features(images), pre_logits=True)

    def terms(self, net: Any) -> tuple[str, ...]:
        """What `features` may name."""
        return ("own",)

    def position_rule(self, net: Any) -> PositionResize:
        """How the library itself resizes a grid of positions at its own image size."""
        return PositionResize()


class SegFormerEncoder(Family):
    """SegFormer's encoder in transformers: the mean of its last feature map."""

    def fits(self, net: Any) -> bool:
        return getattr(getattr(net, "config", None), "model_type", None) == "segformer"

    def width(self, net: Any) -> int:
        return int(net.config.hidden_sizes[-1])

    def patch_size(self, net: Any, image_size: int) -> int:
        return math.prod(net.config.strides)

    def features(self, net: Any, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        last = net(pixel_values=images).last_hidden_state
        return last.mean((2, 3)) if last.ndim == 4 else last.mean(1)


class CompactTransformer(Family):
    """vit-pytorch's Compact Convolutional Transformer, without its class head."""

    def fits(self, net: Any) -> bool:
        return type(net).__name__ == "CCT"

    def width(self, net: Any) -> int:
        return int(net.classifier.embedding_dim)

    def patch_size(self, net: Any, image_size: int) -> int:
        stride = 1
        for layer in net.tokenizer.modules():
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                stride *= layer.stride if isinstance(layer.stride, int) else layer.stride[0]
        return stride

    def features(self, net: Any, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        return net(images)


class OpenClipVisual(Family):
    """An image tower of open_clip with a pooling or projection that timm cannot express."""

    def fits(self, net: Any) -> bool:
        return type(net).__module__.startswith("open_clip.")

    def width(self, net: Any) -> int:
        return int(net.output_dim)

    def patch_size(self, net: Any, image_size: int) -> int:
        if hasattr(net, "trunk"):
            return Family().patch_size(net.trunk, image_size)
        return int(net.conv1.stride[0]) if hasattr(net, "class_embedding") else 32  # a ResNet's

    def features(self, net: Any, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        return net(images)
