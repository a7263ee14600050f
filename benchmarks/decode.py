"""Image files to pixels: version 2 of the transform (libjpeg-turbo, torch) against 1 (Pillow).

    python benchmarks/decode.py                       # photographs in runs/photos
    python benchmarks/decode.py --model runs/demo/model --data runs/data/emoji/heldout_style

Photographs: any folder of images of 256 pixels a side and more, such as those of Debian's package
tuxpaint-stamps-default; they are scaled and written as JPEGs of quality 90. PNG and WebP files are
the offline default's drawings. A ratio is version 1's median over version 2's of the processor
time that a loader process takes for a file: version 1 as 0.1 had it, which normalised there too;
"normalised" adds that to version 2, whose pixels are normalised where the tower is. Embedding takes
a tar of the JPEGs, with the default tower at patch 56 and two loader processes; beside it the tower
with the pixels in memory, which no decoder can outrun. `--model`: the zero-shot accuracy of both
versions too.
"""

import argparse
import io
import random
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from contrastive import LitModel, VisionTower, distributed, load_vision_tower
from contrastive.image_features import CPU_IMAGES, compute_features
from data.batch import EvalBatch
from data.emoji.build import build_emoji
from data.images import decode_image, to_rgb
from data.pipeline.reader import ShardReader
from data.shards.tar import add_member
from data.transform import ImageTransform
from lib.harness import Target, finish, interleave
from lib.tars import read_tar
from retrieval import evaluate, load_dataset

PHOTOS, MAX_PIXELS = 100, 100_000_000
SIZES = ((340, 256), (500, 375))
PATCH_SIZES = (56, 14)
COMPARED = 16  # images a kind, whose features are compared
TAR_PATCH_SIZE, TAR_IMAGES = 56, 300


def photographs(folder: Path, count: int) -> list[Image.Image]:
    """Images of the folder that are large enough, over white, always the same."""
    files = sorted(f for f in folder.rglob("*.*") if f.suffix in (".png", ".jpg", ".jpeg"))
    found = [to_rgb(image) for image in map(Image.open, files) if min(image.size) >= 256]
    if not found:
        raise SystemExit(f"{folder} holds no PNG or JPEG of 256 pixels a side; name --photos")
    return random.Random(0).sample(found, min(count, len(found)))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def drawings(folder: Path, count: int) -> list[bytes]:
    """PNG files of the default drawings, larger than towers take them."""
    data = build_emoji(folder, size=320, limit=max(10, count), progress=False)
    found = []
    for file in sorted(data.glob("train/*.tar")):
        found += [png for name, png in read_tar(file).items() if name.endswith(".png")]
    return random.Random(0).sample(found, min(count, len(found)))


def pixels(transform: ImageTransform, files: Sequence[bytes], normalised: bool = False) -> None:
    """Read one by one; normalised as towers do it."""
    size = CPU_IMAGES
    for start in range(0, len(files), size):
        part = [transform.read(data, MAX_PIXELS) for data in files[start : start + size]]
        batch = torch.stack(part)
        if normalised:
            transform.normalise(batch)


def pixels_before(transform: ImageTransform, files: Sequence[bytes]) -> None:
    """As 0.1 did it: normalised one by one."""
    size = CPU_IMAGES
    for start in range(0, len(files), size):
        images = [decode_image(data, MAX_PIXELS) for data in files[start : start + size]]
        torch.stack([transform(image) for image in images])


def differences(versions: Sequence[ImageTransform], files: Sequence[bytes]) -> dict[str, float]:
    """In levels, of 8-bit values after the transform."""
    first, second = ([v.read(data, MAX_PIXELS).int() for data in files] for v in versions)
    apart = torch.stack([(a - b).abs() for a, b in zip(first, second, strict=True)])
    return {
        "largest": int(apart.max()),
        "mean": float(apart.float().mean()),
        "share_of_values_above_one": float((apart > 1).float().mean()),
    }


@torch.no_grad()
def cosines(
    tower: VisionTower, versions: Sequence[ImageTransform], files: Sequence[bytes]
) -> dict[int, dict[str, float]]:
    """Of the tower's features of both versions' pixels, by patch size."""
    found = {}
    for size in PATCH_SIZES:
        features = []
        for version in versions:
            squares = torch.stack([version.read(data, MAX_PIXELS) for data in files])
            parts = [tower(part, size) for part in version.normalise(squares).split(32)]
            features.append(torch.cat(parts))
        cosine = torch.cosine_similarity(features[0].double(), features[1].double())
        found[size] = {"least": float(cosine.min()), "mean": float(cosine.mean())}
    return found


