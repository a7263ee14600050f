"""Bulk embedding of shards: several patch sizes, or budgets of tokens, in one pass over the files.

The work happens in OUT.partial, which gets its name when everything is there. Interrupted, the same
command continues at the first partition that is missing. `partitions.py` names the files. Shards
that were replaced since they were embedded are embedded again, the others stay.
"""

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from contrastive.distributed import barrier, gather_objects, is_main, rank, world_size
from contrastive.fetching import one_ahead
from contrastive.image_features import images_read_together
from contrastive.model.lit import LitModel
from contrastive.model.with_fit import with_fit
from contrastive.run.lock import locked
from contrastive.vision.config import is_library_spec
from data.batch import EvalBatch
from data.config import NUM_WORKERS, Fit, OnError
from data.errors import DataError, UsageError, check_utf8
from data.files import file_digest, link_or_copy, replace_folder, write_json
from data.pipeline.reader import ShardReader
from data.progress import Progress
from data.shards.identity import Identity, confirm, identity, stamp
from retrieval.detail import Detail, folder_name, manifest_format, of_manifest, said, to_manifest
from retrieval.embed.config import BATCH_SIZE, check_batches
from retrieval.embed.encode import check_details, reader_cuts, start_batch
from retrieval.embed.manifest import read_manifest
from retrieval.embed.partitions import (
    PartitionWriter,
    metadata_file,
    partition_files,
    read_facts,
)

Step = tuple[int, EvalBatch | None, bool]  # of `ShardReader.steps`
Embeds = Mapping[Detail, Float[np.ndarray, "b d"]]


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
    *,
    max_tokens: Sequence[int] = (),
    fit: Fit | None = None,
) -> dict[str, Any]:
    """Embed the images of `shards` at every patch size, or within every budget. Returns the
    manifest.

    shards: expanded names, see `data.shards.expand_shards`. batch_size: images read together, one
    rank; 0: 64, on a GPU 512. model_dir: where `model` was loaded from; noted for `build_index`.
    max_tokens: budgets of patches per image, in place of patch sizes. fit: how images become what
    the tower reads, see `ImageTransform.fit`; the model's own when not given.
    Ranks share the shards. Images that cannot be read are skipped and counted by kind in the
    manifest; with on_error="raise" the first one ends the run. Peak memory does not depend on a
    shard's length.
    A finished `out` of the same model, shards and patch sizes is returned as it is, but shards that
    were replaced since are embedded again (`data.shards.identity`; 0.1.0 noted nothing of shards).
    Any other `out` raises `UsageError`, as do a result without an image and another program that
    writes it. Raises `DataError` where a shard is replaced while it is read.
    """
    check_batches(batch_size, num_workers)
    out = Path(out)
    model = with_fit(model, fit)
    details = check_details(model, patch_sizes, max_tokens)
    shards = [s if "://" in s or s.startswith("pipe:") else os.path.abspath(s) for s in shards]
    shards = list(dict.fromkeys(shards))
    check_utf8(*shards, str(out))
    for file in (out / "manifest.json", out.with_name(out.name + ".partial") / "plan.json"):
        with suppress(OSError, ValueError, AttributeError, KeyError):  # what is wrong is said below
            found = json.loads(file.read_text())
            if fit in (None, found.get("fit", "crop")):
                model.keep_transform(found["image_fingerprint"], file.parent)
    plan = {
        "format": manifest_format(details),
        "image_fingerprint": model.image_fingerprint,
        "text_fingerprint": model.text_fingerprint,
        "model": _named(model_dir),
        "width": model.embed_dim,
        **to_manifest(details),
        "shards": shards,
    }
    if fit is not None or model.transform.fit != "crop":
        plan["fit"] = model.transform.fit
    read = functools.partial(
        ShardReader,
        transform=model.transform,
        batch_size=batch_size or images_read_together(model.device),
        num_workers=num_workers,
        on_error=on_error,
        allow_pipe=allow_pipe,
        digests=True,
        cuts=reader_cuts(model, details),
    )
    with locked(out, beside=True):
        return _embed_all(model, plan, out, read)


