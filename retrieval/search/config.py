"""What a search can be asked for, without torch: bounds, what an image may cost, formats of the
contact sheet."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import UsageError
from retrieval.detail import Detail

MAX_K = 2048  # hits; what FAISS searches on a GPU
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
CANDIDATES = 200  # of a query, encoded again at the refining patch size
LOST = 0.01  # share of the fine answers that candidates may miss
REFUSE = 0.05  # share of texts with an answer that may be told "nothing like this here"


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


PatchSizeOrBudget = Detail | Budget | None
"""Pixels, a budget of tokens, what an image may cost, or None for the finest."""


def check_k(k: int) -> None:
    """Raises `UsageError` for a number of hits that cannot be asked for."""
    if not 1 <= k <= MAX_K:
        raise UsageError(f"k {k} is out of range; allowed: 1 to {MAX_K}")


def check_words(words: float) -> None:
    """Raises `UsageError` for a weight that cannot be."""
    if not 0 <= words <= 1:
        raise UsageError(f"words {words:g} is out of range; allowed: 0 (vectors) to 1 (words)")


def check_share(name: str, value: float) -> None:
    """Raises `UsageError` for what is no share."""
    if not 0 <= value < 1:
        raise UsageError(f"{name} {value:g}: allowed are shares from 0 to below 1, such as 0.05")


def read_texts(file: str | Path) -> list[str]:
    """The lines of a file that hold something. Raises `UsageError` for a file that cannot be read,
    or has none."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"texts {file}: cannot be read ({error})") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"texts {file}: holds no text; one a line is needed")
    return found


def picture_format(path: str | Path) -> str:
    """Pillow's name of the format that a file's suffix asks for. Raises `UsageError`."""
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES:
        raise UsageError(f"picture {path}: allowed are names that end in {', '.join(PICTURES)}")
    return PICTURES[suffix]
