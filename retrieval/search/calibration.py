"""What an index knows of its own similarities: whether a text is answered at all, and how many
candidates coarse to fine needs.

It is measured on texts that the index answers (`retrieval.search.calibrate`), kept as
calibration.safetensors beside the manifest, and read here, without torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UsageError
from data.files import bytes_digest, write_atomically
from retrieval.detail import Detail, as_key, from_key, said, said_pair
from retrieval.search.background import answer_scores
from retrieval.search.config import MAX_K
from retrieval.search.conformal import fewest_candidates, p_values

CHANGED = 0.2  # share of the images that was added or deleted, above which it holds no longer
FINE_ANSWERS = 50  # k up to which candidates are promised
ROUNDING = 1e-4  # of scores: a text that is read beside longer ones scores a little otherwise


@dataclass(frozen=True)
class Facts:
    """What was calibrated, and on what."""

    source: str  # of the texts, in words
    texts: int  # that the index answers
    scale: float  # the model's logit scale
    count: int  # images of the index then
    next_id: int  # of the index then: images with higher ids were added since
    image_fingerprint: str
    text_fingerprint: str


@dataclass(frozen=True)
class Calibration:
    """What was measured of an index; arrays by patch size."""

    facts: Facts
    background: np.ndarray  # (b, d): texts among which a query is to be probable
    present: dict[Detail, np.ndarray] = field(default_factory=dict)
    """Scores of the texts, (n,)."""
    absent: dict[Detail, np.ndarray] = field(default_factory=dict)
    """The same with each text's own images taken out; empty where nobody knows which these are."""
    labels: dict[Detail, np.ndarray] = field(default_factory=dict)
    """Scores of an image's own caption, (n,)."""
    ranks: dict[tuple[Detail, Detail], np.ndarray] = field(default_factory=dict)
    """By coarse and fine patch size: the place among the candidates of each text's fine answers,
    best first, (n, k); `MAX_K` where it is none of them."""

    def scores(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """How well each image (n, d) answers its text (n, d): `answer_scores`, (n,)."""
        return answer_scores(texts, unit(images), self.background, self.facts.scale)

    def confidence(
        self, scores: np.ndarray, patch_size: Detail, labels: bool = False
    ) -> np.ndarray:
        """The share of texts with an answer that score as low, (q,); NaN where nothing was
        measured. labels: of images and their captions."""
        found = (self.labels if labels else self.present).get(patch_size)
        if found is None or not len(found):
            return np.full(len(scores), np.nan)
        return p_values(scores + ROUNDING, found)

    def refused(self, patch_size: Detail, rate: float) -> float | None:
        """Of the texts whose own images are taken out, the share that is refused where `rate` of
        those with an answer are; None where nobody knows."""
        found = self.absent.get(patch_size)
        if found is None or not len(found):
            return None
        return float((self.confidence(found, patch_size) <= rate).mean())

    def line(self, patch_size: Detail, rate: float) -> str:
        """What a refusal means at a patch size, in one sentence; "" where nothing was measured."""
        examples = self.present.get(patch_size)
        if examples is None or not len(examples):
            return ""
        if rate * (len(examples) + 1) < 1:
            least = int(np.ceil(1 / rate)) - 1
            return (
                f"{said(patch_size)}: {len(examples):,} of {self.facts.source} are too few to "
                f"refuse {rate:.0%} of what is there; {least:,} are needed"
            )
        refused = self.refused(patch_size, rate)
        power = (
            "" if refused is None else f", and {refused:.0%} once their own images are taken out"
        )
        return (
            f"{said(patch_size)}: of texts like {self.facts.source} ({len(examples):,} were asked) "
            f'{rate:.0%} are answered "nothing like this here"{power}; of other words, such as the '
            "model has not learned, this promises nothing"
        )

    def candidates(self, coarse: Detail, fine: Detail, k: int, lost: float) -> int:
        """The fewest candidates with which a search coarse to fine loses, of texts like these, on
        average at most this share of the k answers that ranking all images again would give.

        Raises `UsageError` where that cannot be promised.
        """
        ranks = self.ranks.get((coarse, fine))
        if ranks is None:
            raise UsageError(
                f"lost {lost:g}: {said_pair(coarse, fine)} is not calibrated; index.py "
                "--calibrate does that, of patch sizes that the index holds or --refine-patch-size "
                "names"
            )
        if k > ranks.shape[1]:
            raise UsageError(f"lost {lost:g}: is promised for k up to {ranks.shape[1]}, not {k}")
        found = fewest_candidates(ranks[:, :k], lost)
        if found is None or found > MAX_K:
            why = f"{len(ranks):,} texts are too few" if found is None else f"{MAX_K:,} lose more"
            raise UsageError(
                f"lost {lost:g}: no number of candidates promises that at "
                f"{said_pair(coarse, fine)}: {why}"
            )
        return max(found, k)

    def holds(self, ids: np.ndarray, image_fingerprint: str, text_fingerprint: str) -> bool:
        """Whether it is of this model, and of an index that has since changed by less than a
        fifth. ids: of the index now, ascending."""
        facts = self.facts
        if (facts.image_fingerprint, facts.text_fingerprint) != (
            image_fingerprint,
            text_fingerprint,
        ):
            return False
        kept = int(np.searchsorted(ids, facts.next_id))
        return len(ids) - kept + facts.count - kept <= CHANGED * facts.count


def unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1, as they are stored only about; zeros stay."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


# ---- the file ------------------------------------------------------------------------------


def calibration_file(folder: Path) -> Path:
    """Where an index keeps it."""
    return folder / "calibration.safetensors"


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep it with an index. Raises OSError."""
    from safetensors.numpy import save

    arrays = {"background": calibration.background.astype(np.float32)}
    for name in ("present", "absent", "labels"):
        for size, found in getattr(calibration, name).items():
            arrays[f"{name}.{as_key(size)}"] = found.astype(np.float64)
    for (coarse, fine), ranks in calibration.ranks.items():
        arrays[f"ranks.{as_key(coarse)}.{as_key(fine)}"] = ranks.astype(np.int32)
    facts = json.dumps(vars(calibration.facts))
    digest = _digest(facts, arrays)
    data = save(arrays, {"format": "1", "facts": facts, "blake2b": digest})
    write_atomically(calibration_file(folder), lambda file: file.write(data))


def read_calibration(folder: Path) -> Calibration | None:
    """What was measured of an index; None where nothing was, or the file is damaged."""
    file = calibration_file(folder)
    try:
        stat = file.stat()
    except OSError:
        return None
    return _read(file, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=16)
def _read(file: Path, modified: int, inode: int) -> Calibration | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            about = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if about["format"] != "1" or about["blake2b"] != _digest(about["facts"], arrays):
            return None
        facts = Facts(**json.loads(about["facts"]))
        parts: dict[str, dict[Any, np.ndarray]] = {
            "present": {}, "absent": {}, "labels": {}, "ranks": {}
        }  # fmt: skip
        for name, array in arrays.items():
            kind, *sizes = name.split(".")
            if sizes:
                numbers = tuple(map(from_key, sizes))
                parts[kind][numbers if len(numbers) > 1 else numbers[0]] = array
        return Calibration(facts, arrays["background"], **parts)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None  # measured anew where it is asked for


def _digest(facts: str, arrays: Mapping[str, np.ndarray]) -> str:
    parts = [facts.encode()]
    for name in sorted(arrays):
        array = arrays[name]
        parts += [f"{name} {array.shape} {array.dtype}".encode(), array.tobytes()]
    return bytes_digest(*parts)