def _embed_all(
    model: LitModel, plan: dict[str, Any], out: Path, read: Callable[[list[str]], ShardReader]
) -> dict[str, Any]:
    """`embed_shards` by its plan."""
    shards, details = plan["shards"], of_manifest(plan)
    kept: list[int] = []  # partitions of a finished folder that stay
    if out.is_dir() and any(out.iterdir()):
        finished = read_manifest(out)
        _check_same(out, plan, finished)
        partitions = finished["partitions"]
        current = _current(shards, [entry.get("identity", {}) for entry in partitions])
        if len(current) == len(shards):
            return _renew(out, plan, finished, current)
        kept = [*current]
    part = out.with_name(out.name + ".partial")
    _open_partial(part, plan, out, kept)
    facts = [read_facts(part, number) for number in range(len(shards))]
    done = _current(shards, [None if known is None else known.identity for known in facts])
    mine = [n for n in range(len(shards)) if n % world_size() == rank()]
    todo = [n for n in mine if n not in done]
    with Progress(
        total=len(mine),
        initial=len(mine) - len(todo),
        desc=f"embedding at {said(*details)}",
        unit="shard",
        disable=not is_main(),
    ) as bar:
        if todo:
            reader = read([shards[n] for n in todo])
            _write_partitions(part, model, reader, todo, details, bar)
    barrier(patient=True)
    manifest = _join(part, plan)
    barrier()
    if not manifest["count"]:
        if is_main():
            shutil.rmtree(part)
        skipped = ", ".join(f"{kind} {n:,}" for kind, n in manifest["errors"].items()) or "none"
        raise UsageError(f"no image could be embedded of {_short(shards)}; skipped: {skipped}")
    if is_main():
        write_json(part / "manifest.json", manifest)
        replace_folder(part, out)  # first: without its plan it would be begun anew
        (out / "plan.json").unlink()
    barrier()
    return read_manifest(out)


def _write_partitions(
    partial: Path,
    model: LitModel,
    reader: ShardReader,
    numbers: Sequence[int],
    details: Sequence[Detail],
    bar: Progress,
) -> None:
    """A partition for each shard of `reader`; numbers: theirs, in turn."""
    seen = 0
    found: dict[int, Future[Identity]] = {}
    with ThreadPoolExecutor(1) as digesting, ExitStack() as opened:

        def start() -> Iterator[tuple[Step, Callable[[], Embeds]]]:
            for position, batch, last in reader.steps():
                if position not in found:  # beside the forwards
                    found[position] = digesting.submit(identity, reader.shards[position])
                embeds = dict if batch is None else start_batch(model, batch, details)
                yield (position, batch, last), embeds

        writer: PartitionWriter | None = None
        for (position, batch, last), embeds in one_ahead(start()):
            shard = reader.shards[position]
            if writer is None:
                made = PartitionWriter(partial, numbers[position], shard, details, model.embed_dim)
                writer = opened.enter_context(made)
            if batch is not None:
                writer.add(batch, embeds)
                seen += len(batch.keys)
                bar.set_postfix(images=seen)
            if last:
                try:
                    known = found.pop(position).result()
                    seen_as = (reader.stamps.get(position, {}), stamp(shard))
                except OSError as error:
                    raise DataError(f"shard {shard!r} went away while it was read") from error
                if any(known != {**known, **other} for other in seen_as):
                    raise DataError(f"shard {shard!r} was replaced while it was read, start again")
                writer.finish(reader.shard_errors.get(position, {}), known)
                opened.close()
                writer = None
                bar.update()


