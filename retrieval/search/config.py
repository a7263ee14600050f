"""What a search can be asked for, without torch: bounds, what an image may cost, formats of the
contact sheet."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import UsageError

MAX_K = 2048  # hits; what FAISS searches on a GPU
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
CANDIDATES = 200  # of a query, encoded again at the refining patch size


@dataclass(frozen=True)
class Budget:
    """What encoding one image may cost; both hold where both are given."""

    max_gflops: float | None = None  # 10^9 floating-point operations, 2 x multiply-adds
    max_ms: float | None = None  # on this machine, one image at a time

    def __post_init__(self) -> None:
        for name, value in (("max_gflops", self.max_gflops), ("max_ms", self.max_ms)):
            if value is not None and not value > 0:
                raise UsageError(f"{name} {value:g}: allowed are numbers above 0")
        if self.max_gflops is None and self.max_ms is None:
            raise UsageError("a budget needs max_gflops or max_ms")


PatchSizeOrBudget = int | Budget | None
"""Pixels, what an image may cost, or None for the finest."""


def check_k(k: int) -> None:
    """Raises `UsageError` for a number of hits that cannot be asked for."""
    if not 1 <= k <= MAX_K:
        raise UsageError(f"k {k} is out of range; allowed: 1 to {MAX_K}")


def check_words(words: float) -> None:
    """Raises `UsageError` for a weight that cannot be."""
    if not 0 <= words <= 1:
        raise UsageError(f"words {words:g} is out of range; allowed: 0 (vectors) to 1 (words)")


def picture_format(path: str | Path) -> str:
    """Pillow's name of the format that a file's suffix asks for. Raises `UsageError`."""
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES:
        raise UsageError(f"picture {path}: allowed are names that end in {', '.join(PICTURES)}")
    return PICTURES[suffix]
