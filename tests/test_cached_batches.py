"""Batches from cached columns are those read sample by sample, and those of earlier versions."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_maker import write_tar
from test_caption_cache import Letters, fill

from data.batch import Batch, LazyStrings
from data.config import DataConfig
from data.pipeline.captioned import CaptionedPipeline
from data.pipeline.draw import draw, draw_all, draw_several

WORDS = ("cat", "red", "\u732b", "a", "dog's", "\U0001f600", "house on the hill")
SIZES = (37, 1, 12, 60, 5, 23, 9, 41)

CASES: dict[str, dict[str, Any]] = {
    "9b7d2ce4263ad6ec": {"batch": 8, "steps": 60, "block_shards": 2},
    "d71062584ba1b6a3": {"batch": 13, "steps": 30, "seed": 1},
    "5c238e8707878287": {"batch": 602, "steps": 3, "block_shards": 3},  # more than an epoch
    "08d98b64e63a87d5": {"batch": 24, "steps": 25, "weights": (3.0, 1.0), "block_shards": 2},
    "11490a6c8701190c": {"batch": 40, "steps": 12, "views": 3, "crop": 0.5, "seed": 2**40},
    "3c5ac3471fb83348": {"batch": 34, "steps": 9, "rank": 1, "world_size": 2}
    | {"views": 2, "flip": True},
}
"""What is trained on, by the digest of the batches when each was made sample by sample."""


def write_captions(folder: Path) -> tuple[list[str], list[str]]:
    """Two sources of shards whose samples have none, one, or several captions, or bad ones."""
    rng = np.random.default_rng(0)
    sources: tuple[list[str], list[str]] = ([], [])
    for shard, size in enumerate(SIZES):
        members: list[tuple[str, bytes]] = []
        for number in range(size):
            key = f"{shard}/{WORDS[number % 4]}{number:03d}"
            count = int(rng.choice([1, 1, 2, 5, 17]))
            texts = [" ".join(rng.choice(WORDS, int(rng.integers(1, 6)))) for _ in range(count)]
            members.append((f"{key}.png", b"x"))
            kind = int(rng.integers(0, 14)) if size > 1 else 1
            if kind == 0:
                members.append((f"{key}.txt", b"\xff"))
            elif kind == 1:
                continue  # no caption
            elif kind == 2:
                members.append((f"{key}.json", b'{"captions": []}'))
            elif count == 1:
                members.append((f"{key}.txt", texts[0].encode()))
            else:
                members.append((f"{key}.json", json.dumps({"captions": texts}).encode()))
        name = f"{'ab'[shard % 2]}{shard}.tar"
        sources[shard % 2].append(write_tar(folder / name, members))
    return sources


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    return write_captions(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def cache(shards: tuple[list[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cache")
    fill(folder, [*shards[0], *shards[1]])
    return str(folder)


def build(shards: tuple[list[str], list[str]], features: str, case: dict) -> CaptionedPipeline:
    folder = Path(shards[0][0]).parent
    patterns = tuple(f"{folder}/{source}*.tar" for source in "ab")
    case = {"rank": 0, "world_size": 1, "seed": 3} | case
    order = {"global_batch_size": case.pop("batch"), "tokenizer": Letters()}
    order |= {name: case.pop(name) for name in ("rank", "world_size", "seed")}
    case.pop("steps")
    cfg = DataConfig(shards=patterns, features=features, num_workers=0, **case)
    return CaptionedPipeline(cfg, None, **order)


def rows(batch: Batch) -> list[tuple[object, ...]]:
    """A batch, slot by slot."""
    arrays = (batch.concepts, batch.valid, batch.shards, batch.indices, batch.views)
    columns: Sequence[Sequence] = [a.tolist() for a in arrays]
    return [*zip(batch.keys, batch.captions, batch.tokens.tolist(), *columns, strict=True)]


def digest(batches: Sequence[Batch]) -> str:
    content = [(b.step, rows(b), sorted(b.errors.items())) for b in batches]
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize("expected", CASES)
def test_batches_are_those_of_earlier_versions(expected, shards, cache):
    for features in ("", cache):
        pipeline = build(shards, features, CASES[expected])
        assert digest([*pipeline.batches(5, CASES[expected]["steps"])]) == expected


def test_bad_samples_and_several_captions_are_among_them(shards, cache):
    (batch,) = build(shards, cache, {"batch": 602, "steps": 1}).batches(0, 1)
    assert set(batch.errors) == {"no_caption", "not_utf8", "empty_caption"}
    assert sum(batch.errors.values()) == int((~batch.valid).sum()) > 60
    drawn: dict[str, set[str]] = {}
    for key, caption in zip(batch.keys, batch.captions, strict=True):
        drawn.setdefault(key, set()).add(caption)
    assert sum(len(captions) > 1 for captions in drawn.values()) > 20


def test_a_run_resumes_anywhere_in_parts_or_whole(shards, cache):
    case = {"batch": 602, "steps": 4, "block_shards": 3}
    whole = [*build(shards, cache, case).batches(0, 4)]
    pipeline = build(shards, cache, case)
    assert digest([*pipeline.batches(2, 2)]) == digest(whole[2:])
    parts = [[*parts] for parts in pipeline.parts(2, 2)]
    assert [[len(part) for part in own] for own in parts] == [[256, 256, 90]] * 2
    assert digest([Batch.join(own) for own in parts]) == digest(whole[2:])
    assert [len([*parts]) for parts in pipeline.steps(0, 2)] == [1, 1]


@pytest.mark.parametrize("several", [2, 5])
def test_several_captions_are_drawn_without_repetition(several, shards, cache):
    """The same from columns and sample by sample, the first of each slot as without the flag, and
    as many as the sample has."""
    case = {"batch": 301, "steps": 3, "block_shards": 3}
    first = [*build(shards, cache, case).batches(1, 3)]
    case |= {"captions_per_image": several}
    ours, theirs = ([*build(shards, f, case).batches(1, 3)] for f in (cache, ""))
    whole = set()
    for one, got, expected in zip(first, ours, theirs, strict=True):
        assert got.slots.tolist() == expected.slots.tolist() == sorted(got.slots)
        assert got.captions == expected.captions
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.tokens.tolist() == [[ord(char) for char in text] for text in got.captions]
        assert [*got.keys] == [*one.keys]
        for slot, key in enumerate(got.keys):
            own = [got.captions[i] for i in np.flatnonzero(got.slots == slot).tolist()]
            assert own[:1] == [one.captions[slot]] * bool(one.valid[slot])
            whole |= {(key, tuple(own))}
    counts = {len(own) for _, own in whole}
    assert counts == {0, 1, 2} if several == 2 else counts == {0, 1, 2, 5}
    drawn = [own for key, own in whole if len(own) == several]
    assert len(drawn) > len({key for key, own in whole if len(own) == several})  # others by epoch
    parts = [*next(build(shards, "", case).parts(2, 1))]
    assert [len(part) for part in parts] == [256, 45]
    assert Batch.join(parts).slots.tolist() == ours[1].slots.tolist()


def test_numbers_drawn_together_are_different_and_any_of_them():
    counts = np.repeat([1, 2, 3, 7], 2000)
    keys = [str(number).encode() for number in range(len(counts))]
    epochs = np.zeros(len(counts), dtype=np.int64)
    drawn = draw_several(counts, 4, 0, epochs, lambda rows: [keys[row] for row in rows])
    for count in (1, 2, 3, 7):
        own = drawn[counts == count][:, :count]
        assert all(len(set(row)) == len(row) and max(row) < count for row in own.tolist())
        for column in own.T:
            shares = np.bincount(column, minlength=count) / len(own)
            assert abs(shares - 1 / count).max() < 0.05
    pairs = np.bincount(drawn[counts == 7][:, 0] * 7 + drawn[counts == 7][:, 1], minlength=49)
    assert abs(pairs[pairs > 0] / 2000 - 1 / 42).max() < 0.015
    assert (pairs > 0).sum() == 42


def test_strings_are_made_when_somebody_asks():
    asked: list[int] = []
    strings = LazyStrings(2, lambda: asked.append(1) or ["a", "b"])
    assert len(strings) == 2
    assert not asked
    assert strings == ["a", "b"] == strings[:] == list(strings)
    assert strings[1] == "b"
    assert strings != ["a"]
    assert asked == [1]


def test_drawing_for_many_is_drawing_for_each():
    rng = np.random.default_rng(0)
    counts, epochs = rng.integers(0, 5, 200), rng.integers(0, 3, 200)
    keys = [f"{WORDS[number % 7]}/{number}" for number in range(200)]
    for what in ("", "view"):
        drawn = draw_all(counts, 7, epochs, lambda rows: [keys[r].encode() for r in rows], what)
        for key, count, epoch, number in zip(keys, counts, epochs, drawn, strict=True):
            text = f"7/{epoch}/{key}{what}".encode()
            value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
            assert number == (value % int(count) if count else 0)
            assert count == 0 or number == draw(int(count), 7, int(epoch), key, what)
