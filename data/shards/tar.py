"""Samples of a tar archive: where each one lies, and what is wrong with the rest.

One parser for local files and streams gives a shard the same samples, numbers and problems either
way. Keys are webdataset's: a name up to the first dot of its base name. Where that finds no image,
as for `v1.5.png` and `v1.5.txt`, a name is split at its last dot.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data.image_headers import IMAGE_EXTS
from data.problems import Problem
from data.shards.members import (
    CompressedError,
    NotATarError,
    TrailingDataError,
    iter_members,
    pass_over,
    what_it_is,
)

TEXT_EXTS = frozenset({"txt", "json", "cls"})
# A member is read whole, so these limit the memory that a header can ask for.
MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 24

_LISTED = IMAGE_EXTS | TEXT_EXTS
_MAX_WAITING = 1 << 26  # bytes of names with dots that wait for an image without
_SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's rule for KEY.ext
_META = re.compile(r"__[^/]*__($|/)")  # webdataset skips these too
_APPLE = re.compile(r"(^|/)\._[^/]*$")  # what macOS's tar puts beside a file
DAMAGED = ("not_a_tar", "compressed", "truncated", "trailing_data")
"""Problems of an archive, which cost the rest of it; others cost one sample."""
_KINDS = {
    CompressedError: "compressed",
    NotATarError: "not_a_tar",
    TrailingDataError: "trailing_data",
}


@dataclass
class TarSample:
    """One sample with an image: where its members lie, and those of their bytes that were read."""

    key: str
    image_ext: str
    spans: dict[str, tuple[int, int]]  # extension -> (offset, size) in bytes
    payloads: dict[str, bytes]


@dataclass
class _Part:
    """Members of one key, as they are met."""

    key: str
    repeated_before: bool
    image_ext: str = ""
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)  # members that cannot be read
    too_large: str = ""

    def add(self, ext: str, member: tarfile.TarInfo) -> bool:
        """Whether the member is one to read."""
        is_image = ext in IMAGE_EXTS
        if ext not in _LISTED:
            self.unlisted.append(ext)
            return False
        if found := what_it_is(member):
            kind = "link" if " link " in found else "special_file"
            self.left.append(Problem(kind, _shown(self.key), f"its {ext} is {_shown(found)}"))
            return False
        self.seen[ext] = self.seen.get(ext, 0) + 1
        if self.seen[ext] > 1:
            return False
        if is_image and self.image_ext:
            cause = f"its {ext} is left out, the {self.image_ext} comes first"
            self.left.append(Problem("second_image", _shown(self.key), cause))
            return False
        limit = MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES
        if member.size > limit:
            self.too_large = f"{ext} of {member.size} bytes, the limit is {limit}"
            return False
        if is_image:
            self.image_ext = ext
        self.spans[ext] = (member.offset_data, member.size)
        return True

    def close(self) -> Iterator[TarSample | Problem]:
        shown = _shown(self.key)
        if not self.seen and not self.left:
            cause = f"only {', '.join(sorted(set(self.unlisted)))}"
            yield Problem("unknown_suffix", shown, _shown(cause))
        elif self.repeated_before:
            yield Problem("duplicate_key", shown, "an earlier sample of the shard has this key")
        elif shown != self.key:
            yield Problem("not_utf8", shown, "the member's name is not UTF-8")
        elif not self.key.isprintable():
            yield Problem("bad_key", ascii(self.key), "the key has control characters")
        elif self.too_large:
            yield Problem("member_too_large", shown, self.too_large)
        elif self.image_ext:
            yield TarSample(self.key, self.image_ext, self.spans, self.payloads)
            for _ in range(max(self.seen.values()) - 1):
                yield Problem("duplicate_key", shown, "its members come more than once")
            yield from self.left
        elif self.left:
            yield from self.left
        else:
            found = ", ".join(sorted({*self.seen, *self.unlisted}))
            yield Problem("no_image", shown, f"only {_shown(found)}")


class _Group:
    """Consecutive members that webdataset gives one key, by the keys they get here.

    With an image KEY.png the group is one sample, and images of other names in it (KEY.seg.png)
    are counted. Without, names with further dots are samples of their own.
    """

    def __init__(self, key: str, keys: set[str]) -> None:
        """`keys`: those of the shard so far."""
        self.key, self._keys = key, keys
        self._again = key in keys
        self._split = False  # decided, since too much was waiting
        self._waiting = 0
        self._parts: dict[str, _Part] = {}

    def add(self, key: str, ext: str, member: tarfile.TarInfo) -> _Part | None:
        """The part whose bytes the member's are, None where they need not be read."""
        if key not in self._parts:
            self._parts[key] = _Part(key, key in self._keys)
            self._keys.add(key)
        part = self._parts[key]
        if not part.add(ext, member):
            return None
        if key != self.key:
            if self._is_one:
                return None
            self._waiting += member.size
        return part

    def overflow(self) -> Iterator[TarSample | Problem]:
        """The parts before the last, once too much is waiting for the group's end."""
        if self._waiting > _MAX_WAITING and not self._is_one:
            self._split, self._waiting = True, 0
            *complete, last = self._parts.values()
            self._parts = {last.key: last}
            for part in complete:
                yield from part.close()

    def close(self, broken: str = "") -> Iterator[TarSample | Problem]:
        """`broken`: the key whose member is incomplete."""
        if broken and self._is_one:
            return
        for part in self._parts.values():
            if part.key == broken:
                continue
            if part.key == self.key or not self._is_one:
                yield from part.close()
            elif part.image_ext:
                cause = f"webdataset's rule makes it another image of sample {_shown(self.key)!r}"
                yield Problem("ambiguous_name", _shown(part.key), f"{cause}, rename it")

    @property
    def _is_one(self) -> bool:
        """Whether webdataset's rule holds."""
        own = self._parts.get(self.key)
        return not self._split and (self._again or bool(own and own.image_ext))


