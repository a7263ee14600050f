"""How images are read and embedded, checked before anything heavy is imported."""

from data.errors import UsageError

BATCH_SIZE = 0  # images read together, one rank; 0: `images_read_together`
NUM_WORKERS = 2  # loader processes per rank


def check_batches(batch_size: int, num_workers: int, least_size: int = 0) -> None:
    """Raises `UsageError` for values that cannot work."""
    for name, value, least in (
        ("batch_size", batch_size, least_size),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise UsageError(f"{name} {value}: at least {least}")
