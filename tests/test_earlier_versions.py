"""What an earlier version wrote is read, continued and changed as if this one had written it.

tests/fixtures/v0.1 and its like are described in tests/fixtures/README.md.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked import ranks
from PIL import Image, ImageOps
from safetensors.torch import load_file

from contrastive import LitModel, load_vision_tower
from contrastive.vision.earlier import keep_transform
from retrieval import (
    Hit,
    Searcher,
    ZeroShotClassifier,
    add_embeddings,
    build_index,
    compact_index,
    delete_ids,
    embed_shards,
    index_photos,
)

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(folder.name for folder in FIXTURES.glob("v*") if folder.is_dir())
KINDS = ("flat16", "ivf", "ivfpq", "hnsw")


def made_on() -> dict[str, Any]:
    """Where results are bit-identical; elsewhere they are close."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "name": torch.cpu.get_capabilities().get("cpu_name", ""),
        "cores": len(os.sched_getaffinity(0)),
    }


@dataclass(frozen=True)
class Earlier:
    """A copy of what a version wrote. Its paths are relative to it."""

    folder: Path
    expected: dict[str, Any]

    @property
    def same_machine(self) -> bool:
        return bool(self.expected["made_on"] == made_on())

    @property
    def tolerance(self) -> float:
        """Of similarities and features."""
        return 1e-6 if self.same_machine else 2e-5

    @property
    def queries(self) -> list[str]:
        return self.expected["queries"]


def copied(version: str, target: Path, keep_times: bool = True) -> Earlier:
    """A copy as it was written, or with new times of modification, as a checkout of git has."""
    shutil.copytree(FIXTURES / version, target)
    earlier = Earlier(target, json.loads((target / "expected.json").read_text()))
    for file in target.rglob("*.*"):
        os.utime(file)
    for name, time_ns in earlier.expected["times_ns"].items() if keep_times else ():
        os.utime(target / name, ns=(time_ns, time_ns))
    for name in earlier.expected["made_relative"]:
        make_absolute(target / name, target)
    return earlier


def make_absolute(folder: Path, root: Path) -> None:
    """Embeddings or an index as their version writes them, with absolute paths."""

    def absolute(names: Sequence[str]) -> list[str]:
        return [str(root / name) for name in names]

    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("model", "images"):
        if manifest.get(name):
            manifest[name] = str(root / manifest[name])
    if "shards" in manifest:
        manifest["shards"] = absolute(manifest["shards"])
        for partition in manifest["partitions"]:
            partition["shard"] = str(root / partition["shard"])
    for file in folder.glob("metadata/*.parquet"):
        table = pq.read_table(file)
        at = table.schema.get_field_index("shard")
        paths = absolute(table["shard"].to_pylist())
        pq.write_table(table.set_column(at, "shard", pa.array(paths)), file)
    for entry in manifest.get("segments", ()):
        file = folder / f"metadata/metadata_{entry['number']:04d}.arrow"
        table = pa.ipc.open_file(file.read_bytes()).read_all()
        at = table.schema.get_field_index("shard")
        paths = absolute(table["shard"].to_pylist())
        table = table.set_column(at, "shard", pa.array(paths)).combine_chunks()
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
        entry["bytes"]["metadata"] = file.stat().st_size
        digest = hashlib.blake2b(file.read_bytes(), digest_size=16)
        entry["blake2b"]["metadata"] = digest.hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def state(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Contents, time and inode of every file: none of them is written without a change of these."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != ".lock"]
    assert files
    return {
        str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns, f.stat().st_ino)
        for f in files
    }


