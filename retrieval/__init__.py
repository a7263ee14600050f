"""What comes out: bulk embeddings, a FAISS index, zero-shot classification, search."""

from retrieval.budget import Budget
from retrieval.classify import ZeroShotClassifier
from retrieval.datasets import EvalDataset, load_dataset
from retrieval.embed import embed_shards
from retrieval.evaluate import evaluate
from retrieval.index import add_embeddings, build_index, compact_index, delete_ids
from retrieval.metrics import recall_at_k, topk_accuracy
from retrieval.photos import index_photos
from retrieval.report import Report, measure_costs
from retrieval.search import Hit, Searcher
from retrieval.sheet import contact_sheet

__all__ = [
    "Budget",
    "EvalDataset",
    "Hit",
    "Report",
    "Searcher",
    "ZeroShotClassifier",
    "add_embeddings",
    "build_index",
    "compact_index",
    "contact_sheet",
    "delete_ids",
    "embed_shards",
    "evaluate",
    "index_photos",
    "load_dataset",
    "measure_costs",
    "recall_at_k",
    "topk_accuracy",
]
