"""Flickr30k, COCO and CLIP_benchmark's layout: each caption is its own image's, recall exact."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_maker import TRANSFORM, png, write_tar
from tree_maker import write_karpathy

from contrastive.model.lit import LitModel
from data.batch import EvalBatch
from data.errors import UsageError
from retrieval.evaluation.datasets import load_dataset, load_named
from retrieval.evaluation.evaluate import evaluate
from retrieval.evaluation.metrics import recall_at_k
from retrieval.evaluation.recall_collector import RecallCollector

WORDS = ("a red bicycle", "a happy cat", "two dogs", "the sun", "smile")


def captions_of(number: int) -> list[str]:
    """Five, no two equal, of an image from 0 to 11."""
    phrases = [" and ".join(words) for words in itertools.permutations(WORDS, 3)]
    return phrases[5 * number : 5 * number + 5]


def write_images(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))


def by_hand(images: np.ndarray, texts: np.ndarray, per_image: int) -> dict[str, float]:
    """Recall from the whole matrix of scores, as the papers define it."""
    scores = images @ texts.T
    owner = np.arange(len(texts)) // per_image
    found = {}
    for k in (1, 5, 10):
        best = np.argsort(-scores, axis=1)[:, :k]
        found[f"image_to_text/recall{k}"] = np.mean(
            (np.arange(len(images)) == owner[best].T).any(0)
        )
        best = np.argsort(-scores.T, axis=1)[:, :k]
        found[f"text_to_image/recall{k}"] = np.mean((owner == best.T).any(0))
    return found


@pytest.mark.parametrize(
    ("kind", "folder", "inside"),
    [
        ("flickr30k", "flickr30k-images", ""),
        ("flickr30k", "", ""),
        ("coco", "", "val2014/"),
        ("coco", "images", "val2014/"),
    ],
)
def test_karpathys_test_split(kind: str, folder: str, inside: str, tmp_path: Path) -> None:
    names = [f"{inside}{n}.jpg" for n in range(7)]
    write_images(tmp_path / folder, names)
    write_karpathy(tmp_path, kind, {n: captions_of(i) for i, n in enumerate(names)}, "test")
    dataset = load_named(f"{kind}:{tmp_path}")
    assert (dataset.name, dataset.captioned, dataset.num_images()) == (kind, True, 7)
    batches = list(dataset.reader(TRANSFORM, batch_size=4, num_workers=0))
    captions = [own for batch in batches for own in batch.captions]
    assert captions == [tuple(captions_of(n)) for n in range(7)]


def test_recall_equals_the_whole_matrix_of_scores(tmp_path: Path, tiny_model: LitModel) -> None:
    names = [f"{n}.jpg" for n in range(12)]
    write_images(tmp_path / "images", names)
    write_karpathy(tmp_path, "flickr30k", {n: captions_of(i) for i, n in enumerate(names)}, "test")
    dataset = load_dataset("flickr30k", tmp_path)
    result = evaluate(tiny_model, dataset, [48, 40], batch_size=5, num_workers=0)
    texts = [caption for n in range(12) for caption in captions_of(n)]
    text_embeds = tiny_model.encode_text(texts).numpy()
    pictures = [Image.open(tmp_path / "images" / name).convert("RGB") for name in names]
    for size in (48, 40):
        images = tiny_model.encode_image(pictures, patch_size=size).numpy()
        for name, value in by_hand(images, text_embeds, 5).items():
            assert result.figures()[f"flickr30k/p{size}/{name}"] == value


def test_clip_benchmarks_retrieval_layout_has_a_caption_on_each_line(
    tmp_path: Path, tiny_model: LitModel
) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    (tmp_path / "test/nshards.txt").write_text("2")
    for shard in range(2):
        members = [
            member
            for n in range(3 * shard, 3 * shard + 3)
            for member in (
                (f"s{n:07d}.png", png(n)),
                (f"s{n:07d}.txt", "\n".join(captions_of(n)).encode()),
            )
        ]
        write_tar(tmp_path / f"test/{shard}.tar", members)
    dataset = load_dataset("shards", tmp_path, "mine")
    batches = list(dataset.reader(TRANSFORM, num_workers=0))
    captions = [own for batch in batches for own in batch.captions]
    assert captions == [tuple(captions_of(n)) for n in range(6)]
    result = evaluate(tiny_model, dataset, [48], num_workers=0)
    assert result.num_images == 6
    assert result.recall[48].text_to_image[10].value == 1.0  # of six
    assert not result.accuracy
    (tmp_path / "test/1.tar").unlink()
    with pytest.raises(UsageError, match=r"test has 1 tars; .*nshards\.txt says '2'"):
        load_dataset("shards", tmp_path)
    (tmp_path / "dataset_type.txt").write_bytes(b"\xff")
    (tmp_path / "test/nshards.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"test has 1 tars; .*nshards\.txt says '\ufffd'"):
        load_dataset("shards", tmp_path)
    (tmp_path / "test/nshards.txt").write_text("1")
    with pytest.raises(UsageError, match=r"says '\ufffd'; allowed: classification, retrieval"):
        load_dataset("shards", tmp_path)
    (tmp_path / "dataset_type.txt").write_text("detection")
    (tmp_path / "test/nshards.txt").unlink()
    with pytest.raises(UsageError, match="says 'detection'; allowed: classification, retrieval"):
        load_dataset("shards", tmp_path)


@pytest.mark.parametrize("shared", [True, False])
def test_recall_from_disk_equals_recall_in_memory(shared: bool, tmp_path: Path) -> None:
    captions = [[f"own {n}", f"shared {n % 4}", f"own {n} too"] for n in range(20)]
    rng = np.random.default_rng(0)
    vectors = {text: rng.normal(size=8) for text in dict.fromkeys(itertools.chain(*captions))}
    images = rng.normal(size=(len(captions), 8)).astype(np.float32)
    collector = RecallCollector(tmp_path, [16], 8, shared)
    for number in range(20):
        row = torch.tensor([number])
        batch = EvalBatch([str(number)], None, [tuple(captions[number])], row, 0, row, row, row)
        collector.add(batch, {16: images[number : number + 1]})
    encoded = collector.recall(
        lambda texts: np.array([vectors[t] for t in texts], np.float32).reshape(-1, 8)
    )[16]
    texts = list(itertools.chain(*captions))
    if shared:
        texts = list(dict.fromkeys(texts))
        pairs = [(i, texts.index(c)) for i, own in enumerate(captions) for c in own]
    else:
        owners = [i for i, own in enumerate(captions) for _ in own]
        pairs = list(zip(owners, range(len(texts)), strict=True))
    embeds = np.array([vectors[t] for t in texts], np.float32)
    assert encoded == recall_at_k(images, embeds, np.array(pairs))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected Karpathy's splits there"),
        ("[1]", "is not Karpathy's file of splits"),
        ('{"images": []}', "has no image of the split test"),
        (
            '{"images": [{"filename": "x.jpg", "split": "test", "sentences": []}]}',
            r"x\.jpg has no caption, or an empty one",
        ),
        (
            '{"images": [{"filename": "x.jpg", "split": "test", "sentences": [{"raw": "a"}]}]}',
            r"x\.jpg of .* is not in .*; expected the images in one of",
        ),
    ],
)
def test_damaged_splits_are_refused_with_the_path(text: str, message: str, tmp_path: Path) -> None:
    if text:
        (tmp_path / "dataset_coco.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_dataset("coco", tmp_path)


def test_an_unknown_set_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown data set 'imagenet22k'; allowed: shards, fold"):
        load_named(f"imagenet22k:{tmp_path}")
