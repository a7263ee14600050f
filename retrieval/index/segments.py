"""A segment: rows and their vectors, never changed once written. See `folder.py` for its files."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int

from data.errors import UsageError
from data.files import file_digest
from data.progress import say_once
from retrieval.detail import Detail, folder_name, said
from retrieval.index.choose import needs_tuning, type_for_count
from retrieval.index.config import IndexType
from retrieval.index.create import add, ivf_of, new_index, num_training, type_of
from retrieval.index.exact import RunningBest
from retrieval.index.faiss_setup import faiss
from retrieval.index.folder import index_file, rows_file, segment_files, words_file
from retrieval.index.gpu_check import has_cagra
from retrieval.index.gpus import MIN_LINKED, link_by_gpu
from retrieval.index.manifest import SegmentEntry, Tuning
from retrieval.index.row_sources import (
    BLOCK_ROWS,
    RowSource,
    blocks,
    cast_to_schema,
    index_schema,
)
from retrieval.index.tune import NUM_MOVED, K, Trial, moved_vectors
from retrieval.words.fill import write_words
from retrieval.words.text_file import WordsFile, lacking, open_words

READ_FLAGS = faiss.IO_FLAG_MMAP_IFC


# ---- write ---------------------------------------------------------------------------------


def write_segment(
    folder: Path,
    number: int,
    index_type: IndexType,
    sources: Sequence[RowSource],
    span: tuple[int, int],
    patch_sizes: Sequence[Detail],
    width: int,
    schema: pa.Schema | None = None,
    gpus: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int], object] = lambda count: None,
    captions: Float[np.ndarray, "q d"] | None = None,
) -> tuple[SegmentEntry, dict[Detail, Trial]]:
    """Write rows span[0] to span[1] of `sources` as segment `number`.

    schema: of the index's metadata; None takes that of the first source. gpus: that FAISS trains
    on. device: that finds the inverted list of each vector; None for FAISS on the CPU. progress: is
    told how many vectors were added. captions: queries to tune by, None for vectors of the segment.
    Two threads write the words and digest files that are there, meanwhile.
    Memory: one patch size's index, and a block; 770 bytes a vector more while a GPU links an hnsw.
    Returns the segment's entry in the manifest, and
    what to tune it by per patch size, nothing for exact ones. Raises `UsageError` for rows whose
    ids do not ascend, and vectors that are not finite or of another width.
    """
    count = span[1] - span[0]
    index_type = type_for_count(index_type, count)
    ids = _write_rows(rows_file(folder, number), sources, span, schema)
    files = segment_files(folder, number, patch_sizes)
    trials: dict[Detail, Trial] = {}
    with ThreadPoolExecutor(2) as beside:  # of what the vectors keep busy
        words = beside.submit(_write_words, folder, number)
        digests = {"metadata": beside.submit(file_digest, rows_file(folder, number))}
        for patch_size in patch_sizes:
            sample, found = np.zeros((0, width), np.float32), None
            if needs_tuning(index_type, count):
                share = min(1.0, max(num_training(index_type, count), 2 * NUM_MOVED) / count)
                sample = _sample(sources, patch_size, span, share, width)
                queries = moved_vectors(sample) if captions is None else captions
                found = RunningBest(queries, K)
            by_gpu = index_type == "hnsw" and gpus > 0 and count >= MIN_LINKED and has_cagra()
            index = new_index(index_type, width, count, sample, gpus, linked_later=by_gpu)
            done = 0
            for vectors in _vectors(sources, span, patch_size, width):
                there = None
                if found is not None:
                    there = torch.from_numpy(np.require(vectors, requirements="W")).to(
                        device or "cpu"
                    )
                    found.add(there)
                add(index, vectors, ids[done : done + len(vectors)], there if device else None)
                done += len(vectors)
                progress(len(vectors))
            if by_gpu and (problem := link_by_gpu(faiss.downcast_index(index.index))):
                say_once(f"the hnsw graph of {said(patch_size)} is made on the CPU: {problem}")
                index = new_index(index_type, width, count, sample)
                progress(-count)
                for vectors in _vectors(sources, span, patch_size, width):
                    add(index, vectors, ids[index.ntotal : index.ntotal + len(vectors)])
                    progress(len(vectors))
            if found is not None:
                trials[patch_size] = Trial(queries, found.rows(), captions is not None)
            file = index_file(folder, patch_size, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(file.name + ".part")
            try:
                faiss.write_index(index, str(part))
                whole = _read(part).ntotal == count  # FAISS does not say so where closing fails
            except (RuntimeError, UsageError):
                whole = False
            if not whole:
                raise UsageError(f"{part} cannot be written; is the disk full?")
            part.replace(file)
            digests[folder_name(patch_size)] = beside.submit(file_digest, file)
    entry = SegmentEntry(
        number,
        index_type,
        count,
        first_id=int(ids[0]),
        last_id=int(ids[-1]),
        bytes={name: file.stat().st_size for name, file in files.items()},
        blake2b={name: digests[name].result() for name in files},
        words=words.result(),
    )
    return entry, trials


def _sample(
    sources: Sequence[RowSource],
    patch_size: Detail,
    span: tuple[int, int],
    share: float,
    width: int,
) -> Float[np.ndarray, "n d"]:
    """About `share` of the vectors, the same ones every time."""
    draw = np.random.default_rng(0)
    chosen = [np.zeros((0, width), np.float32)]
    for source, start, stop in blocks(sources, *span):
        rows = draw.random(stop - start) < share
        if rows.any():
            vectors = checked_vectors(source.vectors(patch_size, start, stop), width, patch_size)
            chosen.append(vectors[rows])
    return np.concatenate(chosen)


def _vectors(
    sources: Sequence[RowSource], span: tuple[int, int], patch_size: Detail, width: int
) -> Iterator[Float[np.ndarray, "n d"]]:
    """All vectors, block after block."""
    for source, start, stop in blocks(sources, *span):
        yield checked_vectors(source.vectors(patch_size, start, stop), width, patch_size)


def checked_vectors(
    vectors: Float[np.ndarray, "n d"], width: int, patch_size: Detail
) -> Float[np.ndarray, "n d"]:
    """The same; FAISS would end in a traceback, or find nothing."""
    if vectors.shape[1] != width:
        raise UsageError(
            f"vectors at {said(patch_size)} are of width {vectors.shape[1]}, not {width}; "
            "embed these images again"
        )
    # a sum is finite where all of its terms are, and needs no second array
    if not np.isfinite(vectors.sum()) and not np.isfinite(vectors).all():
        raise UsageError(
            f"vectors at {said(patch_size)} hold numbers that are not finite; embed these "
            "images again"
        )
    return vectors


def _write_rows(
    file: Path, sources: Sequence[RowSource], span: tuple[int, int], schema: pa.Schema | None
) -> Int[np.ndarray, " n"]:
    """The metadata file, record batch after record batch; returns the ids."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    ids, writer = [np.zeros(0, np.int64)], None
    with pa.OSFile(str(part), "wb") as sink:
        for source, start, stop in blocks(sources, *span):
            block = source.metadata(start, stop)
            schema = schema or index_schema(block)
            block = cast_to_schema(block, schema)
            ids.append(block["id"].to_numpy())
            writer = writer or pa.ipc.new_file(sink, schema)
            writer.write_table(block.combine_chunks(), max_chunksize=BLOCK_ROWS)
        assert writer is not None, "a segment has rows"
        writer.close()
    joined = np.concatenate(ids)
    if (np.diff(joined) <= 0).any():
        raise UsageError("the ids of the metadata do not ascend; embed these shards again")
    part.replace(file)
    return joined


