"""What comes out: bulk embeddings, a FAISS index, zero-shot classification, search."""

from retrieval.embed.bulk import embed_shards
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.evaluation.datasets import EvalDataset, load_dataset
from retrieval.evaluation.evaluate import evaluate
from retrieval.evaluation.metrics import recall_at_k, topk_accuracy
from retrieval.evaluation.report import Report, measure_costs
from retrieval.index.build import add_embeddings, build_index, compact_index, delete_ids
from retrieval.index.photos import index_photos
from retrieval.search.contact_sheet import contact_sheet
from retrieval.search.cost_profile import Budget
from retrieval.search.searcher import Hit, Searcher

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