def resume_run(folder: Path, program: str, run: str) -> str:
    """`deepspeed PROGRAM --resume RUN` in a folder, one rank; returns what it said."""
    done = ranks(1, ROOT / "launch" / program, "--resume", run, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(params=VERSIONS)
def earlier(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Earlier:
    made = copied(request.param, tmp_path / "earlier")
    monkeypatch.chdir(made.folder)
    return made


@pytest.fixture
def model(earlier: Earlier) -> LitModel:
    return LitModel.from_pretrained("model")


def assert_hits(found: list[list[Hit]], stored: list[Any], earlier: Earlier) -> None:
    """The same images in the same order, as similar."""
    assert len(found) == len(stored)
    for hits, rows in zip(found, stored, strict=True):
        assert [[hit.id, hit.key] for hit in hits] == [[id, key] for id, _, key in rows]
        similarities = [hit.similarity for hit in hits]
        assert similarities == pytest.approx([s for _, s, _ in rows], abs=earlier.tolerance)


def test_there_is_something_of_an_earlier_version() -> None:
    assert "v0.1" in VERSIONS


# ---- models and towers -----------------------------------------------------------------------


def test_a_model_encodes_what_it_encoded(earlier: Earlier, model: LitModel) -> None:
    expected = earlier.expected["model"]
    assert list(model.patch_sizes) == expected["patch_sizes"]
    assert model.image_fingerprint == expected["image_fingerprint"]
    assert model.text_fingerprint == expected["text_fingerprint"]
    texts = model.encode_text(earlier.queries)
    torch.testing.assert_close(
        texts, torch.tensor(expected["texts"]), rtol=0, atol=earlier.tolerance
    )
    shards = sorted(map(str, earlier.folder.glob("shards/*.tar")))
    embed_shards(model, shards, (12, 8), "again", num_workers=0)
    files = sorted(Path("embeddings").rglob("*.npy"))
    assert len(files) == 2 * len(shards)
    for file in files:
        name = str(file.relative_to("embeddings"))
        stored, again = np.load(file), np.load(Path("again", name))
        digest = hashlib.blake2b(stored.tobytes(), digest_size=16).hexdigest()
        assert digest == earlier.expected["embeddings"][name]
        np.testing.assert_allclose(again, stored, rtol=0, atol=earlier.tolerance)
        if earlier.same_machine:
            assert np.array_equal(again, stored)


@pytest.mark.parametrize("number", range(3))
def test_a_tower_gives_the_features_that_it_gave(number: int, earlier: Earlier) -> None:
    """A saved tower, a flexify run's student, and big_vision's file."""
    name, expected = list(earlier.expected["towers"].items())[number]
    tower = load_vision_tower(name)
    keep_transform(tower, expected["fingerprint"], name)
    assert tower.fingerprint == expected["fingerprint"]
    assert list(tower.patch_sizes) == expected["patch_sizes"]
    images = torch.linspace(-1, 1, 2 * 3 * 48 * 48).reshape(2, 3, 48, 48).sin()
    for size, features in expected["features"].items():
        found = tower(images, int(size))
        # the stored ones have nine digits
        torch.testing.assert_close(found, torch.tensor(features), rtol=0, atol=earlier.tolerance)


def test_a_class_set_names_what_it_named(earlier: Earlier, model: LitModel) -> None:
    expected = earlier.expected["classes"]
    pictures = [Image.open(file) for file in sorted(Path("photos").glob("*.png"))]
    classifier = ZeroShotClassifier.load("classes", model)
    labels, similarities = classifier.predict(pictures, patch_size=12, k=2)
    assert labels.tolist() == expected["labels"]
    np.testing.assert_allclose(similarities, expected["similarities"], atol=earlier.tolerance)


# ---- runs and caches -------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed:
    """A run that went on from its checkpoint, and its cache before and after."""

    earlier: Earlier
    run: Path
    said: str
    before: dict[str, tuple[bytes, int, int]]
    after: dict[str, tuple[bytes, int, int]]


Resume = Callable[[str, str, str, bool], Resumed]


@pytest.fixture(scope="module")
def resume(tmp_path_factory: pytest.TempPathFactory) -> Resume:
    """Each (version, name) is resumed once."""
    done: dict[tuple[str, str], Resumed] = {}

    def of(version: str, name: str, cache: str, keep_times: bool) -> Resumed:
        if (version, name) not in done:
            earlier = copied(version, tmp_path_factory.mktemp("run") / "earlier", keep_times)
            before = state(earlier.folder / cache)
            said = resume_run(earlier.folder, f"{name}.py", f"runs/{name}")
            run, after = earlier.folder / "runs" / name, state(earlier.folder / cache)
            done[version, name] = Resumed(earlier, run, said, before, after)
        return done[version, name]

    return of


# The times of modification of the shards are as they were, or new.
lit = pytest.mark.parametrize("resumed", [("lit", "features", True)], indirect=True)
flexify = pytest.mark.parametrize("resumed", [("flexify", "teacher", False)], indirect=True)
either = pytest.mark.parametrize(
    "resumed", [("lit", "features", True), ("flexify", "teacher", False)], indirect=True
)


@pytest.fixture(params=VERSIONS)
def version(request) -> str:
    return request.param


@pytest.fixture
def resumed(request, version: str, resume: Resume) -> Resumed:
    return resume(version, *request.param)


@pytest.mark.slow
@either
def test_a_run_goes_on_to_the_same_weights(resumed: Resumed) -> None:
    earlier, name = resumed.earlier, resumed.run.name
    expected = earlier.expected[name]
    lines = map(json.loads, (resumed.run / "metrics.jsonl").read_text().splitlines())
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in losses] == list(range(1, len(expected["losses"]) + 1))
    found = load_file(resumed.run / "model/model.safetensors")
    assert set(found) == set(expected["weights"])
    stored = load_file(earlier.folder / {"lit": "model", "flexify": "student"}[name] /
                       "model.safetensors")  # fmt: skip
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, stored[key], rtol=1e-4, atol=1e-5)
    assert [loss for _, loss in losses] == pytest.approx(expected["losses"], rel=1e-5)
    if earlier.same_machine and name == "flexify":  # LiT's loss has been summed in tiles since
        assert [loss for _, loss in losses] == expected["losses"]
        for key, tensor in found.items():
            digest = hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).hexdigest()
            assert digest == expected["weights"][key], key


@pytest.mark.slow
@lit
def test_a_cache_of_features_and_texts_is_used_as_it_is(resumed: Resumed) -> None:
    assert {".npy", ".txt", ".arrow", ".json"} == {Path(name).suffix for name in resumed.before}
    assert any(name.endswith(".p8.view1.npy") for name in resumed.before)
    assert resumed.after == resumed.before
    assert "image features at patch" not in resumed.said


