"""Images without captions, their labels, and random changes that the seed alone decides."""

import pytest
import torch
from shard_maker import TRANSFORM, png, sample, write_tar

from contrastive.flexify.augment import build_change, draw_mixup, mix_pairs
from contrastive.flexify.config import AugmentConfig
from data.config import DataConfig
from data.errors import UsageError
from data.pipeline.labelled import LabelledPipeline


@pytest.fixture
def shards(tmp_path) -> tuple[str, ...]:
    members = [(f"k{i}.png", png(i, (40, 30))) for i in range(7)]
    members += [("k7.png", png(7)), ("k7.cls", b"4"), ("k8.png", png(8)), ("k8.cls", b"four")]
    return (write_tar(tmp_path / "a.tar", members + sample("k9", 9)),)


def batches(shards, steps=5, ranks=1, workers=0, augment=None, labels=True, **data) -> list[dict]:
    """Per step: key -> (pixels, label, valid), of all ranks."""
    out: list[dict] = [{} for _ in range(steps)]
    cfg = DataConfig(shards=shards, num_workers=workers, **data)
    change = build_change(augment or AugmentConfig())
    for rank in range(ranks):
        pipeline = LabelledPipeline(
            cfg, TRANSFORM, change, labels=labels,
            seed=3, global_batch_size=4, rank=rank, world_size=ranks,
        )  # fmt: skip
        for step, batch in enumerate(pipeline.batches(0, steps)):
            for i, key in enumerate(batch.keys):
                label = None if batch.labels is None else int(batch.labels[i])
                out[step][key] = (batch.images[i], label, bool(batch.valid[i]))
    return out


def test_samples_need_no_caption_and_may_have_a_label(shards):
    seen: dict = {}
    for step in batches(shards):
        seen |= step
    assert {key for key, (_, _, valid) in seen.items() if valid} == {
        f"k{i}" for i in (*range(8), 9)
    }
    assert seen["k7"][1] == 4
    assert seen["k0"][1] == -1
    assert not seen["k8"][2]  # its label is no number


def test_a_bad_label_is_no_matter_where_labels_are_not_read(shards):
    seen: dict = {}
    for step in batches(shards, labels=False):
        seen |= step
    assert seen["k8"][1:] == (None, True)


@pytest.mark.parametrize(
    "options",
    [{"views": 9, "flip": True}, {"views": 9, "crop": 0.3}, {"augment": AugmentConfig(20)}],
)
def test_changes_are_the_same_for_any_ranks_and_workers(options, shards):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    expected = batches(shards, **options)
    assert torch.equal(torch.random.get_rng_state(), state)  # training's own randomness is left
    torch.manual_seed(1)
    plain = batches(shards)
    for other in (batches(shards, ranks=2, **options), batches(shards, workers=2, **options)):
        for a, b in zip(expected, other, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key][0], b[key][0]) for key in a)
    changed = [
        not torch.equal(a[k][0], b[k][0]) for a, b in zip(plain, expected, strict=True) for k in a
    ]
    assert any(changed)


@pytest.mark.parametrize("options", [{"views": 99, "crop": 0.3}, {"augment": AugmentConfig(20)}])
def test_an_image_changes_from_epoch_to_epoch(options, shards):
    seen: dict = {}
    for step in batches(shards, steps=10, **options):  # 40 samples: four epochs
        for key, (pixels, _, valid) in step.items():
            if valid:
                seen.setdefault(key, []).append(pixels)
    again = [not torch.equal(v[0], v[-1]) for v in seen.values() if len(v) > 1]
    assert sum(again) >= 0.7 * len(again) > 0  # some of RandAugment's operations do nothing


def test_mixed_pairs_hold_the_sum_and_share_one_draw():
    own = draw_mixup(0.4, 64, seed=0, step=5)
    assert torch.equal(own[0::2], own[1::2])
    assert ((own >= 0) & (own <= 1)).all()
    assert own.unique().numel() == 32
    assert not torch.equal(own, draw_mixup(0.4, 64, seed=0, step=6))
    values = torch.randn(64, 3, 2)
    mixed = mix_pairs(values, own)
    torch.testing.assert_close(mixed[0::2] + mixed[1::2], values[0::2] + values[1::2])
    torch.testing.assert_close(mixed[6], values[6] * own[6] + values[7] * (1 - own[6]))
    assert torch.equal(mix_pairs(values, torch.ones(64)), values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"randaugment": 31}, "augment.randaugment 31: allowed are 0 to 30"),
        ({"mixup": -0.1}, "augment.mixup -0.1: must be at least 0"),
    ],
)
def test_impossible_augmentation_is_one_sentence(values, sentence):
    with pytest.raises(UsageError, match=sentence):
        AugmentConfig(**values)
