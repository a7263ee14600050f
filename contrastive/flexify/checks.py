"""Checks before a flexify run starts: losses, heads and labels."""

from collections.abc import Sequence

from contrastive import distributed
from contrastive.flexify.config import (
    FlexifyConfig,
)
from contrastive.flexify.losses import class_head
from contrastive.flexify.student import Teacher
from contrastive.vision.tower import VisionTower
from data.errors import UsageError
from data.pipeline.reader import ShardReader
from data.shards.names import expand_shards, is_local


def check_losses(cfg: FlexifyConfig, teacher: Teacher, tower: VisionTower) -> None:
    """Raise `UsageError` where a loss does not fit these towers."""
    fits = teacher.tower.config.fit, tower.config.fit
    if cfg.data.features and len({*fits}) > 1:
        raise UsageError(
            f"data.features holds the teacher's features of images made square by {fits[0]}, the "
            f"student's are made so by {fits[1]}; allowed: no data.features, or a student that "
            "starts from the teacher"
        )
    if cfg.student.max_aspect > 1 and not teacher.tower.flexible:
        raise UsageError(
            f"student.max_aspect {cfg.student.max_aspect}: teacher.tower {cfg.teacher.tower} reads "
            "squares alone; allowed: 1"
        )
    theirs, ours = teacher.tower.embed_dim, tower.embed_dim
    if cfg.loss.features and theirs != ours:
        raise UsageError(
            f"loss.features compares features, but the teacher's have width {theirs} and the "
            f"student's {ours}; allowed with other widths: loss.kl, loss.labels"
        )
    head = class_head(tower)
    if cfg.loss.kl:
        if teacher.head is None:
            raise UsageError(
                f"loss.kl needs class logits, and teacher.tower {cfg.teacher.tower} has no "
                "class head; allowed: loss.features, loss.labels"
            )
        classes = teacher.head.out_features
        if head is None or head.out_features != classes:
            raise UsageError(
                f"loss.kl compares class logits: the teacher has {classes}, the student "
                f"{head.out_features if head else 0}; allowed: student.num_classes {classes}"
            )
    if cfg.loss.labels and head is None:
        raise UsageError("loss.labels needs a class head; say student.num_classes N")
    if head is not None and not (cfg.loss.kl or cfg.loss.labels):
        head.requires_grad_(False)  # without a loss of its own it would only decay
    if not any(p.requires_grad for p in tower.parameters()):
        raise UsageError("student.trainable leaves nothing that these losses could train")


def check_labels(cfg: FlexifyConfig, tower: VisionTower) -> None:
    """Raise `UsageError` where a label of local shards is no class of the student's head."""
    if not cfg.loss.labels:
        return
    num_classes = tower.net.num_classes
    for flag, patterns in (("data.shards", cfg.data.shards), ("val_shards", cfg.val_shards)):
        found, num_bad = _labels(cfg, patterns) if patterns else (set[int](), 0)
        if max(found, default=0) >= num_classes:
            raise UsageError(
                f"{flag} hold label {max(found)}, but the student has {num_classes} classes; "
                f"allowed are labels 0 to {num_classes - 1}, or student.num_classes "
                f"{max(found) + 1}"
            )
        if found == {-1}:
            which = f"{num_bad} that are no class number" if num_bad else "none"
            raise UsageError(f"loss.labels needs KEY.cls members, and {flag} hold {which}")


def _labels(cfg: FlexifyConfig, patterns: Sequence[str]) -> tuple[set[int], int]:
    """The labels of local shards, -1 for none, and how many are no class number; nothing where no
    shard is local."""
    shards = [s for s in expand_shards(patterns, cfg.data.allow_pipe) if is_local(s)]
    labels, num_bad = {-1} if shards else set[int](), 0
    mine = shards[distributed.rank() :: distributed.world_size()]
    if mine:
        reader = ShardReader(
            mine, None, batch_size=4096, num_workers=0, index_dir=cfg.data.index_dir
        )
        for batch in reader:
            labels |= set(batch.labels.tolist())
        num_bad = reader.errors.get("bad_label", 0)
    gathered = distributed.gather_objects((labels, num_bad))
    return set[int]().union(*(found for found, _ in gathered)), sum(bad for _, bad in gathered)
