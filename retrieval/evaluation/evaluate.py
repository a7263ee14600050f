"""Zero-shot accuracy and recall of a model at several patch sizes, in one pass over the pixels."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from contrastive.distributed import all_reduce_sum, barrier, gather_objects, is_main, world_size
from contrastive.model.lit import LitModel
from data.batch import EvalBatch
from data.config import NUM_WORKERS, OnError
from data.errors import UsageError
from data.pipeline.reader import ShardReader
from data.progress import Progress
from retrieval.detail import Detail
from retrieval.embed.encode import check_encodes, embed_batches, reader_cuts
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.evaluation.confidence_collector import ConfidenceCollector
from retrieval.evaluation.datasets import EvalDataset
from retrieval.evaluation.datasets.image_reader import ImageReader
from retrieval.evaluation.metrics import ClassCounts
from retrieval.evaluation.recall_collector import RecallCollector
from retrieval.evaluation.results import DatasetResult


def evaluate(
    model: LitModel,
    dataset: EvalDataset,
    patch_sizes: Sequence[Detail] = (),
    recall: bool = False,
    batch_size: int = 64,
    num_workers: int = NUM_WORKERS,
    on_error: OnError = "skip",
    examples: int = 0,
) -> DatasetResult:
    """Top-1 and top-5 accuracy, mean per-class recall and the expected calibration error (where the
    set has class names and, for the second, one class for each image), and recall@1/5/10 both ways.

    patch_sizes: or budgets of tokens; none means all of the model's patch sizes. recall: of the
    images that have captions; a retrieval set's is always measured. Ranks share the images; each
    returns the result of all, equal to one process's, calibration errors to rounding. examples: so
    many images, at most half, are drawn for a temperature per patch size, and calibration errors
    are of the others.
    Embeddings for it and for the recall wait in the system's temporary folder (TMPDIR).
    Raises `UsageError` for a label outside the class names, or nothing to evaluate.
    """
    if recall:
        dataset.check_captions()
    with tempfile.TemporaryDirectory(prefix="flexilit-") as folder:
        recall = recall or dataset.captioned
        need_captions = recall and not dataset.class_names
        sizes = tuple(dict.fromkeys(patch_sizes)) or tuple(model.patch_sizes)
        check_encodes(model, *sizes)
        reader = dataset.reader(
            model.transform, batch_size, num_workers, on_error, need_captions,
            reader_cuts(model, sizes),
        )  # fmt: skip
        return _evaluate(model, dataset, sizes, reader, recall, Path(folder), examples)


def _evaluate(
    model: LitModel,
    dataset: EvalDataset,
    sizes: Sequence[Detail],
    reader: ShardReader | ImageReader,
    recall: bool,
    folder: Path,
    examples: int,
) -> DatasetResult:
    classifier = sureness = None
    if dataset.class_names:
        classifier = ZeroShotClassifier(model, dataset.class_names, dataset.templates)
        scale = model.text.scale().item()
        sureness = ConfidenceCollector(folder, sizes, classifier.class_embeds, scale, examples)
    counts = {size: ClassCounts(len(dataset.class_names)) for size in sizes}
    collector = RecallCollector(folder, sizes, model.embed_dim, not dataset.captioned)
    num_images = 0
    with Progress(
        desc=f"evaluating {dataset.name}",
        unit="img",
        total=dataset.num_images() // world_size() or None,
        disable=not is_main(),
    ) as bar:
        for batch, embeds in embed_batches(model, reader, sizes):
            if classifier is not None and sureness is not None:
                targets = _targets(batch, dataset)
                accepted = [dataset.accepted[i] for i in batch.indices] if dataset.accepted else ()
                right: dict[Detail, np.ndarray] = {}
                for size in sizes:
                    labels, _ = classifier.classify_embeddings(embeds[size])
                    right[size] = counts[size].add(labels, targets, accepted)
                sureness.add(batch, targets, embeds, right)
            if recall:
                collector.add(batch, embeds)
            num_images += len(batch)
            bar.update(len(batch))
    barrier(patient=True)

    for size in sizes:
        total = all_reduce_sum(torch.from_numpy(counts[size].counts).to(model.device))
        counts[size].counts = total.cpu().numpy()
    num_images = sum(gather_objects(num_images))
    if not num_images:
        raise UsageError(f"{dataset.name} has no image that can be read")
    found = collector.recall(partial(_encode_texts, model)) if recall else {}
    if recall and not found and classifier is None:
        raise UsageError(f"recall needs captions, and no image of {dataset.name} has any")
    captioned = sum(gather_objects(len(collector)))
    return DatasetResult(
        name=dataset.name,
        num_images=num_images,
        num_classes=len(dataset.class_names),
        errors=dict(sum(map(Counter, gather_objects(reader.errors)), Counter[str]())),
        left_out=dataset.left_out,
        empty_classes=int((counts[sizes[0]].counts[:, 0] == 0).sum()),
        accuracy={s: counts[s].accuracy() for s in sizes} if classifier else {},
        class_recall=(
            {s: counts[s].class_recall() for s in sizes}
            if classifier and not dataset.accepted
            else {}
        ),
        recall=found,
        calibration=sureness.errors() if sureness else {},
        uncaptioned=num_images - captioned if recall else 0,
    )


def _encode_texts(model: LitModel, texts: list[str]) -> Float[np.ndarray, "b d"]:
    return model.encode_text(texts).float().cpu().numpy()


def _targets(batch: EvalBatch, dataset: EvalDataset) -> np.ndarray:
    targets = batch.labels.numpy()
    wrong = (targets < 0) | (targets >= len(dataset.class_names))
    if wrong.any():
        row = int(wrong.argmax())
        label = f"label {int(targets[row])}" if targets[row] >= 0 else "no .cls"
        raise UsageError(
            f"{dataset.name}: sample {batch.keys[row]!r} has {label}; allowed: 0 to "
            f"{len(dataset.class_names) - 1}"
        )
    return targets
