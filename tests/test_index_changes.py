"""Deletions, additions and merges of an index, while others read it, and when they are killed."""

import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import run
from full_disk import small_files
from index_maker import PATCH, all_vectors, clustered, nearest, recall, write_embeddings

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.embed.partitions import metadata_file, read_metadata
from retrieval.index.build import (
    add_embeddings,
    build_index,
    change_index,
    compact_index,
    delete_ids,
)
from retrieval.index.choose import RERANKED, bytes_per_vector
from retrieval.index.config import INDEX_TYPES
from retrieval.index.faiss_setup import faiss
from retrieval.index.row_sources import RowsInMemory
from retrieval.index.snapshot import Snapshot
from retrieval.search.searcher import Searcher

LAUNCH = Path(__file__).parents[1] / "launch"
WHOLE = {"flat": 1.0, "flat16": 0.98, "ivf": 0.9, "ivfpq": 0.9, "rabitq": 0.9, "hnsw": 0.95}


@pytest.fixture
def first(tiny_model: LitModel, model_dir: Path, tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "first", tiny_model, model_dir, (1200, 300))


@pytest.fixture
def second(tiny_model: LitModel, model_dir: Path, tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "second", tiny_model, model_dir, (200, 0, 100), seed=1)


def rows(count: int, width: int, seed: int):
    """What `change_index` adds: `count` vectors around the usual centres."""
    vectors = clustered(count, width, seed)

    def add(first_id: int) -> list[RowsInMemory]:
        names = [f"{seed}-{row}" for row in range(count)]
        columns = dict.fromkeys(("key", "caption", "shard"), names)
        numbers = np.zeros(count, np.int64)
        ids = first_id + np.arange(count)
        table = {"id": ids, **columns, "offset": numbers, "size": numbers}
        return [RowsInMemory({PATCH: vectors}, pa.table(table))]

    return add


