"""A FAISS index per patch size over embedded shards, in a folder that is all a searcher needs.

NAME/patch_28/image.index       inner product on unit-norm vectors, int64 ids
NAME/metadata/metadata_*.arrow  id, key, caption, shard, offset, size; sorted by id
NAME/model/                     what `LitModel.from_pretrained` reads (a copy)
NAME/manifest.json              written last, before the folder gets its name
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from tqdm import tqdm

from contrastive.lit import LitModel
from data.errors import UsageError
from retrieval.partitions import (
    METADATA_SCHEMA,
    metadata_file,
    open_vectors,
    read_manifest,
    write_json,
)

IndexKind = Literal["auto", "flat", "ivf"]
Device = Literal["auto", "cpu", "cuda"]

BLOCK_ROWS = 65_536  # vectors added at a time: 100 MB at width 384
# Above this an exact scan of float32 vectors leaves interactive latency: two CPU cores read about
# 10 GB/s (50 ms), one GPU about 1 TB/s (16 ms).
FLAT_BYTES = {"cpu": 512 * 2**20, "cuda": 16 * 2**30}
NPROBE_SHARE = 1 / 16  # of the cells looked into per query


def use_cuda(device: Device) -> bool:
    """Whether FAISS works on GPUs. Raises `UsageError` when they are asked for and missing."""
    gpus = faiss.get_num_gpus()
    if device == "cuda" and not gpus:
        raise UsageError("device cuda: FAISS sees no GPU here; allowed: auto, cpu")
    return device != "cpu" and gpus > 0


def to_device(index: faiss.Index, cuda: bool) -> faiss.Index:
    """`index` itself, or its copy on all GPUs (replicated)."""
    return faiss.index_cpu_to_all_gpus(index) if cuda else index


def choose_kind(count: int, width: int, cuda: bool) -> tuple[Literal["flat", "ivf"], str]:
    """What `auto` means for `count` vectors, and why in one line."""
    size, limit = count * width * 4, FLAT_BYTES["cuda" if cuda else "cpu"]
    where = "GPU" if cuda else "CPU"
    have = f"{count:,} vectors of width {width} take {size / 2**20:,.1f} MiB"
    allowed = f"{limit / 2**20:,.0f} MiB that a {where} scans exactly in interactive time"
    if size <= limit:
        return "flat", f"flat: {have}, within the {allowed}"
    return "ivf", f"ivf: {have}, more than the {allowed}"


def build_index(
    embeddings_dir: str | Path,
    out: str | Path,
    model_dir: str | Path = "",
    kind: IndexKind = "auto",
    device: Device = "auto",
) -> str:
    """Index every patch size of a folder written by `embed_shards`. Returns why this kind.

    model_dir: the model the embeddings come from; "" takes the one their manifest names.
    kind: `flat` is exact; `ivf` looks into some of about 4 sqrt(n) cells. Beyond the index itself
    memory is bounded: embeddings are memory-mapped and added in blocks.
    Raises `UsageError` when `out` exists already, or when embeddings or model are missing.
    """
    embeddings, out = Path(embeddings_dir), Path(out)
    manifest = read_manifest(embeddings)
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} exists already; give another name, or remove it first")
    cuda = use_cuda(device)
    model = _find_model(str(model_dir or manifest["model"]), manifest["image_fingerprint"])
    if kind == "auto":
        kind, reason = choose_kind(manifest["count"], manifest["width"], cuda)
    else:
        reason = f"{kind}: as asked"

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    nlist = 0
    for patch_size in manifest["patch_sizes"]:
        index, nlist = _build_one(embeddings, patch_size, manifest, kind, cuda)
        folder = partial / f"patch_{patch_size}"
        folder.mkdir()
        faiss.write_index(index, str(folder / "image.index"))
    _write_metadata(embeddings, partial / "metadata", len(manifest["partitions"]))
    # Copied, not linked: a model folder that is written again in place must not change the index.
    shutil.copytree(model, partial / "model")
    keep = ("image_fingerprint", "text_fingerprint", "count", "width", "patch_sizes")
    written = {
        "format": 1,
        **{name: manifest[name] for name in keep},
        "kind": kind,
        "reason": reason,
        "nprobe": max(1, round(nlist * NPROBE_SHARE)),
    }
    write_json(partial / "manifest.json", written)
    partial.rename(out)
    return reason


def _find_model(name: str, image_fingerprint: str) -> Path:
    """The folder of the model that the embeddings were made with, checked."""
    if not name or not (Path(name) / "config.json").is_file():
        raise UsageError(
            f"no model at {name!r}; name the folder (config.json, model.safetensors) that the "
            "embeddings were made with"
        )
    if LitModel.from_pretrained(name).image_fingerprint != image_fingerprint:
        raise UsageError(
            f"the model at {name} has another image tower than the one the embeddings were made "
            "with; name that one, or embed again"
        )
    return Path(name)


def _build_one(
    embeddings: Path, patch_size: int, manifest: dict, kind: str, cuda: bool
) -> tuple[faiss.Index, int]:
    """The index of one patch size, on the CPU, and its number of cells (0 for flat)."""
    count, width = manifest["count"], manifest["width"]
    partitions = len(manifest["partitions"])
    inner: faiss.Index = faiss.IndexFlatIP(width)
    nlist = 0
    if kind == "ivf":
        # 4 sqrt(n) cells as FAISS's guidelines say; at least 39 training vectors each.
        nlist = max(1, min(round(4 * count**0.5), count // 39))
        inner = faiss.IndexIVFFlat(inner, width, nlist, faiss.METRIC_INNER_PRODUCT)
        sample = _sample(embeddings, patch_size, partitions, share=min(1.0, 128 * nlist / count))
        trained = to_device(inner, cuda)
        trained.train(sample)
        inner = faiss.index_gpu_to_cpu(trained) if cuda else trained
    index = faiss.IndexIDMap2(inner)
    description = f"indexing patch {patch_size} ({kind})"
    with tqdm(total=count, desc=description, unit="vec", leave=False) as bar:
        for vectors, ids in _blocks(embeddings, patch_size, partitions):
            index.add_with_ids(vectors, ids)
            bar.update(len(ids))
    return index, nlist


def _blocks(
    embeddings: Path, patch_size: int, partitions: int
) -> Iterator[tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]]:
    """Vectors and their ids, at most BLOCK_ROWS at a time."""
    for number in range(partitions):
        vectors = open_vectors(embeddings, patch_size, number)
        metadata = metadata_file(embeddings, number)
        ids = pq.read_table(metadata, columns=["id"])["id"].to_numpy()
        if len(ids) != len(vectors):
            raise UsageError(
                f"{metadata} has {len(ids)} rows for {len(vectors)} vectors of patch size "
                f"{patch_size}; embed these shards again"
            )
        for start in range(0, len(ids), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            yield np.ascontiguousarray(vectors[block], np.float32), ids[block]


def _sample(
    embeddings: Path, patch_size: int, partitions: int, share: float
) -> Float[np.ndarray, "n d"]:
    """About `share` of all vectors, the same ones every time."""
    draw = np.random.default_rng(0)
    chosen = [
        vectors[draw.random(len(vectors)) < share]
        for vectors, _ in _blocks(embeddings, patch_size, partitions)
    ]
    return np.concatenate(chosen)


def _write_metadata(embeddings: Path, out: Path, partitions: int) -> None:
    """One Arrow file, a record batch per row group: memory-mapped and searched by id later."""
    out.mkdir()
    with pa.OSFile(str(out / "metadata_0000.arrow"), "wb") as sink:  # noqa: SIM117
        with pa.ipc.new_file(sink, METADATA_SCHEMA) as writer:
            for number in range(partitions):
                file = pq.ParquetFile(metadata_file(embeddings, number))
                for batch in file.iter_batches(batch_size=BLOCK_ROWS):
                    writer.write_batch(batch.cast(METADATA_SCHEMA))
