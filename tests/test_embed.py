"""Bulk embedding: right rows in clip-retrieval's files, restartable, bad images counted."""

import gzip
import json
import multiprocessing
import os
import runpy
import sys
import tarfile
from functools import partial
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import shard_maker
import torch
from forked import ranks
from shard_maker import write_tar

from contrastive.model.lit import LitModel
from data.errors import DataError, UsageError
from data.images import decode_image
from data.problems import SampleError
from data.shards.identity import Identity, identity
from data.shards.names import expand_shards
from retrieval.embed.bulk import embed_shards
from retrieval.embed.manifest import lost_shards
from retrieval.embed.partitions import metadata_file, open_vectors, vector_file
from retrieval.evaluation.datasets import load_dataset
from retrieval.evaluation.evaluate import evaluate
from retrieval.evaluation.report_json import report_json
from retrieval.index.build import build_index

LAUNCH = Path(__file__).parents[1] / "launch"


png = partial(shard_maker.png, size=(48, 40))


def write_shard(path: Path, samples: dict[str, bytes]) -> str:
    """A tar of KEY.png and KEY.txt."""
    pairs = [
        [(f"{key}.png", image), (f"{key}.txt", f"caption of {key}".encode())]
        for key, image in samples.items()
    ]
    return write_tar(path, chain.from_iterable(pairs))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Three shards of 5, 3 and 4 pictures."""
    sizes = {"a": 5, "b": 3, "c": 4}
    return [
        write_shard(
            tmp_path / f"{name}.tar", {f"{name}{i}": png(100 * n + i) for i in range(count)}
        )
        for n, (name, count) in enumerate(sizes.items())
    ]


def read_all(out: Path, patch_size: int) -> tuple[np.ndarray, dict[str, list]]:
    files = sorted((out / "metadata").glob("metadata_*.parquet"))
    vectors = [open_vectors(out, patch_size, number) for number in range(len(files))]
    columns = [pq.read_table(file).to_pydict() for file in files]
    return np.concatenate(vectors), {
        name: [value for part in columns for value in part[name]] for name in columns[0]
    }


def test_rows_are_the_embeddings_of_the_pictures_they_name(
    tiny_model: LitModel, shards: list[str], tmp_path: Path
) -> None:
    sizes = tiny_model.patch_sizes[:2]
    out = tmp_path / "out"
    manifest = embed_shards(tiny_model, shards, sizes, out, batch_size=2, num_workers=0)
    assert manifest["count"] == 12
    for size in sizes:
        vectors, rows = read_all(out, size)
        assert vectors.dtype == np.float32
        assert rows["key"] == [
            f"{n}{i}" for n, c in (("a", 5), ("b", 3), ("c", 4)) for i in range(c)
        ]
        assert rows["caption"][3] == "caption of a3"
        assert len(set(rows["id"])) == 12
        for vector, shard, offset, length in zip(
            vectors, rows["shard"], rows["offset"], rows["size"], strict=True
        ):
            data = Path(shard).read_bytes()[offset : offset + length]
            expected = tiny_model.encode_image([decode_image(data, 10_000)], patch_size=size)
            torch.testing.assert_close(torch.tensor(vector)[None], expected, rtol=0, atol=2e-5)


def test_interrupted_work_continues_at_the_first_missing_partition(
    tiny_model: LitModel, shards: list[str], tmp_path: Path
) -> None:
    size = tiny_model.patch_sizes[:1]
    good = Path(shards[1]).read_bytes()
    expected = embed_shards(tiny_model, shards, size, tmp_path / "whole", num_workers=0)
    write_shard(Path(shards[1]), {"b0": png(100), "b1": b"no picture", "b2": png(102)})
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(SampleError, match="b1"):
        embed_shards(tiny_model, shards, size, out, num_workers=0, on_error="raise")
    assert not out.exists()
    first = partial / "metadata" / "metadata_0000.parquet"
    kept = first.stat().st_ino, first.stat().st_mtime_ns
    Path(shards[1]).write_bytes(good)
    found = embed_shards(tiny_model, shards, size, out, num_workers=0)
    counts = [[p["count"] for p in manifest.pop("partitions")] for manifest in (found, expected)]
    assert (found, counts[0]) == (expected, counts[1])
    first = out / "metadata" / "metadata_0000.parquet"
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == kept
    assert not partial.exists()
    assert not list(out.rglob("*.part"))
    np.testing.assert_array_equal(
        read_all(out, size[0])[0], read_all(tmp_path / "whole", size[0])[0]
    )


def test_bad_images_are_skipped_and_counted_by_kind(tiny_model: LitModel, tmp_path: Path) -> None:
    samples = {"a": png(0), "b": b"no picture", "c": png(1)[:-900], "d": png(2)}
    mixed = write_shard(tmp_path / "mixed.tar", samples)
    hopeless = write_shard(tmp_path / "hopeless.tar", {"x": b"nothing"})
    cut = write_shard(tmp_path / "cut.tar", {"e": png(3), "f": png(4)})
    Path(cut).write_bytes(Path(cut).read_bytes()[: 512 + 2 * len(png(3))])
    size = tiny_model.patch_sizes[0]
    out = tmp_path / "out"
    manifest = embed_shards(tiny_model, [mixed, hopeless, cut], [size], out, num_workers=0)
    assert read_all(out, size)[1]["key"][:2] == ["a", "d"]
    assert [p["count"] for p in manifest["partitions"]] == [2, 0, 1]
    assert manifest["errors"]["not_an_image"] == 2
    assert manifest["errors"]["truncated_image"] == 1
    assert manifest["errors"]["truncated"] == 1
    errors = [p["errors"] for p in manifest["partitions"]]
    assert errors[1:] == [{"not_an_image": 1}, {"truncated": 1}]
    assert lost_shards(manifest) == [f"{hopeless} (not_an_image)", f"{cut} (truncated)"]
    assert open_vectors(out, size, 1).shape == (0, tiny_model.embed_dim)


def test_an_empty_result_is_an_error_that_counts_what_was_left_out(
    tiny_model: LitModel, shards: list[str], tmp_path: Path
) -> None:
    shard = tmp_path / "odd.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("a.psd", "b.jp2"):
            tar.addfile(tarfile.TarInfo(name))
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(Path(shards[0]).read_bytes()))
    size, out = tiny_model.patch_sizes[:1], tmp_path / "out"
    both = [str(shard), str(packed)]
    with pytest.raises(UsageError, match=r"no image .*; skipped: unknown_suffix 2, compressed 1"):
        embed_shards(tiny_model, both, size, out, num_workers=0)
    assert not list(tmp_path.glob("out*"))
    manifest = embed_shards(tiny_model, [*both, shards[0]], size, out, num_workers=0)
    assert manifest["count"] == 5
    with pytest.raises(SampleError, match=r"a.*only psd \(unknown_suffix\)"):
        embed_shards(tiny_model, both, size, tmp_path / "x", num_workers=0, on_error="raise")


def test_embeddings_without_an_image_are_not_indexed(
    tiny_model: LitModel, model_dir: Path, shards: list[str], tmp_path: Path
) -> None:
    size = tiny_model.patch_sizes[:1]
    out = tmp_path / "out"
    embed_shards(tiny_model, shards[:1], size, out, num_workers=0, model_dir=model_dir)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["partitions"][0]["count"] = manifest["count"] = 0  # as an earlier version left it
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="holds no image"):
        build_index(out, tmp_path / "index", device="cpu")


def test_embeddings_with_a_flipped_bit_are_not_indexed(
    tiny_model: LitModel, model_dir: Path, shards: list[str], tmp_path: Path
) -> None:
    size, out = tiny_model.patch_sizes[0], tmp_path / "out"
    embed_shards(tiny_model, shards, [size], out, num_workers=0, model_dir=model_dir)
    for file in (vector_file(out, size, 1), metadata_file(out, 2)):
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(UsageError, match=f"{file.name} is damaged; embed these shards again"):
            build_index(out, tmp_path / "index", device="cpu")
        file.write_bytes(whole)
    build_index(out, tmp_path / "index", device="cpu")


def test_finished_work_is_returned_and_other_work_is_refused(
    tiny_model: LitModel, shards: list[str], tmp_path: Path
) -> None:
    sizes, out = tiny_model.patch_sizes[:2], tmp_path / "out"
    embed_shards(tiny_model, shards, sizes, out, num_workers=0)
    written = (out / "manifest.json").stat().st_mtime_ns
    again = embed_shards(tiny_model, shards, sizes, out, num_workers=0)
    assert again["count"] == 12
    assert (out / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="patch sizes"):
        embed_shards(tiny_model, shards, sizes[:1], out, num_workers=0)
    more = write_shard(tmp_path / "more.tar", {"x": png(99)})
    for named, words in (
        (shards[:2], f"0 of these are new to it, and {len(shards) - 2} of its own are not among"),
        ([*shards, more], "1 of these are new to it, and 0 of its own .* --add adds them"),
        (shards[::-1], "the same in another order"),
    ):
        with pytest.raises(UsageError, match=words):
            embed_shards(tiny_model, named, sizes, out, num_workers=0)


def test_a_replaced_shard_is_embedded_again_and_no_other(
    tiny_model: LitModel, shards: list[str], tmp_path: Path
) -> None:
    size, out = tiny_model.patch_sizes[0], tmp_path / "out"

    def files() -> list[int]:
        return [metadata_file(out, number).stat().st_ino for number in range(3)]

    embed_shards(tiny_model, shards, [size], out, num_workers=0)
    before, old = files(), read_all(out, size)
    os.utime(shards[0], ns=(1, 1))  # a copy: another time, the same bytes
    embed_shards(tiny_model, shards, [size], out, num_workers=0)
    assert files() == before
    write_shard(Path(shards[1]), {f"b{i}": png(900 + i) for i in range(3)})
    assert embed_shards(tiny_model, shards, [size], out, num_workers=0)["count"] == 12
    assert [new == inode for new, inode in zip(files(), before, strict=True)] == [True, False, True]
    vectors, rows = read_all(out, size)
    assert rows["key"] == old[1]["key"]
    expected = tiny_model.encode_image([decode_image(png(900), 10_000)], patch_size=size)
    torch.testing.assert_close(torch.tensor(vectors[5:6]), expected, rtol=0, atol=2e-5)
    assert not (tmp_path / "out.partial").exists()


def test_work_taken_up_again_embeds_what_was_replaced_meanwhile(
    tiny_model: LitModel, shards: list[str], tmp_path: Path
) -> None:
    size, out = tiny_model.patch_sizes[0], tmp_path / "out"
    write_shard(Path(shards[2]), {"c0": b"no picture"})
    with pytest.raises(SampleError):
        embed_shards(tiny_model, shards, [size], out, num_workers=0, on_error="raise")
    write_shard(Path(shards[0]), {"new": png(900)})
    write_shard(Path(shards[2]), {"c0": png(901)})
    embed_shards(tiny_model, shards, [size], out, num_workers=0, on_error="raise")
    vectors, rows = read_all(out, size)
    assert rows["key"] == ["new", "b0", "b1", "b2", "c0"]
    expected = tiny_model.encode_image([decode_image(png(900), 10_000)], patch_size=size)
    torch.testing.assert_close(torch.tensor(vectors[:1]), expected, rtol=0, atol=2e-5)


def test_a_shard_replaced_while_it_is_embedded_stops_the_work(
    tiny_model: LitModel, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced_before_it_is_told(shard: str) -> Identity:
        write_shard(Path(shard), {f"a{i}": png(900 + i) for i in range(5)})
        return identity(shard)

    monkeypatch.setattr("retrieval.embed.bulk.identity", replaced_before_it_is_told)
    with pytest.raises(DataError, match=r"a\.tar' was replaced while"):
        embed_shards(tiny_model, shards, [48], tmp_path / "out", num_workers=0)


def test_a_remote_shard_is_told_by_the_tag_of_its_store(
    tiny_model: LitModel, tmp_path: Path
) -> None:
    size, out = tiny_model.patch_sizes[0], tmp_path / "out"
    remote = fsspec.filesystem("memory")
    for seed in (1, 2):  # of equal size; the store tells the time
        local = write_shard(tmp_path / "remote.tar", {"a": png(seed)})
        remote.pipe("/embed/remote.tar", Path(local).read_bytes())
        embed_shards(tiny_model, ["memory://embed/remote.tar"], [size], out, num_workers=0)
        expected = tiny_model.encode_image([decode_image(png(seed), 10_000)], patch_size=size)
        found = torch.tensor(read_all(out, size)[0])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_many_shards_share_one_set_of_loader_processes(
    tiny_model: LitModel, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess,
        "start",
        lambda self: (started.append(self), start(self)),
    )
    manifest = embed_shards(tiny_model, shards, [48], tmp_path / "out", num_workers=1)
    assert (manifest["count"], len(started)) == (12, 1)


def test_impossible_patch_size_is_refused_before_anything_is_written(
    tiny_model: LitModel, shards: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="patch size 31"):
        embed_shards(tiny_model, shards, [31], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_launch_names_the_pattern_that_matches_nothing(
    tiny_model: LitModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", "m", "--shards", f"{tmp_path}/none-*.tar", "--out", "o"]
    monkeypatch.setattr(sys, "argv", ["embed.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(LAUNCH / "embed.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "none-*.tar" in capsys.readouterr().err


DRIVER = """
import json, sys
from contrastive.distributed import init_from_launcher, is_main, shutdown
from contrastive.model.lit import LitModel
from data.shards.identity import Identity, identity
from data.shards.names import expand_shards
from retrieval import embed_shards, evaluate, load_dataset
from retrieval.evaluation.report_json import report_json

