"""Bulk embedding of shards: several patch sizes in one pass over the pixels.

The work happens in OUT.partial, which gets its name when everything is there. Interrupted, the same
command continues at the first partition that is missing. `partitions.py` names the files.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float
from tqdm import tqdm

from contrastive.distributed import barrier, is_main, rank, world_size
from contrastive.model.lit import LitModel
from data.batch import EvalBatch
from data.config import OnError
from data.errors import UsageError
from data.pipeline.reader import ShardReader
from retrieval.embed.config import BATCH_SIZE, NUM_WORKERS, check_batches
from retrieval.embed.manifest import read_manifest
from retrieval.embed.partitions import PartitionWriter, metadata_file
from retrieval.json_files import write_json


def embed_batches(
    model: LitModel, reader: Iterable[EvalBatch], patch_sizes: Sequence[int]
) -> Iterator[tuple[EvalBatch, dict[int, Float[np.ndarray, "b d"]]]]:
    """Each batch of `reader` with its unit-norm float32 embeddings per patch size."""
    for batch in reader:
        assert batch.images is not None
        images = batch.images.to(model.device, non_blocking=True)
        embeds = {size: model.encode_image(images, patch_size=size) for size in patch_sizes}
        yield batch, {size: rows.cpu().numpy() for size, rows in embeds.items()}


def check_patch_sizes(model: LitModel, patch_sizes: Sequence[int]) -> tuple[int, ...]:
    """The distinct patch sizes in the order given, or all of the model's when none are given.

    Raises `UsageError` for one that the model cannot run at.
    """
    for size in patch_sizes:
        model.vision.check_patch_size(size)
    return tuple(dict.fromkeys(patch_sizes)) or tuple(model.patch_sizes)


def embed_shards(
    model: LitModel,
    shards: Sequence[str],
    patch_sizes: Sequence[int],
    out: str | Path,
    batch_size: int = BATCH_SIZE,
    num_workers: int = NUM_WORKERS,
    on_error: OnError = "skip",
    allow_pipe: bool = False,
    model_dir: str | Path = "",
) -> dict[str, Any]:
    """Embed the images of `shards` at every patch size. Returns the manifest.

    shards: expanded names, see `data.shards.expand_shards`. batch_size: images per forward, one
    rank. model_dir: where `model` was loaded from; noted for `build_index`. Ranks share the
    shards. Images that cannot be read are skipped and counted by kind in the manifest; with
    on_error="raise" the first one ends the run. Peak memory does not depend on a shard's length.
    A finished `out` of the same model, shards and patch sizes is returned as it is; any other
    raises `UsageError`, as does a result without an image.
    """
    check_batches(batch_size, num_workers)
    out = Path(out)
    patch_sizes = check_patch_sizes(model, patch_sizes)
    shards = [s if "://" in s or s.startswith("pipe:") else os.path.abspath(s) for s in shards]
    shards = list(dict.fromkeys(shards))  # ./a.tar is a.tar
    plan = {
        "format": 1,
        "image_fingerprint": model.image_fingerprint,
        "text_fingerprint": model.text_fingerprint,
        "model": os.path.abspath(model_dir) if model_dir else "",
        "width": model.embed_dim,
        "patch_sizes": list(patch_sizes),
        "shards": shards,
    }
    finished = _finished(out, plan)
    if finished is not None:
        return finished
    partial = out.with_name(out.name + ".partial")
    _open_partial(partial, plan)

    mine = [n for n in range(len(shards)) if n % world_size() == rank()]
    todo = [n for n in mine if not metadata_file(partial, n).is_file()]
    bar = tqdm(
        total=len(mine),
        initial=len(mine) - len(todo),
        desc=f"embedding at patch {', '.join(map(str, patch_sizes))}",
        unit="shard",
        disable=not is_main(),
    )
    seen = 0
    with bar:
        for number in todo:
            reader = ShardReader(
                [shards[number]],
                model.transform,
                batch_size=batch_size,
                num_workers=num_workers,
                on_error=on_error,
                allow_pipe=allow_pipe,
            )
            with PartitionWriter(
                partial, number, shards[number], patch_sizes, model.embed_dim
            ) as writer:
                for batch, embeds in embed_batches(model, reader, patch_sizes):
                    writer.add(batch, embeds)
                    seen += len(batch.keys)
                    bar.set_postfix(images=seen)
                writer.finish(reader.errors)
            bar.update()
    barrier()
    manifest = _join(partial, plan)
    barrier()
    if not manifest["count"]:
        if is_main():
            shutil.rmtree(partial)
        skipped = ", ".join(f"{kind} {n:,}" for kind, n in manifest["errors"].items()) or "none"
        raise UsageError(f"no image could be embedded of {_short(shards)}; skipped: {skipped}")
    if is_main():
        write_json(partial / "manifest.json", manifest)
        partial.rename(out)  # first: without its plan a partial folder would be begun anew
        (out / "plan.json").unlink()
    barrier()
    return read_manifest(out)


def _finished(out: Path, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of `out` when it holds what `plan` says; `UsageError` when something else."""
    if not out.is_dir() or not any(out.iterdir()):
        return None
    manifest = read_manifest(out)
    _check_same(out, plan, manifest)
    for name in ("model", "text_fingerprint"):  # image embeddings outlive a text tower
        if manifest[name] != plan[name] and is_main():
            manifest[name] = plan[name]
            write_json(out / "manifest.json", manifest)
    return manifest


def _check_same(folder: Path, plan: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in ("image_fingerprint", "patch_sizes", "shards"):
        if found.get(name) != plan[name]:
            what = name.replace("_", " ")
            raise UsageError(
                f"{folder} was made with another {what}: {_short(found.get(name))}, "
                f"not {_short(plan[name])}; choose another folder or remove it"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _open_partial(partial: Path, plan: Mapping[str, Any]) -> None:
    """Create the work folder, or check that the one there belongs to the same work."""
    if is_main():
        plan_file = partial / "plan.json"
        if plan_file.is_file():
            _check_same(partial, plan, json.loads(plan_file.read_text()))
        else:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "metadata").mkdir(parents=True)
            for size in plan["patch_sizes"]:
                (partial / f"patch_{size}" / "img_emb").mkdir(parents=True)
            write_json(plan_file, plan)
    barrier()


def _join(partial: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of all partitions."""
    partitions, errors = [], Counter[str]()
    for number, shard in enumerate(plan["shards"]):
        found = pq.read_metadata(metadata_file(partial, number))
        partitions.append({"shard": shard, "count": found.num_rows})
        errors.update(json.loads(found.metadata[b"errors"]))
    return {
        **plan,
        "count": sum(p["count"] for p in partitions),
        "errors": dict(errors),
        "partitions": partitions,
    }