def _write_words(folder: Path, number: int) -> dict[str, Any]:
    """Of the rows that were written."""
    if problem := lacking():
        say_once(f"{problem}, so images are not found by the words of their texts")
        return {}
    with pa.memory_map(str(rows_file(folder, number))) as file:
        return write_words(words_file(folder, number), pa.ipc.open_file(file).read_all())


# ---- read ----------------------------------------------------------------------------------


class Segment:
    """One segment, opened: memory-mapped metadata, and per patch size its vectors.

    Everything is opened at once, so that files which a later change removes stay readable.
    """

    def __init__(
        self,
        folder: Path,
        entry: SegmentEntry,
        patch_sizes: Iterable[Detail],
        width: int,
        tombstones: Int[np.ndarray, " t"],
    ) -> None:
        """tombstones: deleted ids, ascending. Raises `UsageError` for a file that is damaged or not
        what the entry says, FileNotFoundError for one that is gone."""
        self.entry, self.number, self.count = entry, entry.number, entry.count
        self.index_type = entry.index_type
        self.words = _open_words(words_file(folder, entry.number), entry.words)
        file = rows_file(folder, self.number)
        _check_bytes(file, entry.bytes.get("metadata"))
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            self.table.validate()
            self.ids = self.table["id"].to_numpy()
        except FileNotFoundError:
            raise
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:  # OSError: its footer
            raise UsageError(f"{file} is damaged; build the index again") from error
        self._batches = self.table.to_batches()
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches[:-1])])
        if len(self.ids) != self.count:
            raise UsageError(f"{file} has {len(self.ids)} rows, not {self.count}; build it again")
        self._maps: dict[Detail, Any] = {}
        self.indexes: dict[Detail, faiss.Index] = {}  # what lies inside an `IndexIDMap`
        for size in patch_sizes:
            path = index_file(folder, size, self.number)
            _check_bytes(path, entry.bytes.get(folder_name(size)))
            self._maps[size] = whole = _read(path)
            if whole.d != width or whole.ntotal != self.count:
                raise UsageError(
                    f"{path} holds {whole.ntotal} vectors of width {whole.d}, not {self.count} of "
                    f"width {width}; build the index again"
                )
            self.indexes[size] = faiss.downcast_index(whole.index)
        places = np.searchsorted(self.ids, tombstones)
        places = places[places < self.count]
        gone = places[np.isin(self.ids[places], tombstones)]
        self.alive: Bool[np.ndarray, " n"] = np.ones(self.count, bool)
        self.alive[gone] = False
        self.num_alive = int(self.alive.sum())

    def tuning(self, patch_size: Detail) -> Tuning:
        """How far a search looks by default."""
        return self.entry.tuning.get(patch_size, Tuning())

    def places(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The rows of ids that are alive, -1 for others."""
        rows = np.minimum(np.searchsorted(self.ids, ids), self.count - 1)
        return np.where((self.ids[rows] == ids) & self.alive[rows], rows, -1)

    def rows(self, places: Int[np.ndarray, " n"]) -> list[dict[str, Any]]:
        """The columns of rows, in turn."""
        found: list[dict[str, Any]] = [{}] * len(places)
        batches = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(batches):
            at = np.flatnonzero(batches == number)
            local = pa.array(places[at] - self._starts[number])
            part = self._batches[number].take(local).to_pylist()
            for place, row in zip(at.tolist(), part, strict=True):
                found[place] = row
        return found

    def reconstruct(
        self, patch_size: Detail, rows: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n d"]:
        """The stored vectors of rows. Not thread-safe until the first call has returned: an ivf
        then builds its table of where every row lies, 8 bytes each."""
        index: Any = self.indexes[patch_size]
        if isinstance(index, faiss.IndexIVF) and index.direct_map.no():
            index.make_direct_map(True)
        return index.reconstruct_batch(np.ascontiguousarray(rows, np.int64))


class SurvivingRows:
    """The rows of a segment that were not deleted, as a `RowSource` for a compaction."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._rows = np.flatnonzero(segment.alive)
        self.count = len(self._rows)

    def vectors(self, patch_size: Detail, start: int, stop: int) -> Float[np.ndarray, "n d"]:
        return self._segment.reconstruct(patch_size, self._rows[start:stop])

    def metadata(self, start: int, stop: int) -> pa.Table:
        return self._segment.table.take(pa.array(self._rows[start:stop]))


def _open_words(file: Path, noted: Mapping[str, Any]) -> WordsFile | None:
    """None where there are none, or damaged ones: vectors are searched without them."""
    try:
        return open_words(file, noted) if noted else None
    except UsageError:
        return None


def _read(file: Path) -> Any:
    try:
        whole = faiss.read_index(str(file), READ_FLAGS)
        if not isinstance(whole, faiss.IndexIDMap):
            raise UsageError(f"{file} is no index of this project; build the index again")
        type_of(faiss.downcast_index(whole.index))
        ivf = ivf_of(faiss.downcast_index(whole.index))
    except RuntimeError as error:
        if not file.exists():  # a writer has swept it since its size was looked at
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from None
        raise UsageError(f"{file} is damaged; build the index again") from error
    if ivf is not None:
        ivf.parallel_mode = 0  # one thread per query; several queries share the cores
    return whole


def _check_bytes(file: Path, expected: int | None) -> None:
    """Raises FileNotFoundError where the file is gone, `UsageError` where its size is another."""
    size = file.stat().st_size
    if expected is not None and size != expected:
        raise UsageError(f"{file} has {size} bytes, not {expected}: it is damaged; build it again")