def write_tar(file: Path, images: Sequence[bytes], count: int) -> None:
    with tarfile.open(file, "w") as tar:
        for number in range(count):
            add_member(tar, f"{number:06}.jpg", images[number % len(images)])


def reader(tower: VisionTower, tar: Path) -> ShardReader:
    return ShardReader([str(tar)], tower.transform, batch_size=64, num_workers=2)


def embed(tower: VisionTower, batches: Iterable[EvalBatch]) -> None:
    for batch in batches:
        compute_features(tower, batch, [TAR_PATCH_SIZE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=Path("runs/photos"), help="a folder")
    parser.add_argument("--model", help="a model, for zero-shot accuracy")
    parser.add_argument("--data", help="labelled shards for it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=PHOTOS)
    args = parser.parse_args()

    tower = load_vision_tower("dinov2s-flexi")
    fast = load_vision_tower("dinov2s-flexi", dtype=distributed.resolve_dtype("fastest"))
    versions = [tower.use_transform(number).transform for number in (1, 2)]
    threads = torch.get_num_threads()
    figures: dict[str, Any] = {}
    targets = []
    with tempfile.TemporaryDirectory() as folder:
        photos = photographs(args.photos, args.images)
        kinds = {
            f"JPEG {width}x{height}": [
                encoded(photo.resize((width, height)), "JPEG", quality=90) for photo in photos
            ]
            for width, height in SIZES
        }
        kinds["PNG"] = drawings(Path(folder) / "emoji", args.images)
        drawn = [Image.open(io.BytesIO(data)) for data in kinds["PNG"]]
        kinds["WebP"] = [encoded(image, "WEBP", quality=90) for image in drawn]
        for kind, files in kinds.items():
            torch.set_num_threads(1)
            contenders = {
                "version 1": partial(pixels_before, versions[0], files),
                "version 2": partial(pixels, versions[1], files),
                "version 2, normalised": partial(pixels, versions[1], files, True),
            }
            timings = interleave(contenders, args.rounds, clock=time.process_time)
            torch.set_num_threads(threads)
            ratio = timings.ratio("version 1", "version 2")
            figures[kind] = {
                "images": len(files),
                "bytes_per_image": sum(map(len, files)) / len(files),
                "images_per_s": {n: len(files) / timings.median(n) for n in contenders},
                "speed_ratio": ratio,
                "rounds": sorted(timings.round_ratios("version 1", "version 2")),
                "speed_ratio_normalised": timings.ratio("version 1", "version 2, normalised"),
                "levels_apart": differences(versions, files),
                "cosines": cosines(tower, versions, files[:COMPARED]),
            }
            wanted = ">= 2.5" if kind.startswith("JPEG") else ">= 1.0"
            least = min(found["least"] for found in figures[kind]["cosines"].values())
            targets += [
                Target(f"{kind}: images/s, version 2 over 1", wanted, ratio),
                Target(f"{kind}: least cosine of features", ">= 0.9999", least),
            ]
        tar = Path(folder) / "photos.tar"
        write_tar(tar, kinds["JPEG 340x256"], TAR_IMAGES)
        runs = {
            f"version {n}": partial(embed, fast, reader(fast.use_transform(n), tar)) for n in (1, 2)
        }
        runs["pixels in memory"] = partial(embed, fast, list(reader(fast, tar)))
        timings = interleave(runs, args.rounds, warmup=1)
        ratio = timings.ratio("version 1", "version 2")
        figures["embedding a tar"] = {
            "images_per_s": {name: TAR_IMAGES / timings.median(name) for name in runs},
            "speed_ratio": ratio,
            "speed_ratio_at_most": timings.ratio("version 1", "pixels in memory"),
            "rounds": sorted(timings.round_ratios("version 1", "version 2")),
            "dtype": str(next(fast.parameters()).dtype),
        }
        targets.append(Target("embedding JPEGs at patch 56, version 2 over 1", ">= 1.5", ratio))
    if args.model:
        model = LitModel.from_pretrained(args.model)
        for number in (1, 2):
            model.vision.use_transform(number)
            result = evaluate(model, load_dataset("shards", args.data), PATCH_SIZES)
            figures[f"zero-shot accuracy, version {number}"] = result.accuracy
    packages = ("torch", "pillow", "simplejpeg", "numpy", "timm")
    finish("decode", figures, targets, packages=packages)


if __name__ == "__main__":
    main()