@pytest.mark.slow
@flexify
def test_a_cache_whose_shards_have_new_times_is_used_too(resumed: Resumed) -> None:
    """The notes of the shards' times are all that is written."""
    changed = {name for name in resumed.before if resumed.after[name] != resumed.before[name]}
    assert set(resumed.after) == set(resumed.before)
    assert changed == {name for name in resumed.before if name.endswith(".sums.json")}
    for name in changed:
        before, after = (json.loads(s[name][0]) for s in (resumed.before, resumed.after))
        for entry in before.keys() | after.keys():
            for fact in ("size", "blake2b"):
                assert after[entry][fact] == before[entry][fact]
    assert "image features at patch" not in resumed.said


# ---- embeddings and indexes ------------------------------------------------------------------


def test_a_finished_folder_of_embeddings_is_left_as_it_is(
    earlier: Earlier, model: LitModel
) -> None:
    before = state(Path("embeddings"))
    shards = sorted(map(str, earlier.folder.glob("shards/*.tar")))
    manifest = embed_shards(model, shards, (12, 8), "embeddings", model_dir="model")
    assert manifest["count"] == 24
    assert state(Path("embeddings")) == before


def test_embeddings_become_an_index(earlier: Earlier, model: LitModel) -> None:
    build_index("embeddings", "built", kind="flat", device="cpu")
    searcher = Searcher.load("built", model, device="cpu")
    found = searcher.search(earlier.queries, k=6)
    assert_hits(found, earlier.expected["retrieval"]["built"], earlier)


def test_an_index_with_additions_and_deletions_finds_what_it_found(earlier: Earlier) -> None:
    expected = earlier.expected["retrieval"]
    manifest = json.loads(Path("index/manifest.json").read_text())
    assert [entry["delta"] for entry in manifest["segments"]] == [False, True]
    assert Path("index", manifest["deleted"]).is_file()
    searcher = Searcher.load("index", device="cpu")
    assert len(searcher) == expected["count"]
    for name, asked in expected["searches"].items():
        assert_hits(searcher.search(earlier.queries, **asked), expected["index"][name], earlier)
    picture = Image.open("photos/1.png")
    found = searcher.search([picture], k=4, patch_size=12, query_patch_size=8)
    assert_hits(found, expected["by picture"], earlier)


def test_an_index_takes_additions_deletions_and_a_merge(earlier: Earlier, model: LitModel) -> None:
    changes = earlier.expected["retrieval"]["changes"]
    assert add_embeddings("index", "embeddings") == changes["added"]
    assert delete_ids("index", changes["delete"]) == changes["deleted"]
    for stage in ("changed", "compacted"):
        if stage == "compacted":
            compact_index("index", "cpu")
        searcher = Searcher.load("index", model, device="cpu")
        assert len(searcher) == changes[f"{stage} count"]
        assert_hits(searcher.search(earlier.queries, k=8), changes[stage], earlier)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_index_finds_what_it_found(
    kind: str, earlier: Earlier, model: LitModel
) -> None:
    expected = earlier.expected["retrieval"]
    searcher = Searcher.load(f"kinds/{kind}", model, device="cpu")
    for name, asked in expected["kind_searches"].items():
        found = searcher.search(earlier.queries, **asked)
        assert_hits(found, expected["kinds"][kind][name], earlier)


def test_an_album_is_as_before_and_then_follows_its_folder(
    earlier: Earlier, model: LitModel
) -> None:
    expected = earlier.expected["album"]

    def again() -> tuple[int, int, int, int]:
        made = index_photos("photos", "model", "album", device="cpu", num_workers=0)
        assert made.errors == {}
        return made.added, made.changed, made.gone, made.unchanged

    before = state(Path("album"))
    assert again() == (0, 0, 0, expected["pictures"])
    assert state(Path("album")) == before
    searcher = Searcher.load("album", model, device="cpu")
    assert_hits(searcher.search(earlier.queries, k=4), expected["hits"], earlier)
    new = ImageOps.mirror(Image.open("photos/1.png"))
    new.save("photos/new.png")
    Path("photos/2.png").unlink()
    assert again() == (1, 0, 1, expected["pictures"] - 1)
    assert searcher.reload()
    (hit,) = searcher.search([new], k=1)[0]
    assert hit.key == "new.png"
    assert hit.similarity == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_album_whose_pictures_have_new_times_is_taken_in_again(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = copied(version, tmp_path / "earlier", keep_times=False)
    monkeypatch.chdir(earlier.folder)
    expected = earlier.expected["album"]
    made = index_photos("photos", "model", "album", device="cpu", num_workers=0)
    assert (made.added, made.changed, made.gone) == (0, expected["pictures"], 0)
    found = Searcher.load("album", device="cpu").search(earlier.queries, k=4)
    for hits, rows in zip(found, expected["hits"], strict=True):
        assert [hit.key for hit in hits] == [key for _, _, key in rows]
        similarities = [hit.similarity for hit in hits]
        assert similarities == pytest.approx([s for _, s, _ in rows], abs=2e-5)
