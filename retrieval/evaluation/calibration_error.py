"""Whether probabilities are right as often as they say, and the temperature that mends them."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from data.files import is_intact, sealed, write_json
from retrieval.detail import Detail, as_key, from_key

BINS = 15  # of equal width (Guo et al. 2017, arXiv:1706.04599, section 2)
COARSEST = 100.0  # temperatures are looked for between 1 / this and this
_UNIT = 2**30  # confidences are summed as whole numbers, in any order of ranks


@dataclass(frozen=True)
class CalibrationError:
    """Of one data set at one patch size; shares in [0, 1]."""

    ece: float  # at the model's own logit scale
    images: int  # on which it was measured
    temperature: float | None = None  # None: nothing to fit it on
    ece_at_temperature: float | None = None
    chance: float = math.nan  # what chance alone gives where every probability is right
    examples: int = 0  # images that the temperature was fitted on, and no error was measured on

    @property
    def final(self) -> float:
        """With the temperature where there is one."""
        return self.ece if self.ece_at_temperature is None else self.ece_at_temperature


class ConfidenceBins:
    """How sure and how right the first class was, in bins of confidence. Adds up exactly.

    `counts` is (BINS, 3) int64: images, right ones, and the sum of confidences in 2**-30.
    """

    def __init__(self) -> None:
        self.counts = np.zeros((BINS, 3), np.int64)

    def add(self, confidences: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> None:
        bins = np.clip(np.ceil(confidences * BINS).astype(np.int64) - 1, 0, BINS - 1)
        units = np.rint(confidences * _UNIT).astype(np.int64)
        rows = np.stack([np.ones(len(right), np.int64), right.astype(np.int64), units], axis=1)
        np.add.at(self.counts, bins, rows)

    def error(self) -> float:
        """The expected calibration error, to four decimals; NaN of no image."""
        images, right, units = self.counts.astype(np.float64).T
        total = float(images.sum())
        gap = float(np.abs(right - units / _UNIT).sum())
        return round(gap / total, 4) if total else math.nan

    def chance(self) -> float:
        """The error to expect of probabilities that are exactly right: of n images in a bin of mean
        confidence p, the mean of |right - n p| is about sqrt(2 n p (1 - p) / pi). NaN of no image.
        """
        images, _, units = self.counts[self.counts[:, 0] > 0].astype(np.float64).T
        total = float(images.sum())
        share = np.clip(units / _UNIT / images, 0, 1)
        gap = float(np.sqrt(2 / math.pi * images * share * (1 - share)).sum())
        return round(gap / total, 4) if total else math.nan


def confidence(logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
    """Softmax of the largest."""
    with np.errstate(under="ignore"):
        return 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)


def mean_nll(logits: Float[np.ndarray, "n c"], targets: Int[np.ndarray, " n"]) -> float:
    """Mean negative log-likelihood of the right classes, nats."""
    top = logits.max(axis=1)
    with np.errstate(under="ignore"):
        log_sums = np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float((top + log_sums - logits[np.arange(len(targets)), targets]).mean())


def fit_temperature(logits: Float[np.ndarray, "n c"], targets: Int[np.ndarray, " n"]) -> float:
    """The temperature that divides logits for the least negative log-likelihood (arXiv:1706.04599,
    section 4.2); never worse than 1, which is the answer where there is no example.

    The loss is convex in 1 / temperature: its slope is bisected.
    """
    logits = logits.astype(np.float64)
    if not len(targets) or not np.isfinite(logits).all():
        return 1.0
    logits -= logits.max(axis=1, keepdims=True)
    right = logits[np.arange(len(targets)), targets]

    def slope(log_beta: float) -> float:
        with np.errstate(under="ignore"):
            powers = np.exp(math.exp(log_beta) * logits)
        return float(((powers * logits).sum(axis=1) / powers.sum(axis=1) - right).mean())

    low, high = -math.log(COARSEST), math.log(COARSEST)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    found = math.exp(-(low + high) / 2)
    return found if mean_nll(logits / found, targets) <= mean_nll(logits, targets) else 1.0


# ---- temperatures of a model, kept in its folder --------------------------------------------


def temperatures_file(model: Path) -> Path:
    """Where a model's folder keeps them."""
    return model / "temperatures.json"


def write_temperatures(
    model: Path, fingerprints: tuple[str, str], temperatures: Mapping[Detail, float], source: str
) -> Path:
    """Keep temperatures by patch size. fingerprints: of the model's images and texts. source: what
    they were fitted on, in words."""
    image, text = fingerprints
    values = {
        "format": 1, "image_fingerprint": image, "text_fingerprint": text, "source": source,
        "temperatures": {str(as_key(size)): value for size, value in temperatures.items()},
    }  # fmt: skip
    write_json(temperatures_file(model), sealed(values))
    return temperatures_file(model)


def read_temperatures(
    model: Path, fingerprints: Callable[[], tuple[str, str]]
) -> dict[Detail, float]:
    """Those of this model; {} where there are none, the file is damaged or of another model.

    fingerprints: called where there is a file.
    """
    try:
        values = json.loads(temperatures_file(model).read_text())
        held = values["image_fingerprint"], values["text_fingerprint"]
        if values["format"] != 1 or not is_intact(values) or held != fingerprints():
            return {}
        found = {from_key(size): float(value) for size, value in values["temperatures"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {size: value for size, value in found.items() if 0 < value < math.inf}