init_from_launcher()
model_dir, data, out, *sizes = sys.argv[1:]
sizes = [int(size) for size in sizes]
model = LitModel.from_pretrained(model_dir)
shards = expand_shards([data + "/*.tar"])
embed_shards(model, shards, sizes, out + "/embeddings", num_workers=0)
result = evaluate(model, load_dataset("shards", data), sizes, recall=True, num_workers=0)
if is_main():
    with open(out + "/result.json", "w") as file:
        json.dump(report_json("", [], [result])["datasets"], file)
shutdown()
"""


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(
    tiny_model: LitModel, model_dir: Path, emoji_shards: Path, tmp_path: Path
) -> None:
    """Three shards on two ranks, started as the deepspeed launcher starts them."""
    sizes = tiny_model.patch_sizes[:2]
    data = str(emoji_shards / "heldout_captions")
    arguments = [str(model_dir), data, str(tmp_path), *map(str, sizes)]
    program = tmp_path / "program.py"
    program.write_text(DRIVER)
    done = ranks(2, program, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = tmp_path / "alone"
    embed_shards(tiny_model, expand_shards([data + "/*.tar"]), sizes, alone, num_workers=0)
    dataset = load_dataset("shards", data)
    result = evaluate(tiny_model, dataset, sizes, recall=True, num_workers=0)
    for size in sizes:
        vectors, rows = read_all(alone, size)
        other_vectors, other_rows = read_all(tmp_path / "embeddings", size)
        np.testing.assert_allclose(vectors, other_vectors, rtol=0, atol=1e-5)
        assert rows == other_rows
    shared = json.loads((tmp_path / "result.json").read_text())
    assert shared == json.loads(json.dumps(report_json("", [], [result])["datasets"]))
    assert shared[0]["num_images"] == len(rows["id"])
