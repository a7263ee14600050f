"""`milvus:URI/NAME`: which Milvus, and which index in it. Imports nothing heavy."""

import re
from dataclasses import dataclass
from pathlib import Path

from data.errors import UsageError
from retrieval.detail import Detail, folder_name

PREFIX = "milvus:"
EXAMPLE = "milvus:http://localhost:19530/photos"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")  # Milvus takes 255 characters
_URI = re.compile(r"(https?|tcp|grpc|unix)://[^/]\S*|.*\.db")


@dataclass(frozen=True)
class MilvusAddress:
    """An index in Milvus: a collection NAME that says what the index is, and NAME_patch_SIZE for
    the images at each patch size."""

    uri: str  # of a server; or a file of Milvus Lite, which ends in .db
    name: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.uri}/{self.name}"

    def collection(self, patch_size: Detail) -> str:
        """The collection of the images at a patch size."""
        return f"{self.name}_{folder_name(patch_size)}"


def is_address(text: str | Path) -> bool:
    """Whether a place's name means Milvus."""
    return isinstance(text, str) and text.startswith(PREFIX)


def parse_address(text: str) -> MilvusAddress:
    """Raises `UsageError` for what is no address."""
    uri, _, name = text.removeprefix(PREFIX).rpartition("/")
    if "@" in uri:  # it would be printed
        raise UsageError(f"an address such as {EXAMPLE} holds no password; MILVUS_TOKEN may")
    if not _URI.fullmatch(uri):
        raise UsageError(
            f"{text}: no address of Milvus; allowed: {PREFIX}URI/NAME, such as {EXAMPLE}"
        )
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{text}: {name!r} names no collection; allowed: letters, digits and _, such as photos"
        )
    return MilvusAddress(uri, name)
