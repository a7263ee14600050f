"""What comes out: bulk embeddings, a FAISS index, zero-shot classification, search."""

from retrieval.classify import ZeroShotClassifier
from retrieval.datasets import EvalDataset, load_dataset
from retrieval.embed import embed_shards
from retrieval.evaluate import evaluate
from retrieval.index import build_index
from retrieval.metrics import recall_at_k, topk_accuracy
from retrieval.report import Report, measure_costs
from retrieval.search import Hit, Searcher
from retrieval.sheet import contact_sheet

__all__ = [
    "EvalDataset",
    "Hit",
    "Report",
    "Searcher",
    "ZeroShotClassifier",
    "build_index",
    "contact_sheet",
    "embed_shards",
    "evaluate",
    "load_dataset",
    "measure_costs",
    "recall_at_k",
    "topk_accuracy",
]
