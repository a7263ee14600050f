"""Makes the regions of an index, and brings them up to date when the index has changed.

They lie in NAME/regions, an index folder without a model: a vector for each of `WINDOWS` of each
picture, with the picture's id under `image` and the box's `left`, `top`, `right` and `bottom`, from
0 to 1. What is of a picture stays in the index itself, which knows nothing of its regions.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from contrastive.model.with_fit import with_fit
from data.batch import Pixels, batch_pixels
from data.errors import UsageError
from data.locks import only_writer
from data.problems import Problem, attempt
from data.progress import Progress
from data.shards.location import ImageLocation, read_images
from retrieval.detail import Detail, coarsest, said
from retrieval.embed.encode import embed_pixels
from retrieval.embed.partitions import METADATA_SCHEMA
from retrieval.index.build import change_index, new_manifest, write_base
from retrieval.index.config import Device
from retrieval.index.folder import commit
from retrieval.index.gpu_check import num_gpus
from retrieval.index.row_sources import RowsInMemory
from retrieval.index.snapshot import Snapshot
from retrieval.index.widen import compact_when_due
from retrieval.index_places import index_folder, regions_folder
from retrieval.regions.boxes import WINDOWS
from retrieval.regions.opened import BOX, IMAGE, write_unread
from retrieval.regions.parts import read_parts, reads_whole

SCHEMA = pa.schema([*METADATA_SCHEMA, (IMAGE, pa.int64()), *((name, pa.float32()) for name in BOX)])
BATCH = 16  # pictures whose windows share a forward
WRITE_EVERY = 2048  # pictures: 41 MB at width 384
GONE = "gone_or_changed"  # a picture: its file is not there, or holds another by now
_READERS = 4  # threads that read and decode


@dataclass(frozen=True)
class RegionsReport:
    """What a run did."""

    added: int  # pictures
    gone: int  # pictures
    unread: Mapping[str, int]  # pictures that cannot be read, by reason; the next run tries again
    count: int  # regions in all
    patch_sizes: tuple[Detail, ...]

    def line(self) -> str:
        """In words."""
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.unread.items()))
        unread = f"; cannot be read: {kinds}" if kinds else ""
        return (
            f"{self.count:,} regions at {said(*self.patch_sizes)}; pictures added: {self.added:,}, "
            f"gone: {self.gone:,}{unread}"
        )


def index_regions(
    folder: str | Path,
    patch_sizes: Sequence[int] = (),
    device: Device = "auto",
    model: LitModel | None = None,
    *,
    progress: bool = True,
) -> RegionsReport:
    """Embed the windows of an index's pictures, of those that have none yet.

    patch_sizes: of the index's; none means its coarsest, or its smallest budget of tokens, or what
    its regions have already. model: None for the index's own. progress: show a bar. Pictures are
    read where they lie; what was done stays where a run is interrupted.
    Raises `UsageError` for Milvus, for a patch size that the index has not, or its regions have
    not, for a model with another image tower, and while another program makes them.
    """
    folder = index_folder(folder, "indexing parts of pictures")
    regions = regions_folder(folder)
    with only_writer(regions):
        snapshot = Snapshot.open(folder)
        before = _opened(regions, snapshot, patch_sizes)
        details = before.patch_sizes
        images = _images(before)
        stale = ~np.isin(images, snapshot.ids())
        if stale.any():
            change_index(regions, delete=before.ids()[stale].tolist())
        new = np.setdiff1d(snapshot.ids(), images)
        added, unread = 0, defaultdict[str, list[int]](list)
        if len(new):
            if model is None:
                on = "cuda" if num_gpus(device) else "cpu"
                model = LitModel.from_pretrained(folder / "model", device=on)
            model = _checked(model, snapshot)
            what = f"regions at {said(*details)}"
            with Progress(total=len(new), desc=what, unit="img", disable=not progress) as bar:
                for start in range(0, len(new), WRITE_EVERY):
                    part = new[start : start + WRITE_EVERY]
                    embeds = _embed(model, snapshot, part, details, bar, unread)
                    added += len(embeds)
                    _write(regions, embeds, details)
        write_unread(regions, unread)
        compact_when_due(regions, device)
        count = len(Snapshot.open(regions))
    counts = {kind: len(ids) for kind, ids in unread.items()}
    return RegionsReport(added, len(np.unique(images[stale])), counts, count, details)


def _checked(model: LitModel, snapshot: Snapshot) -> LitModel:
    """As it reads parts of the index's pictures. Raises `UsageError` for another image tower."""
    model, found = with_fit(model, snapshot.manifest.fit), snapshot.manifest.image_fingerprint
    if model.image_fingerprint != found and not model.keep_transform(found, snapshot.folder):
        raise UsageError(f"{snapshot.folder} was made with another image tower; give that")
    return reads_whole(model)


