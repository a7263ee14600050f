"""What a search can be asked for, without torch: bounds, and what an image may cost."""

from dataclasses import dataclass

from data.errors import UsageError

MAX_K = 2048  # hits; what FAISS searches on a GPU
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
