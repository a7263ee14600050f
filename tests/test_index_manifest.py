"""The manifest of an index keeps format 1's keys, those of others included."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from data.errors import UsageError
from retrieval.index.manifest import (
    IndexManifest,
    SegmentEntry,
    Tuning,
    read_index_manifest,
    write_index_manifest,
)

SEGMENT = {
    "number": 0,
    "kind": "ivf",
    "count": 1500,
    "first_id": 0,
    "last_id": 4294967894,
    "bytes": {"metadata": 80, "patch_28": 160},
    "blake2b": {"metadata": "ab", "patch_28": "cd"},
    "tuning": {"28": {"nprobe": 8, "ef": 8, "exact_below": 0.1, "recall": 0.99, "query_ms": 0.5}},
    "delta": False,
}
MANIFEST = {
    "format": 1,
    "image_fingerprint": "i",
    "text_fingerprint": "t",
    "width": 32,
    "patch_sizes": [28],
    "images": "",
    "count": 1499,
    "asked_kind": "auto",
    "kind": "ivf",
    "reason": "ivf: as asked",
    "latency_ms": 10.0,
    "memory_bytes": 1024,
    "generation": 2,
    "next_id": 4294967895,
    "next_segment": 1,
    "deleted": "deleted_0002.npy",
    "deleted_blake2b": {"deleted_0002.npy": "ef"},
    "segments": [SEGMENT],
}


def write(folder: Path, manifest: dict) -> Path:
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_what_was_read_is_written_again(tmp_path: Path) -> None:
    manifest = read_index_manifest(write(tmp_path, MANIFEST))
    assert json.dumps(manifest.to_json()) == json.dumps(MANIFEST)
    assert (manifest.index_type, manifest.asked_type) == ("ivf", "auto")
    assert manifest.tombstones == "deleted_0002.npy"
    assert manifest.segments[0].index_type == "ivf"
    assert manifest.segments[0].tuning == {28: Tuning(8, 8, 0.1, 0.99, 0.5)}


def test_what_version_01_did_not_measure_lies_beside_what_it_knows(tmp_path: Path) -> None:
    tuning = replace(Tuning(8, 8, 0.1, 0.99, 0.5), k_factor=40, captions=512)
    manifest = IndexManifest.from_json(MANIFEST)
    entry = replace(manifest.segments[0], tuning={28: tuning})
    write_index_manifest(tmp_path, replace(manifest, segments=(entry,)))
    assert read_index_manifest(tmp_path).segments == (entry,)
    (written,) = json.loads((tmp_path / "manifest.json").read_text())["segments"]
    assert written["tuning"] == SEGMENT["tuning"]
    assert written["tuned"] == {"28": {"k_factor": 40, "captions": 512}}


def test_keys_of_others_are_kept(tmp_path: Path) -> None:
    theirs = {**MANIFEST, "note": [1], "segments": [{**SEGMENT, "owner": "me"}]}
    assert read_index_manifest(write(tmp_path, theirs)).to_json() == theirs


def test_what_an_earlier_index_lacks_has_a_default(tmp_path: Path) -> None:
    needed = ("number", "kind", "count", "first_id", "last_id", "bytes")
    old = {
        name: value
        for name, value in MANIFEST.items()
        if name not in ("images", "reason", "asked_kind", "latency_ms")
    }
    old["segments"] = [{name: SEGMENT[name] for name in needed}]
    manifest = read_index_manifest(write(tmp_path, old))
    assert manifest.images == ""
    assert manifest.segments == (
        SegmentEntry(0, "ivf", 1500, 0, 4294967894, bytes=SEGMENT["bytes"]),
    )
    assert "tuning" not in manifest.to_json()["segments"][0]


@pytest.mark.parametrize(
    "broken",
    [
        {**MANIFEST, "segments": [{"number": 0}]},
        {**MANIFEST, "segments": 3},
        {name: value for name, value in MANIFEST.items() if name != "width"},
        {name: value for name, value in MANIFEST.items() if name != "deleted"},
    ],
)
def test_half_a_manifest_is_damaged(broken: dict, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"manifest\.json is damaged"):
        read_index_manifest(write(tmp_path, broken))


def test_a_flipped_bit_is_damage(tmp_path: Path) -> None:
    write_index_manifest(tmp_path, IndexManifest.from_json(MANIFEST))
    file = tmp_path / "manifest.json"
    whole, data = read_index_manifest(tmp_path), file.read_bytes()
    for bit in range(0, 8 * len(data), 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with suppress(
            UsageError
        ):  # the number of the generation alone may differ, which is harmless
            found = read_index_manifest(tmp_path)
            assert replace(found, unknown={}, generation=whole.generation) == whole


def test_what_version_01_writes_over_a_digest_is_no_damage(tmp_path: Path) -> None:
    """It keeps entries that it does not know."""
    write_index_manifest(tmp_path, IndexManifest.from_json(MANIFEST))
    values = json.loads((tmp_path / "manifest.json").read_text())
    values |= {"generation": values["generation"] + 1, "count": 3}
    assert read_index_manifest(write(tmp_path, values)).count == 3


def test_a_new_one_holds_nothing() -> None:
    empty = IndexManifest("i", "t", 32, (28, 14)).to_json()
    assert empty.keys() == MANIFEST.keys()
    assert (empty["segments"], empty["count"], empty["deleted"]) == ([], 0, "")
