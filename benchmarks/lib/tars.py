"""Tars as a whole, in memory."""

import tarfile
from pathlib import Path


def read_tar(file: Path) -> dict[str, bytes]:
    """The contents by name, in order."""
    with tarfile.open(file) as tar:
        return {member.name: data.read() for member in tar if (data := tar.extractfile(member))}