def test_a_compaction_changes_the_index_type_and_the_memory(first: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(first, index, index_type="flat", device="cpu", memory_gib=1.0)
    queries = all_vectors(first)[0][:5]
    found = Snapshot.open(index).nearest(queries, 10, PATCH)[1]
    compact_index(index, "cpu", "flat", memory_gib=1.0)
    assert Snapshot.open(index).generation == 1  # nothing was to change
    assert compact_index(index, "cpu", "hnsw", memory_gib=2.0) == "hnsw: as asked"
    changed = Snapshot.open(index)
    assert [segment.index_type for segment in changed.segments] == ["hnsw"]
    assert changed.manifest.memory_bytes == 2 << 30
    assert recall(changed.nearest(queries, 10, PATCH)[1], found) >= WHOLE["hnsw"]
    compact_index(index, "cpu", "auto")
    assert Snapshot.open(index).manifest.index_type == "flat"
    for wrong in ({"latency_ms": 0.0}, {"memory_gib": -1.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            compact_index(index, "cpu", **wrong)


def test_ids_that_are_not_held_are_named(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    build_index(first, index, device="cpu")
    id = int(all_vectors(first)[1][0])

    def delete(*ids: int) -> str:
        typed = ["index.py", "--out", str(index), "--delete", *map(str, ids)]
        monkeypatch.setattr(sys, "argv", typed)
        runpy.run_path(str(LAUNCH / "index.py"), run_name="__main__")
        return capsys.readouterr().out

    said = delete(id, -17, 1 << 70)
    assert f"deleted 1 images; it does not hold the ids -17, {1 << 70}" in said
    with pytest.raises(SystemExit):
        delete(id)
    assert f"holds none of the ids to delete: {id}" in capsys.readouterr().err


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_delete_add_and_compact_equal_a_fresh_build(
    index_type, first: Path, second: Path, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    build_index(first, index, index_type=index_type, device="cpu")
    vectors, ids = all_vectors(first)
    gone = ids[::3]
    assert delete_ids(index, [*gone.tolist(), 7, 1 << 40]) == len(gone)
    assert delete_ids(index, gone.tolist()) == 0
    assert add_embeddings(index, second) == 300

    more, _ = all_vectors(second)
    changed = Snapshot.open(index)
    new_ids = changed.ids()[changed.ids() > ids[-1]]
    assert len(new_ids) == 300
    left = np.setdiff1d(ids, gone)
    wanted = np.concatenate([vectors[np.isin(ids, left)], more])
    wanted_ids = np.concatenate([left, new_ids])
    queries = wanted[::20]
    best = nearest(queries, wanted, wanted_ids, 10)
    assert recall(changed.nearest(queries, 10, PATCH)[1], best) >= WHOLE[index_type]

    compact_index(index, device="cpu")
    compacted = Snapshot.open(index)
    assert [segment.index_type for segment in compacted.segments] == [index_type]
    np.testing.assert_array_equal(compacted.ids(), wanted_ids)
    assert len(compacted) == compacted.manifest.count == 1300
    assert not compacted.manifest.tombstones
    keys = [row["key"] for row in compacted.rows(wanted_ids[[0, -1]].tolist())]
    assert keys == ["0-0-1", "1-2-99"]

    # A build of the same rows, from an embeddings folder that holds just them
    fresh = write_embeddings(tmp_path / "fresh", tiny_model, model_dir, (1300,))
    np.save(next(fresh.rglob("*.npy")), wanted)
    build_index(fresh, tmp_path / "fresh index", index_type=index_type, device="cpu")
    built = Snapshot.open(tmp_path / "fresh index")
    found, expected = (s.nearest(queries, 10, PATCH) for s in (compacted, built))
    if (
        index_type in RERANKED
    ):  # its vectors were rounded to float16 before they were trained on anew
        assert recall(found[1], best) >= WHOLE[index_type]
    else:
        np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
        row_of = {id: row for row, id in enumerate(wanted_ids.tolist())}
        as_rows = np.vectorize(row_of.get)(found[1])
        same = (as_rows * 2 == expected[1]).mean()
        assert same >= (1.0 if index_type != "flat16" else 0.99)  # rounding makes ties


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_deleted_images_are_never_found(index_type, first: Path, tmp_path: Path) -> None:
    build_index(first, tmp_path / "index", index_type=index_type, device="cpu")
    vectors, ids = all_vectors(first)
    queries = vectors[::50]
    near = Snapshot.open(tmp_path / "index").nearest(queries, 20, PATCH)[1]
    delete_ids(tmp_path / "index", np.unique(near).tolist())
    snapshot = Snapshot.open(tmp_path / "index")
    found = snapshot.nearest(queries, 20, PATCH)[1]
    assert (found >= 0).all()
    assert not np.isin(found, near).any()
    with pytest.raises(KeyError):
        snapshot.rows([int(near[0, 0])])
    delete_ids(tmp_path / "index", ids.tolist())
    empty = Snapshot.open(tmp_path / "index")
    assert len(empty) == 0
    assert (empty.nearest(queries, 5, PATCH)[1] == -1).all()
    compact_index(tmp_path / "index", device="cpu")
    assert len(Snapshot.open(tmp_path / "index")) == 0


def test_an_image_is_added_once(
    first: Path, second: Path, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    build_index(first, index, index_type="flat", device="cpu")
    assert add_embeddings(index, second) == 300
    before = (index / "manifest.json").read_bytes()
    for again in (first, second):
        with pytest.raises(UsageError, match=r"holds the images of .* already"):
            add_embeddings(index, again)
    assert (index / "manifest.json").read_bytes() == before
    # Of more partitions, those that are new; and one that is there twice, once.
    counts = (200, 0, 100, 50, 50)
    third = write_embeddings(tmp_path / "third", tiny_model, model_dir, counts, seed=1)
    for column in ("key", "offset", "size"):
        copy_column(third, column, 3, 4)
    assert add_embeddings(index, third) == 50
    ids = Snapshot.open(index).ids().tolist()
    delete_ids(index, [ids[-1], ids[-300]])
    vectors, _ = all_vectors(third)
    assert add_embeddings(index, third) == 2  # those that were deleted
    snapshot = Snapshot.open(index)
    again = snapshot.ids()[-2:].tolist()
    assert [row["key"] for row in snapshot.rows(again)] == ["1-0-50", "1-3-49"]
    np.testing.assert_allclose(snapshot.vectors(again, PATCH), vectors[[50, 349]], atol=1e-6)
    build_index(third, tmp_path / "other", index_type="flat", device="cpu")
    assert len(Snapshot.open(tmp_path / "other")) == 350


def copy_column(embeddings: Path, name: str, source: int, target: int) -> None:
    """From one partition's metadata to another's."""
    table = read_metadata(embeddings, target)
    values = read_metadata(embeddings, source)[name]
    table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, metadata_file(embeddings, target))


def test_ids_are_never_given_twice(first: Path, second: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(first, index, index_type="flat", device="cpu")
    seen = set(Snapshot.open(index).ids().tolist())
    for _ in range(3):
        add_embeddings(index, second)
        ids = Snapshot.open(index).ids().tolist()
        new = [id for id in ids if id not in seen]
        assert len(new) == 300
        seen |= set(ids)
        delete_ids(index, new)
        compact_index(index, device="cpu")


def test_additions_larger_than_the_memory_become_several_segments(
    second: Path, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    index, width = tmp_path / "index", tiny_model.embed_dim
    gib = 1100 * bytes_per_vector("flat", width) / 2**30
    build_index(second, index, index_type="flat", device="cpu", memory_gib=gib)
    large = write_embeddings(tmp_path / "large", tiny_model, model_dir, (2000, 1000), seed=7)
    assert add_embeddings(index, large) == 3000
    snapshot = Snapshot.open(index)
    assert [segment.count for segment in snapshot.segments] == [300, 1000, 1000, 1000]
    vectors, _ = all_vectors(large)
    found = snapshot.rows(snapshot.nearest(vectors[::300], 1, PATCH)[1][:, 0].tolist())
    assert [row["key"] for row in found] == [
        f"7-{n // 2000}-{n % 2000}" for n in range(0, 3000, 300)
    ]


def test_many_small_additions_make_few_segments(
    first: Path, tiny_model: LitModel, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    build_index(first, index, index_type="ivf", device="cpu")
    width = tiny_model.embed_dim
    for seed in range(40):
        change_index(index, add=rows(3, width, 1000 + seed))
        if seed == 20:
            added = Snapshot.open(index).ids()[-3:]
            delete_ids(index, added[:1].tolist())
    snapshot = Snapshot.open(index)
    assert len(snapshot) == snapshot.manifest.count == 1500 + 3 * 40 - 1
    assert len(snapshot.segments) <= 8
    for seed in (0, 19, 21, 39):
        query = clustered(3, width, 1000 + seed)
        found = snapshot.rows(snapshot.nearest(query, 1, PATCH)[1][:, 0].tolist())
        assert [row["key"] for row in found] == [f"{1000 + seed}-{n}" for n in range(3)]
        assert found[0]["even"] is None  # a column that additions did not bring


def test_what_cannot_be_added_is_refused(
    first: Path, second: Path, tiny_model: LitModel, tmp_path: Path
) -> None:
    index, width = tmp_path / "index", tiny_model.embed_dim
    build_index(first, index, index_type="flat", device="cpu")
    before = (index / "manifest.json").read_bytes()
    broken = rows(3, width, 1)(10**9)
    broken[0]._vectors[PATCH][1, 2] = np.nan
    with pytest.raises(UsageError, match="not finite"):
        change_index(index, add=lambda first_id: broken)
    table = pa.table({"id": [10**9], "nonsense": [1]})
    with pytest.raises(UsageError, match="nonsense"):
        change_index(index, add=lambda id: [RowsInMemory({PATCH: clustered(1, width)}, table)])
    (second / "manifest.json").write_text(
        (second / "manifest.json")
        .read_text()
        .replace('image_fingerprint": "', 'image_fingerprint": "x')
    )
    with pytest.raises(UsageError, match="another image tower"):
        add_embeddings(index, second)
    with pytest.raises(UsageError, match="there is no folder"):
        delete_ids(tmp_path / "nowhere", [1])
    assert (index / "manifest.json").read_bytes() == before
    assert len(Snapshot.open(index)) == 1500


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_readers_see_every_change_whole(
    index_type, first: Path, tiny_model: LitModel, tmp_path: Path
) -> None:
    """Threads search and reload while images are added in pairs of twins, deleted in pairs, and
    merged: any result holds both twins or none, and every hit has its metadata."""
    index, width = tmp_path / "index", tiny_model.embed_dim
    build_index(first, index, index_type=index_type, device="cpu")
    searcher = Searcher.load(index, tiny_model, device="cpu")
    probe = clustered(1, width, 77)
    stop, failures, searches = threading.Event(), [], [0]

    def twins(first_id: int) -> list[RowsInMemory]:
        made = rows(2, width, 78)(first_id)
        made[0]._vectors[PATCH][:] = probe
        return made

    def read() -> None:
        try:
            while not stop.is_set():
                (hits,) = searcher.search_embeds(probe, k=40, nprobe=10_000, ef=200)
                same = [hit for hit in hits if hit.similarity > 0.999]
                assert len(hits) == 40
                assert len(same) % 2 == 0
                searches[0] += 1
                searcher.reload()
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(6):
        change_index(index, add=twins)
        if turn % 2:
            compact_index(index, device="cpu")
        newest = Snapshot.open(index).ids()[-2:]
        if turn % 3 == 2:
            delete_ids(index, newest.tolist())
    time.sleep(0.1)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert searches[0] > 10
    searcher.reload()
    (hits,) = searcher.search_embeds(probe, k=40)
    assert sum(hit.similarity > 0.999 for hit in hits) == 8


@pytest.mark.parametrize("index_type", ["flat", "ivf"])
def test_an_index_that_changes_while_it_is_opened_is_opened_again(
    index_type, first: Path, tiny_model: LitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer sweeps files between a reader's look at their size and its reading of them."""
    index = tmp_path / "index"
    build_index(first, index, index_type=index_type, device="cpu")
    delete_ids(index, [0])
    read, opened = faiss.read_index, []

    def swept_first(*arguments: object) -> object:
        opened.append(arguments)
        if len(opened) == 1:
            compact_index(index, "cpu")
        return read(*arguments)

    monkeypatch.setattr(faiss, "read_index", swept_first)
    assert len(Searcher.load(index, tiny_model, device="cpu")) == 1499


def flip(file: Path, place: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 4
    file.write_bytes(data)


def test_damage_is_not_written_anew(
    first: Path, second: Path, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    """A merge would give damaged vectors and rows a good digest."""
    for number, name in enumerate((f"patch_{PATCH}/image.index", "metadata/metadata_0000.arrow")):
        index = tmp_path / f"index{number}"
        build_index(first, index, index_type="flat", device="cpu")
        delete_ids(index, [0])
        flip(index / name)
        with pytest.raises(UsageError, match=f"{Path(name).name} is damaged"):
            compact_index(index, "cpu")
    add_embeddings(index, second)  # a segment of its own, which is good
    flip(index / f"patch_{PATCH}" / "image_0001.index")
    before = (index / "manifest.json").read_bytes()
    third = write_embeddings(tmp_path / "third", tiny_model, model_dir, (300,), seed=2)
    with pytest.raises(UsageError, match=r"image_0001\.index is damaged"):
        add_embeddings(index, third)
    assert (index / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("max_bytes", [70_000, 150_000])
def test_a_full_disk_leaves_the_index_as_it_was(
    max_bytes: int, first: Path, second: Path, tmp_path: Path
) -> None:
    """Whether it is the metadata or the vectors that do not fit."""
    index = tmp_path / "index"
    build_index(first, index, index_type="flat", device="cpu")
    delete_ids(index, [0])
    before = (index / "manifest.json").read_bytes()
    with small_files(max_bytes), pytest.raises((UsageError, OSError)) as refused:
        compact_index(index, "cpu")
    assert isinstance(refused.value, OSError) or "is the disk full?" in str(refused.value)
    assert (index / "manifest.json").read_bytes() == before
    assert len(Snapshot.open(index)) == 1499
    compact_index(index, "cpu")


def test_damaged_tombstones_are_noticed(first: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(first, index, index_type="flat", device="cpu")
    delete_ids(index, [0, 2, 4])
    (file,) = index.glob("deleted_*.npy")
    flip(file, 0.99)
    with pytest.raises(UsageError, match=rf"{file.name} is damaged"):
        Snapshot.open(index)


def test_an_open_index_outlives_the_files_it_was_opened_from(first: Path, tmp_path: Path) -> None:
    for index_type in INDEX_TYPES:
        index = tmp_path / index_type
        build_index(first, index, index_type=index_type, device="cpu")
        vectors, ids = all_vectors(first)
        old = Snapshot.open(index)
        before = old.nearest(vectors[::100], 10, PATCH)
        delete_ids(index, ids[::2].tolist())
        compact_index(index, device="cpu")
        assert not (index / f"patch_{PATCH}" / "image.index").exists()
        after = old.nearest(vectors[::100], 10, PATCH)
        np.testing.assert_array_equal(before[1], after[1])
        assert old.rows([int(ids[0])])[0]["key"] == "0-0-0"


def test_one_writer_at_a_time(first: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(first, index, index_type="flat", device="cpu")
    program = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(index / ".lock")], stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(UsageError, match="another program"):
        delete_ids(index, [0])
    other.kill()
    other.wait()
    other.stdout.close()
    assert delete_ids(index, [0]) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
import retrieval.index.build as index
import retrieval.index.folder as folder_files
folder, embeddings, step, after = sys.argv[1:]
left = [int(after)]
def dying(function):
    def call(*arguments, **options):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return function(*arguments, **options)
    return call
index.write_segment = dying(index.write_segment)
folder_files.write_index_manifest = dying(folder_files.write_index_manifest)
folder_files._sweep = dying(folder_files._sweep)
if step == "add":
    index.add_embeddings(folder, embeddings)
else:
    index.compact_index(folder, "cpu")
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["add", "compact"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed_in_the_middle_leaves_the_old_index_or_the_new(
    step: str, after: int, first: Path, second: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    build_index(first, index, index_type="ivf", device="cpu")
    _, ids = all_vectors(first)
    delete_ids(index, ids[:10].tolist())
    killed = run("-c", KILLED, index, second, step, after)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = after == 2  # killed after the manifest, before old files went
    snapshot = Snapshot.open(index)
    assert len(snapshot) == 1490 + (300 if done and step == "add" else 0)
    assert len(snapshot.tombstones) == (0 if done and step == "compact" else 10)
    # The next change works, and takes away what the killed one left
    assert delete_ids(index, ids[10:20].tolist()) == 10
    files = {path.name for path in index.glob(f"patch_{PATCH}/*")}
    assert len(files) == len(Snapshot.open(index).segments)
