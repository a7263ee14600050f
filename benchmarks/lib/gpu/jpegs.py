"""JPEG tars: embedding them, reading them alone, and decoding them on the GPU instead."""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from contrastive import LitModel, distributed
from contrastive.image_features import images_read_together
from data.config import MAX_PIXELS
from data.files import link_or_copy
from data.pipeline.reader import ShardReader
from data.shards.index import load_summaries
from lib.gpu.data import DISTINCT, image_tower, jpegs, tars, text_folder
from lib.gpu.results import Measured
from lib.gpu.scale import DEVICE, Scale
from lib.harness import Target, interleave
from lib.lit_setup import build_model
from retrieval import embed_shards

WANTED = {16: 8_000, 30: 18_000}  # images/s, from 340x256 JPEGs
ROUNDS, REPEATS = 3, 8  # at most: of all calls, and of the tars in a call
ROUNDS_S = 400  # for all rounds and the calls that begin


def embedding(scale: Scale, folder: Path) -> Measured:
    """`embed_shards` at patch 16 and at 30, the readers alone, and JPEGs decoded on the GPU.

    A call reads the tars several times over, under other names: it begins with the weights' digest
    and new worker processes, which would be most of one pass. How often, and how many rounds there
    are, follows from a first pass, which reads the tars into memory.
    """
    distributed.ensure_group()
    text = text_folder(scale.minilm, scale.vocabulary, folder / f"bert{scale.minilm.width}")
    model = build_model(image_tower(scale), text).eval()
    model.save_pretrained(folder / "model")
    tars(folder / "tars22", scale, 22)  # a part that was cut short may have left some
    shards = sorted(folder.joinpath("tars22").glob("*.tar"))

    out = folder / "embeddings"

    def embed(size: int, names: Sequence[str]) -> None:
        embed_shards(
            model, names, [size], out, num_workers=scale.workers, model_dir=folder / "model"
        )

    calls: dict[str, Callable[[Sequence[str]], None]] = {
        "readers alone": partial(_read, model, scale.workers),
        **{f"patch {size}": partial(embed, size) for size in WANTED},
    }

    def seconds(name: str, names: Sequence[str]) -> float:
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        calls[name](names)
        return time.perf_counter() - start

    first = {name: seconds(name, list(map(str, shards))) for name in calls}
    begin = {name: seconds(name, [str(shards[0])]) for name in calls}
    repeats, rounds = plan(sum(begin.values()), sum(first.values()))
    if scale.tiny:
        repeats, rounds = 2, 1
    names = _again(shards, folder / "tars22_again", repeats)
    load_summaries(names)  # makes the indices
    images = repeats * scale.samples
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in calls:
            rates[name].append(images / seconds(name, names))
    shutil.rmtree(out, ignore_errors=True)
    figures = {
        "images": images,
        "images/s": {name: sorted(found) for name, found in rates.items()},
        "first call, s": first,
        "call of one tar, s": begin,
        "decoded on the GPU": decoded_there(model, scale),
    }
    return figures, [
        Target(
            f"embedding JPEG tars, images/s at patch {size}",
            f">= {wanted}",
            statistics.median(rates[f"patch {size}"]),
        )
        for size, wanted in WANTED.items()
    ]


def plan(begin_s: float, pass_s: float) -> tuple[int, int]:
    """How often the tars are read in a call, and how many rounds there are. Seconds of a round that
    reads next to nothing, and of one that reads the tars once, both of which were spent."""
    left, each = ROUNDS_S - begin_s - pass_s, max(pass_s - begin_s, 1e-3)
    repeats = min(REPEATS, max(1, int((left / ROUNDS - begin_s) / each)))
    return repeats, min(ROUNDS, max(1, int(left / (begin_s + repeats * each))))


def _again(shards: Sequence[Path], folder: Path, repeats: int) -> list[str]:
    """The tars under so many names each: `embed_shards` reads no name twice."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = [folder / f"{turn}_{shard.name}" for turn in range(repeats) for shard in shards]
    for name, shard in zip(names, repeats * list(shards), strict=True):
        link_or_copy(shard, name)
    return list(map(str, names))


def _read(model: LitModel, workers: int, names: Sequence[str]) -> None:
    """What `embed_shards` reads, and no forward."""
    together = images_read_together(DEVICE)
    for _ in ShardReader(
        names, model.transform, batch_size=together, num_workers=workers, digests=True
    ):
        pass


# ---- decoding on the GPU -----------------------------------------------------------------------


def decoded_there(model: LitModel, scale: Scale) -> dict[str, Any]:
    """Images/s of nvJPEG (of libjpeg, where there is no GPU) by torchvision, from JPEGs of one size
    that are in memory: decoded, resized there too (in float32, to 8 bits), and embedded, one after
    the other. Levels and cosines of features: against the CPU's decoder and resize."""
    distinct = jpegs(min(DISTINCT, scale.samples))
    count = max(len(distinct), images_read_together(DEVICE))
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in distinct]
    files = list(islice(cycle(files), count))
    side = model.image_size

    def decode() -> Tensor:
        return torch.stack(decode_jpeg(files, mode=ImageReadMode.RGB, device=DEVICE))

    def squares() -> Tensor:  # as `ImageTransform.square`, all at once
        resized = transforms.resize(
            decode(), [side], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        return transforms.center_crop(resized, [side, side])

    def features(pixels: Tensor, size: int) -> Tensor:
        images = model.transform.normalise(pixels)
        return F.normalize(model.encode_image(images, patch_size=size).float(), dim=-1)

    def embed(size: int) -> Tensor:
        return features(squares(), size)

    contenders: dict[str, Callable[[], object]] = {
        "decoded": decode,
        "decoded, resized": squares,
        **{f"decoded, resized, embedded at patch {size}": partial(embed, size) for size in WANTED},
    }
    said: dict[str, Any] = {"images": len(files)}
    with torch.inference_mode():
        for name, call in list(contenders.items()):
            try:
                call()
            except Exception as error:  # no decoder in this torchvision, no memory
                said[name] = f"not run: {type(error).__name__}: {str(error)[:160]}"
                del contenders[name]
        if contenders:
            timings = interleave(contenders, scale.rounds)
            said["images/s"] = {name: len(files) / timings.median(name) for name in contenders}
            said["times"] = timings.figures()
        if "decoded, resized" in contenders:
            read = [model.transform.read(data, MAX_PIXELS) for data in distinct]
            here, there = torch.stack(read).to(DEVICE), squares()[: len(distinct)]
            levels = (here.int() - there.int()).abs().float()
            said["levels apart"] = {"mean": float(levels.mean()), "largest": float(levels.max())}
            said["cosines"] = {}
            for size in WANTED:
                cosines = (features(here, size) * features(there, size)).sum(-1)
                entry = {"mean": float(cosines.mean()), "least": float(cosines.min())}
                said["cosines"][f"patch {size}"] = entry
    return said