def _images(regions: Snapshot) -> Int[np.ndarray, " n"]:
    """Of each region its picture's id."""
    if regions.columns is None:
        return np.zeros(0, np.int64)
    return regions.column_values(IMAGE).to_numpy()


def _opened(regions: Path, snapshot: Snapshot, details: Sequence[Detail]) -> Snapshot:
    """The regions so far, none of an index that has none. Raises as `index_regions`."""
    manifest = snapshot.manifest
    if any(size not in snapshot.patch_sizes for size in details):
        raise UsageError(
            f"regions at {said(*details)}: {snapshot.folder} holds {said(*snapshot.patch_sizes)}; "
            "allowed are these"
        )
    if (regions / "manifest.json").is_file():
        found = Snapshot.open(regions)
        if found.manifest.image_fingerprint != manifest.image_fingerprint:
            raise UsageError(f"{regions} was made with another image tower; remove it first")
        if details and set(details) != set(found.patch_sizes):
            raise UsageError(
                f"{regions} holds {said(*found.patch_sizes)}, not {said(*details)}; remove it to "
                "make others"
            )
        return found
    unfinished = regions.with_name(regions.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    empty = new_manifest(
        manifest.image_fingerprint, manifest.text_fingerprint, manifest.width,
        tuple(dict.fromkeys(details)) or (coarsest(snapshot.patch_sizes),),
        latency_ms=manifest.latency_ms, memory_gib=manifest.memory_bytes / 2**30,
    )  # fmt: skip
    empty, segments = write_base(unfinished, empty, [], "cpu", snapshot.folder / "model")
    commit(unfinished, empty, segments)
    unfinished.rename(regions)
    return Snapshot.open(regions)


def _embed(
    model: LitModel,
    snapshot: Snapshot,
    ids: Int[np.ndarray, " n"],
    details: Sequence[Detail],
    bar: Progress,
    unread: Mapping[str, list[int]],
) -> dict[int, Mapping[Detail, Float[np.ndarray, "w d"]]]:
    """By id, the vectors of a picture's windows; without the pictures that cannot be read, whose
    ids are added to `unread` by reason."""
    found: dict[int, Mapping[Detail, np.ndarray]] = {}
    read = partial(_windows, model, details)
    with ThreadPoolExecutor(_READERS) as pool:
        for part in _in_order(snapshot, ids):
            files = read_images(location for _, location in part)
            good: list[tuple[int, list[Pixels]]] = []
            for (id, _), windows in zip(part, pool.map(read, files), strict=True):
                if isinstance(windows, Problem):
                    unread[windows.kind].append(id)
                else:
                    good.append((id, windows))
            if good:
                together = batch_pixels([pixels for _, windows in good for pixels in windows])
                embeds = embed_pixels(model, together, details)
                for number, (id, windows) in enumerate(good):
                    rows = slice(number * len(windows), (number + 1) * len(windows))
                    found[id] = {detail: embeds[detail][rows] for detail in details}
            bar.update(len(part))
    return found


def _in_order(
    snapshot: Snapshot, ids: Int[np.ndarray, " n"]
) -> Iterator[list[tuple[int, ImageLocation]]]:
    """Where pictures lie, neighbours of a shard together, `BATCH` at a time."""
    places = [(row["id"], ImageLocation.of(row)) for row in snapshot.rows(ids)]
    places.sort(key=lambda place: place[1][:2])
    for start in range(0, len(places), BATCH):
        yield places[start : start + BATCH]


def _windows(
    model: LitModel, details: Sequence[Detail], data: bytes | None
) -> list[Pixels] | Problem:
    if data is None:
        return Problem(GONE, "", "")
    return attempt("", partial(read_parts, model, data, WINDOWS, details))


def _write(
    regions: Path,
    embeds: Mapping[int, Mapping[Detail, Float[np.ndarray, "w d"]]],
    details: Sequence[Detail],
) -> None:
    """The windows of some pictures, in one step."""
    if not embeds:
        return
    count = len(embeds) * len(WINDOWS)
    boxes = np.tile(np.array(WINDOWS, np.float32), (len(embeds), 1))
    columns = {
        **{name: [""] * count for name in ("key", "caption", "shard")},
        **{name: np.zeros(count, np.int64) for name in ("offset", "size")},
        IMAGE: np.repeat(np.array([*embeds], np.int64), len(WINDOWS)),
        **{name: boxes[:, number] for number, name in enumerate(BOX)},
    }
    vectors = {
        detail: np.concatenate([rows[detail] for rows in embeds.values()]) for detail in details
    }

    def rows_from(first_id: int) -> list[RowsInMemory]:
        ids = first_id + np.arange(count, dtype=np.int64)
        table = pa.Table.from_pydict({"id": ids, **columns}, schema=SCHEMA)
        return [RowsInMemory(vectors, table)]

    change_index(regions, add=rows_from)