def _current(
    shards: Sequence[str], noted: Sequence[Mapping[str, Any] | None]
) -> dict[int, Identity]:
    """Numbers of the shards that are still what was noted of them (None: nothing was embedded), and
    what to note from now on. Ranks share the shards."""
    current = {}
    own = range(rank(), len(shards), world_size())
    for number in Progress(own, "checking shards", delay=2, unit="shard", disable=not is_main()):
        entry = noted[number]
        if entry is not None:
            try:
                found = confirm(shards[number], entry)
            except OSError:  # gone: what was made of it stays
                found = dict(entry)
            if found is not None:
                current[number] = found
    return {n: found for part in gather_objects(current) for n, found in part.items()}


def _renew(
    out: Path,
    plan: Mapping[str, Any],
    manifest: dict[str, Any],
    identities: Mapping[int, Identity],
) -> dict[str, Any]:
    """The manifest of a finished folder, with the names that image embeddings outlive, and the new
    times of shards that are copies."""
    renewed = {**manifest, **{name: plan[name] for name in ("model", "text_fingerprint")}}
    renewed["partitions"] = [
        {**entry, "identity": identities[number]} if "identity" in entry else entry
        for number, entry in enumerate(manifest["partitions"])
    ]
    if renewed != manifest and is_main():
        write_json(out / "manifest.json", renewed)
    return renewed


def _check_same(folder: Path, plan: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    fits = [entries.get("fit", "crop") for entries in (found, plan)]
    names = ["image_fingerprint", "patch_sizes", "max_tokens", "shards"]
    if fits[0] != fits[1] and found.get("image_fingerprint") != plan["image_fingerprint"]:
        names.insert(0, "fit")  # which says more
    for name in names:
        default = {"fit": "crop", "max_tokens": []}.get(name)
        before, now = found.get(name, default), plan.get(name, default)
        if before != now and name == "shards":
            new, gone = (len(set(a) - set(b)) for a, b in ((now, before), (before, now)))
            differ = f"{new:,} of these are new to it, and {gone:,} of its own are not among these"
            what = differ if new or gone else "the same in another order"
            raise UsageError(
                f"{folder} was made of other shards: {what}; embed new shards into another folder, "
                "then launch/index.py --add adds them"
            )
        if before != now:
            what = name.replace("_", " ")
            raise UsageError(
                f"{folder} was made with another {what}: {_short(before)}, "
                f"not {_short(now)}; choose another folder or remove it"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _open_partial(partial: Path, plan: Mapping[str, Any], out: Path, kept: Sequence[int]) -> None:
    """Create the work folder, or check that the one there belongs to the same work.

    kept: partitions of `out` that a new one begins with.
    """
    if is_main():
        plan_file = partial / "plan.json"
        if plan_file.is_file():
            _check_same(partial, plan, json.loads(plan_file.read_text()))
        else:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "metadata").mkdir(parents=True)
            details = of_manifest(plan)
            for detail in details:
                (partial / folder_name(detail) / "img_emb").mkdir(parents=True)
            for number in kept:
                for file in partition_files(out, details, number).values():
                    link_or_copy(file, partial / file.relative_to(out))
            write_json(plan_file, plan)
    barrier()


def _join(partial: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of all partitions."""
    partitions, errors = [], Counter[str]()
    for number, shard in enumerate(plan["shards"]):
        facts = read_facts(partial, number)
        assert facts is not None, "written before the barrier"
        digests = {**facts.blake2b, "metadata": file_digest(metadata_file(partial, number))}
        entry = {"shard": shard, "count": facts.count, "identity": facts.identity}
        partitions.append({**entry, "blake2b": digests, "errors": facts.errors})
        errors.update(facts.errors)
    return {
        **plan,
        "count": sum(p["count"] for p in partitions),
        "errors": dict(errors),
        "partitions": partitions,
    }


def _named(model: str | Path | None) -> str:
    """As the manifest names a model, so that it is found from anywhere."""
    if not model:
        return ""
    if not is_library_spec(str(model)):
        return os.path.abspath(model)
    for mark in ("local-dir:", "@", ":"):
        before, found, path = str(model).partition(mark)
        if found and os.path.exists(path):
            return before + found + os.path.abspath(path)
    return str(model)
