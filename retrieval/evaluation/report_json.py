"""A report as plain values, for report.json."""

import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from retrieval.detail import Detail, answered, as_key
from retrieval.evaluation.costs import PatchCost
from retrieval.evaluation.metrics import Estimate
from retrieval.evaluation.results import DatasetResult, DenseScores


def _faiss_version() -> dict[str, str]:
    """Of the package that is installed, one of three."""
    for name in ("faiss-gpu", "faiss-cpu", "faiss-gpu-cuvs"):
        with suppress(PackageNotFoundError):
            return {name: version(name)}
    return {}


def report_json(
    model: str, costs: Sequence[PatchCost], results: Sequence[DatasetResult]
) -> dict[str, Any]:
    """Everything as plain values; shares in [0, 1], nan as None."""
    return {
        "format": 1,
        "model": model,
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "versions": {**{name: version(name) for name in ("torch", "timm")}, **_faiss_version()},
        },
        "patch_sizes": [
            {
                **{name: n for name, n in answered("", c.patch_size).items() if n is not None},
                "tokens": c.tokens,
                "gflops": c.gflops,
                "images_per_second": dict(
                    zip(("median", "min", "max"), c.images_per_second, strict=True)
                ),
            }
            for c in costs
        ],
        "datasets": [
            {
                "name": d.name,
                "num_images": d.num_images,
                "num_classes": d.num_classes,
                "errors": dict(d.errors),
                "left_out": d.left_out,
                "empty_classes": d.empty_classes,
                "uncaptioned": d.uncaptioned,
                "accuracy": {_key(size): _plain(by_k, "top") for size, by_k in d.accuracy.items()},
                "mean_per_class_recall": {
                    _key(size): _plain_estimate(e) for size, e in d.class_recall.items()
                },
                **(
                    {
                        "dense": {_key(size): _dense(scores) for size, scores in d.dense.items()},
                        "noted": dict(d.noted),
                        "remark": d.remark,
                    }
                    if d.dense
                    else {}
                ),
                "calibration": {
                    _key(size): {name: _number(value) for name, value in asdict(error).items()}
                    for size, error in d.calibration.items()
                },
                "recall": {
                    _key(size): {
                        "image_to_text": _plain(recall.image_to_text, "recall"),
                        "text_to_image": _plain(recall.text_to_image, "recall"),
                    }
                    for size, recall in d.recall.items()
                },
            }
            for d in results
        ],
    }


def _key(size: Detail) -> str:
    return str(as_key(size))


def _plain(estimates: Mapping[int, Estimate], name: str) -> dict[str, dict[str, Any]]:
    return {f"{name}{k}": _plain_estimate(e) for k, e in estimates.items()}


def _plain_estimate(estimate: Estimate) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "value": _number(estimate.value),
        "standard_error": _number(estimate.standard_error),
    }
    if estimate.interval:
        plain["interval_95"] = list(estimate.interval)
    return plain


def _dense(scores: DenseScores) -> dict[str, Any]:
    per_class = [_number(share) for share in scores.iou_per_class]
    shares = {name: _number(share) for name, share in scores.shares().items()}
    return {**shares, **({"iou_per_class": per_class} if per_class else {})}


def _number(value: int | float | None) -> int | float | None:
    return None if value is None or math.isnan(value) else value
