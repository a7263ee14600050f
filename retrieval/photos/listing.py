"""Which photos a folder holds, and what in it is left out.

Links to folders are followed, each folder once: by its own name where it lies in the tree, else by
the first link to it. Left out, and counted, are hidden files and folders (so `.thumbnails`,
`.Trash-1000`, macOS's `._x.png`), `SYSTEM_FOLDERS`, and files that are no images by their suffix.
"""

import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from data.errors import UsageError
from data.image_headers import IMAGE_EXTS, SYSTEM_FOLDERS
from data.problems import add_counts
from data.shards.tar import TEXT_EXTS


@dataclass(frozen=True)
class CaptionFile:
    """KEY.txt or KEY.json beside a photo."""

    ext: str
    size: int  # bytes
    modified: int  # ns


@dataclass(frozen=True)
class Photo:
    """One photo's file as it was listed."""

    path: str
    key: str  # the path within the folder
    size: int  # bytes
    modified: int  # ns
    captions: tuple[CaptionFile, ...] = ()

    def captions_state(self, one_by_time: bool = False) -> int:
        """Differs where the caption's files do, 0 where there is none; fits int64.

        one_by_time: a file alone is known by its time, as albums of 0.1.0 have it.
        """
        if one_by_time and len(self.captions) == 1:
            return self.captions[0].modified
        files = repr([(file.ext, file.size, file.modified) for file in self.captions])
        digest = blake2b(files.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True) if self.captions else 0


@dataclass
class Listing:
    """What a folder holds."""

    photos: list[Photo] = field(default_factory=list)  # sorted by key
    errors: dict[str, int] = field(default_factory=dict)  # photos that cannot be used, by reason
    left_out: dict[str, int] = field(default_factory=dict)  # files and folders, by kind or suffix
    unreadable: set[str] = field(default_factory=set)  # keys of files that only their folder shows

    def leave_out(self, kind: str) -> None:
        add_counts(self.left_out, {kind: 1})


def list_photos(images: Path, out: Path) -> Listing:
    """The photos under a folder; `out`, the index, is passed over."""
    if not images.is_dir():
        raise UsageError(f"{images} is no folder of photos")
    listing = Listing()
    walk = _Walk(images, Path(os.path.realpath(out)), listing)
    for folder, names in walk:
        present = set(names)
        for name in names:
            if _is_photo(name, listing):
                _look_at(images, os.path.join(folder, name), present, listing)
    listing.photos.sort(key=lambda photo: photo.key)
    listing.left_out = dict(sorted(listing.left_out.items()))
    return listing


def holds_photo(images: Path) -> bool:
    """Whether a folder holds a file that is a photo by its name: a look, not a listing."""
    walk = _Walk(images, Path(), Listing())
    return any(_is_photo(name, Listing()) for _, names in walk for name in names)


def no_photo(images: Path, listing: Listing) -> str:
    """That a folder holds no photo, and what it holds, in a sentence."""
    counts = {**listing.errors, **listing.left_out}
    left_out = ", ".join(f"{kind} {n:,}" for kind, n in counts.items())
    message = f"{images} holds no photo ({', '.join(sorted(IMAGE_EXTS))})"
    return f"{message}; left out: {left_out}" if left_out else message


def is_left_out(key: str) -> bool:
    """Whether a photo of this path lies in a folder that is left out."""
    return any(_kind_left_out(name) for name in key.split("/")[:-1])


def _kind_left_out(folder: str) -> str:
    """ "" for a folder that is walked."""
    if folder.startswith("."):
        return "hidden_folder"
    return "system_folder" if folder.lower() in SYSTEM_FOLDERS else ""


class _Walk:
    """Every folder once, with its files' names: first what lies in the tree, then what links in it
    lead to."""

    def __init__(self, images: Path, out: Path, listing: Listing) -> None:
        """out: its real path."""
        self._out, self._listing = str(out), listing
        self._seen: set[str] = set()  # real paths
        self._links = deque([str(images)])

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        while self._links:
            start = self._links.popleft()
            real = os.path.realpath(start)
            holder = os.path.join(os.path.realpath(os.path.dirname(start)), "")
            is_circle = bool(self._seen) and holder.startswith(os.path.join(real, ""))
            if is_circle or real in self._seen:
                self._listing.leave_out("linked_again")
            elif real != self._out:
                yield from self._below(start, real)

    def _below(self, start: str, real_start: str) -> Iterator[tuple[str, list[str]]]:
        links: list[str] = []
        for folder, inside, names in os.walk(start, onerror=self._unlisted):
            real = os.path.join(real_start, os.path.relpath(folder, start))
            real = os.path.normpath(real)
            self._seen.add(real)
            entered = []
            for name in inside:
                path = os.path.join(folder, name)
                if kind := _kind_left_out(name):
                    self._listing.leave_out(kind)
                elif os.path.islink(path):
                    links.append(path)
                elif os.path.join(real, name) in self._seen:  # through a link
                    self._listing.leave_out("linked_again")
                elif os.path.join(real, name) != self._out:
                    entered.append(name)
            inside[:] = entered
            yield folder, names
        self._links.extend(sorted(links))

    def _unlisted(self, error: OSError) -> None:
        self._listing.leave_out("unlisted_folder")


def _is_photo(name: str, listing: Listing) -> bool:
    """By its name; counts what is none. Texts are captions."""
    stem, _, suffix = name.rpartition(".")
    suffix = suffix.lower() if stem else ""
    if suffix in IMAGE_EXTS and not name.startswith("."):
        return True
    if suffix in IMAGE_EXTS:
        listing.leave_out("hidden_file")
    elif suffix not in TEXT_EXTS and not name.startswith("."):
        is_usual = suffix.isascii() and suffix.isalnum() and len(suffix) <= 5
        listing.leave_out(f".{suffix}" if is_usual else "other_suffix")
    return False


def _look_at(images: Path, path: str, present: set[str], listing: Listing) -> None:
    """Add a photo to the listing, or what is wrong with it."""
    key = os.path.relpath(path, images)
    try:
        key.encode()
        found = os.stat(path)
    except UnicodeEncodeError:
        add_counts(listing.errors, {"not_utf8": 1})
    except OSError:  # a link to nowhere
        add_counts(listing.errors, {"unreadable": 1})
        listing.unreadable.add(key)
    else:
        if not stat.S_ISREG(found.st_mode):
            add_counts(listing.errors, {"special_file": 1})
            return
        captions = tuple(_caption_files(path, present))
        listing.photos.append(Photo(path, key, found.st_size, found.st_mtime_ns, captions))


def _caption_files(path: str, present: set[str]) -> Iterator[CaptionFile]:
    for ext in ("txt", "json"):
        beside = f"{path.rpartition('.')[0]}.{ext}"
        if os.path.basename(beside) in present:
            try:
                found = os.stat(beside)
            except OSError:  # reading it says why
                yield CaptionFile(ext, 0, 0)
            else:
                if stat.S_ISREG(found.st_mode):
                    yield CaptionFile(ext, found.st_size, found.st_mtime_ns)
