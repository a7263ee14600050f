"""What is drawn for a sample in an epoch, the same by whichever rank or worker."""

import hashlib


def draw(count: int, seed: int, epoch: int, key: str, what: str = "") -> int:
    """A number from 0 to count - 1, uniform, a pure function of its arguments.

    what: any other word makes another, independent draw.
    """
    if count == 1:
        return 0
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count
