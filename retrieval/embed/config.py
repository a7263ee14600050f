"""How images are read and embedded, checked before anything heavy is imported."""

from collections.abc import Sequence

from data.errors import UsageError

BATCH_SIZE = 0  # images read together, one rank; 0: `images_read_together`


def check_sizes(patch_sizes: Sequence[int], max_tokens: Sequence[int]) -> None:
    """Raises `UsageError` for both, and for what no model has."""
    if patch_sizes and max_tokens:
        raise UsageError("give patch sizes or max_tokens, not both")
    for name, sizes in (("patch_sizes", patch_sizes), ("max_tokens", max_tokens)):
        if sizes and min(sizes) < 1:
            raise UsageError(f"{name} {min(sizes)}: allowed are 1 and more")


def check_batches(batch_size: int, num_workers: int, least_size: int = 0) -> None:
    """Raises `UsageError` for values that cannot work."""
    for name, value, least in (
        ("batch_size", batch_size, least_size),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise UsageError(f"{name} {value}: at least {least}")
