"""Where indexes lie: folders of this machine, searched by FAISS, and Milvus."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import UsageError
from retrieval.index.config import Device
from retrieval.index.manifest import IndexManifest, read_index_manifest
from retrieval.milvus.address import is_address, parse_address

if TYPE_CHECKING:
    from retrieval.index_interface import IndexPlace, IndexState  # imports numpy and pyarrow


class FolderPlace:
    """An index in a folder. `retrieval.index` writes it."""

    is_remote = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self) -> IndexManifest:
        return read_index_manifest(self.folder)

    def model(self, manifest: IndexManifest) -> str:
        return str(self.folder / "model")

    def open(self, device: Device) -> "IndexState":
        from retrieval.index.snapshot import Snapshot

        return Snapshot.open(self.folder, device)

    def check(self, manifest: IndexManifest, intact: set[str] | None = None) -> None:
        from retrieval.index.integrity import check_index, check_words_files

        check_index(self.folder, manifest, intact)
        regions = regions_folder(self.folder)
        if (regions / "manifest.json").is_file():
            check_index(regions, read_index_manifest(regions), intact)
        if intact is None:  # a service goes on without words
            check_words_files(self.folder, manifest)

    def stamp(self) -> tuple[int, ...]:
        found: list[int] = []
        for folder in (self.folder, regions_folder(self.folder)):
            with suppress(OSError):
                stat = (folder / "manifest.json").stat()
                found += [stat.st_ino, stat.st_mtime_ns, stat.st_size]
        return tuple(found)


def regions_folder(kept: Path) -> Path:
    """Where the regions of an index lie, an index folder of their own (`retrieval.regions`). kept:
    the index's folder, or that of what is kept of one in Milvus."""
    return kept / "regions"


def index_folder(name: str | Path, what: str) -> Path:
    """For what is done in folders only. Raises `UsageError` for Milvus."""
    if is_address(name):
        raise UsageError(f"{name}: {what} is for an index in a folder, not for one in Milvus")
    return Path(name)


def find_place(name: str | Path) -> "IndexPlace":
    """A folder, or Milvus for `milvus:URI/NAME`. Raises `UsageError` for an address that is none,
    and where pymilvus is not installed."""
    if not is_address(name):
        return FolderPlace(name)
    from retrieval.milvus.place import MilvusPlace

    return MilvusPlace(parse_address(str(name)))
