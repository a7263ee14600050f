"""Whether the files of an index are as they were written. Reads them whole, about 1 GB/s."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from data.errors import UsageError
from data.files import file_digest
from retrieval.detail import Detail
from retrieval.index.folder import read_tombstones, segment_files, words_file
from retrieval.index.manifest import IndexManifest, SegmentEntry


def check_index(folder: Path, manifest: IndexManifest, intact: set[str] | None = None) -> None:
    """Raises `UsageError` for a damaged file of this state of an index.

    intact: digests of files that need not be read again; those found good are added.
    """
    with suppress(FileNotFoundError):  # a writer has replaced it, here and below
        read_tombstones(folder, manifest)
    for entry in manifest.segments:
        check_segment(folder, entry, manifest.patch_sizes, intact)


def check_words_files(folder: Path, manifest: IndexManifest) -> None:
    """Raises `UsageError` for damaged words; vectors are searched without them."""
    for entry in manifest.segments:
        file = words_file(folder, entry.number)
        if entry.words and (not file.is_file() or file_digest(file) != entry.words["blake2b"]):
            raise UsageError(
                f"{file} is damaged; `python launch/index.py --out {folder} --words` writes it "
                "again"
            )


def check_segment(
    folder: Path, entry: SegmentEntry, patch_sizes: Iterable[Detail], intact: set[str] | None = None
) -> None:
    """`check_index` for one segment."""
    intact = set() if intact is None else intact
    files = segment_files(folder, entry.number, patch_sizes)
    for name, noted in entry.blake2b.items():
        with suppress(FileNotFoundError):
            if noted not in intact and file_digest(files[name]) != noted:
                raise UsageError(f"{files[name]} is damaged; build the index again")
            intact.add(noted)
