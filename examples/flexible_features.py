"""A flexible tower as a feature extractor: one set of weights, a vector at every patch size.

    python examples/flexible_features.py dinov2s-flexi cat.jpg dog.jpg
    python examples/flexible_features.py timm:flexivit_small.1200ep_in1k cat.jpg dog.jpg

Prints what each patch size costs, and how close its features stay to those of the finest one.
"""

import sys

import torch
from PIL import Image

from contrastive import load_vision_tower


@torch.no_grad()
def main(spec: str, *files: str) -> None:
    tower = load_vision_tower(spec)  # locked, in evaluation mode, float32
    images = torch.stack([tower.transform(Image.open(file)) for file in files])
    finest = tower(images, patch_size=min(tower.patch_sizes))  # (b, d), pooled, not normalised
    print("patch size  tokens  GFLOPs  cosine to the finest")
    for patch_size in tower.patch_sizes:
        features = tower(images, patch_size=patch_size)
        cosine = torch.cosine_similarity(features, finest).mean()
        tokens, gflops = tower.num_tokens(patch_size), tower.gflops(patch_size)
        print(f"{patch_size:10}  {tokens:6}  {gflops:6.2f}  {cosine:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
