"""What comes out: bulk embeddings, a FAISS index, zero-shot classification, evaluation, search.

Nothing here trains or changes a model. Names are loaded on first use, so that `import retrieval`
costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.dense.layouts import load_dense
    from retrieval.dense.detect import ZeroShotDetector
    from retrieval.dense.evaluate_dense import evaluate_dense
    from retrieval.dense.segment import ZeroShotSegmenter
    from retrieval.dense.trained import TrainedSegmenter
    from retrieval.dense.trained_boxes import TrainedDetector
    from retrieval.detail import MaxTokens
    from retrieval.embed.bulk import embed_shards
    from retrieval.evaluation.classify import ZeroShotClassifier
    from retrieval.evaluation.costs import measure_costs
    from retrieval.evaluation.datasets import EvalDataset, load_dataset
    from retrieval.evaluation.evaluate import evaluate
    from retrieval.evaluation.metrics import recall_at_k, topk_accuracy
    from retrieval.evaluation.report import Report
    from retrieval.index.build import add_embeddings, build_index, compact_index, delete_ids
    from retrieval.index.widen import index_words
    from retrieval.photos.indexing import index_photos
    from retrieval.regions.updating import index_regions
    from retrieval.search.calibrate import calibrate_index, recalibrate
    from retrieval.search.config import Budget
    from retrieval.search.contact_sheet import contact_sheet
    from retrieval.search.hit import Hit
    from retrieval.search.neighbours import measure_agreement
    from retrieval.search.query_images import Mix
    from retrieval.search.searcher import Searcher

_MODULES = {
    "Budget": "retrieval.search.config",
    "EvalDataset": "retrieval.evaluation.datasets",
    "Hit": "retrieval.search.hit",
    "MaxTokens": "retrieval.detail",
    "Mix": "retrieval.search.query_images",
    "Report": "retrieval.evaluation.report",
    "Searcher": "retrieval.search.searcher",
    "TrainedDetector": "retrieval.dense.trained_boxes",
    "TrainedSegmenter": "retrieval.dense.trained",
    "ZeroShotClassifier": "retrieval.evaluation.classify",
    "ZeroShotDetector": "retrieval.dense.detect",
    "ZeroShotSegmenter": "retrieval.dense.segment",
    "add_embeddings": "retrieval.index.build",
    "build_index": "retrieval.index.build",
    "calibrate_index": "retrieval.search.calibrate",
    "compact_index": "retrieval.index.build",
    "contact_sheet": "retrieval.search.contact_sheet",
    "delete_ids": "retrieval.index.build",
    "embed_shards": "retrieval.embed.bulk",
    "evaluate": "retrieval.evaluation.evaluate",
    "evaluate_dense": "retrieval.dense.evaluate_dense",
    "load_dense": "data.dense.layouts",
    "index_photos": "retrieval.photos.indexing",
    "index_regions": "retrieval.regions.updating",
    "index_words": "retrieval.index.widen",
    "load_dataset": "retrieval.evaluation.datasets",
    "measure_agreement": "retrieval.search.neighbours",
    "measure_costs": "retrieval.evaluation.costs",
    "recalibrate": "retrieval.search.calibrate",
    "recall_at_k": "retrieval.evaluation.metrics",
    "topk_accuracy": "retrieval.evaluation.metrics",
}

__all__ = [
    "Budget",
    "EvalDataset",
    "Hit",
    "MaxTokens",
    "Mix",
    "Report",
    "Searcher",
    "TrainedDetector",
    "TrainedSegmenter",
    "ZeroShotClassifier",
    "ZeroShotDetector",
    "ZeroShotSegmenter",
    "add_embeddings",
    "build_index",
    "calibrate_index",
    "compact_index",
    "contact_sheet",
    "delete_ids",
    "embed_shards",
    "evaluate",
    "evaluate_dense",
    "index_photos",
    "index_regions",
    "index_words",
    "load_dataset",
    "load_dense",
    "measure_agreement",
    "measure_costs",
    "recalibrate",
    "recall_at_k",
    "topk_accuracy",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