def iter_samples(file: Any, *, read_payloads: bool) -> Iterator[TarSample | Problem]:
    """Samples of an archive in order, between them what had to be left out.

    `file`: open at its start; a `ForwardFile` or an unbuffered file. Members of a sample follow
    one another, as in every WebDataset shard. Of equal keys the first is kept; of a damaged
    archive, every sample that is complete before the damage. Archives behind the first are read.
    """
    keys: set[str] = set()
    group: _Group | None = None
    open_key = ""  # of the member whose data are being passed
    try:
        for member in iter_members(file):
            split = _split(member.name)
            if isinstance(split, Problem):
                yield split
            elif split is not None:
                webdataset_key, key, ext = split
                if group is None or webdataset_key != group.key:
                    if group is not None:
                        yield from group.close()
                    group = _Group(webdataset_key, keys)
                open_key = key
                part = group.add(key, ext, member)
                if part is not None and read_payloads:
                    part.payloads[ext] = file.read(member.size)
            if not what_it_is(member):
                pass_over(file, member.offset_data + member.size)
            open_key = ""
            if group is not None:
                yield from group.overflow()
    except tarfile.ReadError as error:
        if group is not None:
            yield from group.close(open_key)
        yield Problem(_KINDS.get(type(error), "truncated"), _shown(open_key), str(error))
    else:
        if group is not None:
            yield from group.close()


def _split(name: str) -> tuple[str, str, str] | Problem | None:
    """(webdataset's key, the key here, the suffix) of a member; None for one that is no sample's.

    The keys differ where the name has further dots and ends in a suffix that is read.
    """
    if _META.match(name) or _APPLE.search(name):
        return None
    match = _SPLIT.match(name)
    if match is None:
        return Problem("unknown_suffix", _shown(name), "its name is not KEY.SUFFIX")
    dots, _, last = match[2].rpartition(".")
    if dots and last.lower() in _LISTED:
        return match[1], f"{match[1]}.{dots}", last.lower()
    return match[1], match[1], match[2].lower()


def _shown(key: str) -> str:
    return key.encode("utf-8", "backslashreplace").decode()


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: two builds are byte-identical
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
