"""Zero-shot accuracy and recall of a model at several patch sizes, in one pass over the pixels."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from contrastive.distributed import all_reduce_sum, gather_objects, is_main, rank, world_size
from contrastive.lit import LitModel
from data.batch import EvalBatch
from data.errors import UsageError
from data.samples import OnError
from retrieval.classify import ZeroShotClassifier
from retrieval.datasets import EvalDataset
from retrieval.embed import check_patch_sizes, embed_batches
from retrieval.metrics import ClassCounts, caption_pairs, recall_at_k
from retrieval.report import DatasetResult


def evaluate(
    model: LitModel,
    dataset: EvalDataset,
    patch_sizes: Sequence[int] = (),
    recall: bool = False,
    batch_size: int = 64,
    num_workers: int = 2,
    on_error: OnError = "skip",
) -> DatasetResult:
    """Top-1 and top-5 accuracy (where the set has class names), and recall@1/5/10 both ways.

    patch_sizes: none means all of the model's. recall: needs captions, and keeps every embedding
    in memory. Ranks share the images; each returns the result of all, equal to one process's.
    Raises `UsageError` for a label outside the class names, or nothing to evaluate.
    """
    sizes = check_patch_sizes(model, patch_sizes)
    classifier = None
    if dataset.class_names:
        classifier = ZeroShotClassifier(model, dataset.class_names, dataset.templates)
    counts = {size: ClassCounts(len(dataset.class_names)) for size in sizes}
    collected = _Collected(sizes)
    num_images = 0
    reader = dataset.reader(model.transform, batch_size, num_workers, on_error, recall)
    with tqdm(
        desc=f"evaluating {dataset.name}",
        unit="img",
        total=dataset.num_images() // world_size() or None,
        disable=not is_main(),
    ) as bar:
        for batch, embeds in embed_batches(model, reader, sizes):
            if classifier is not None:
                targets = _targets(batch, dataset)
                for size in sizes:
                    labels, _ = classifier.classify_embeddings(embeds[size])
                    counts[size].add(labels, targets)
            if recall:
                collected.add(batch, embeds)
            num_images += len(batch)
            bar.update(len(batch))

    for size in sizes:
        total = all_reduce_sum(torch.from_numpy(counts[size].counts).to(model.device))
        counts[size].counts = total.cpu().numpy()
    num_images = sum(gather_objects(num_images))
    if not num_images:
        raise UsageError(f"{dataset.name} has no image that can be read")
    return DatasetResult(
        name=dataset.name,
        num_images=num_images,
        num_classes=len(dataset.class_names),
        errors=dict(sum(map(Counter, gather_objects(reader.errors)), Counter[str]())),
        accuracy={size: counts[size].accuracy() for size in sizes} if classifier else {},
        recall=collected.recall(model) if recall else {},
    )


def _targets(batch: EvalBatch, dataset: EvalDataset) -> np.ndarray:
    targets = batch.labels.numpy()
    wrong = (targets < 0) | (targets >= len(dataset.class_names))
    if wrong.any():
        row = int(wrong.argmax())
        raise UsageError(
            f"{dataset.name}: sample {batch.keys[row]!r} has label {int(targets[row])} "
            f"(-1: no .cls); allowed: 0 to {len(dataset.class_names) - 1}"
        )
    return targets


class _Collected:
    """Embeddings and captions of all images, in the data set's order whatever the ranks."""

    def __init__(self, patch_sizes: Sequence[int]) -> None:
        self.positions: list[tuple[int, int]] = []
        self.captions: list[tuple[str, ...]] = []
        self.embeds: dict[int, list[np.ndarray]] = {size: [] for size in patch_sizes}

    def add(self, batch: EvalBatch, embeds: dict[int, np.ndarray]) -> None:
        part = rank() + batch.shard * world_size()  # ranks share shards in turn
        self.positions += [(part, int(index)) for index in batch.indices]
        self.captions += batch.captions
        for size, rows in embeds.items():
            self.embeds[size].append(rows)

    def recall(self, model: LitModel) -> dict:
        """patch size -> `Recall`, on every rank."""
        width = model.embed_dim
        own = {
            size: np.concatenate([*rows, np.zeros((0, width), np.float32)])
            for size, rows in self.embeds.items()
        }
        ranks = gather_objects((self.positions, self.captions, own))
        positions = np.array([p for part in ranks for p in part[0]], np.int64).reshape(-1, 2)
        order = np.lexsort((positions[:, 1], positions[:, 0]))
        captions = [c for part in ranks for c in part[1]]
        texts, pairs = caption_pairs([captions[i] for i in order])
        if not texts:
            raise UsageError("recall needs captions, and no image has any")
        blocks = [model.encode_text(texts[i : i + 256]).cpu() for i in range(0, len(texts), 256)]
        text_embeds = torch.cat(blocks).float().numpy()
        return {
            size: recall_at_k(
                np.concatenate([part[2][size] for part in ranks])[order], text_embeds, pairs
            )
            for size in self.embeds
        }
