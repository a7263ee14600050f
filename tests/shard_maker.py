"""Small real shards for tests: drawn images, captions, and every kind of damage."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.transform import ImageTransform

TRANSFORM = ImageTransform(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file of a format that Pillow names."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> bytes:
    """An image that no other seed gives."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    return encode(Image.fromarray(pixels.squeeze(), mode if mode == "RGBA" else None), "PNG")


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> str:
    """A tar of (name, data), in order; equal names are written as they come."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def sample(key: str, seed: int, captions: Iterable[str] = ()) -> list[tuple[str, bytes]]:
    """KEY.png and KEY.txt, or KEY.json where there are several captions."""
    captions = list(captions) or [f"caption of {key}"]
    if len(captions) == 1:
        return [(f"{key}.png", png(seed)), (f"{key}.txt", captions[0].encode())]
    return [(f"{key}.png", png(seed)), (f"{key}.json", json.dumps({"captions": captions}).encode())]


def write_shards(folder: Path, counts: Iterable[int]) -> list[str]:
    """Shards of good samples with keys s<shard>_<sample>."""
    shards = []
    for shard, count in enumerate(counts):
        members = [
            member for i in range(count) for member in sample(f"s{shard}_{i:03d}", 1000 * shard + i)
        ]
        shards.append(write_tar(folder / f"{shard:04d}.tar", members))
    return shards
