"""What a sample says: its captions, its label, and whether two samples say the same."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from data.problems import BadSample


@runtime_checkable
class Tokenizer(Protocol):
    """Texts to the token ids of a text tower."""

    @property
    def fingerprint(self) -> str:
        """Equal where equal texts give equal ids; names the files of a `CaptionCache`."""

    @property
    def pad_id(self) -> int:
        """Fills shorter texts of a batch."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut at the tower's context length, without padding."""


@dataclass(frozen=True)
class SampleCaptions:
    """All captions of a sample."""

    key: str
    captions: tuple[str, ...]
    concept: int  # equal where the lists of captions are equal

    @classmethod
    def of(cls, key: str, members: Mapping[str, bytes]) -> "SampleCaptions":
        """`members`: extension -> bytes. Raises `BadSample` where there is no usable caption."""
        captions = read_captions(members)
        return cls(key, captions, concept_id(captions))


def read_captions(members: Mapping[str, bytes], lines: bool = False) -> tuple[str, ...]:
    """All captions of a sample, stripped, empty ones left out. `members`: extension -> bytes.

    A list under `captions` in the JSON wins, then the .txt, then img2dataset's `caption` in the
    JSON: the first of them with a usable caption. lines: the .txt alone, a caption on each of its
    lines (CLIP_benchmark's retrieval sets).
    Raises `BadSample` with the first thing that is wrong, where nothing is usable: "no_caption",
    "empty_caption", "not_utf8", "bad_json".
    """
    if lines:
        members = {"txt": members["txt"]} if "txt" in members else {}
    problems: list[BadSample] = []
    record: dict[str, object] = {}
    if "json" in members:
        try:
            record = _read_json(members["json"])
        except BadSample as bad:
            problems.append(bad)
    sources: list[Callable[[], Sequence[str]]] = []
    if record.get("captions") is not None:
        sources.append(lambda: _listed(record["captions"]))
    if "txt" in members:
        sources.append(lambda: _text(members["txt"], lines))
    if isinstance(single := record.get("caption"), str):
        sources.append(lambda: [single])
    for source in sources:
        try:
            return _usable(source())
        except BadSample as bad:
            problems.append(bad)
    raise next(iter(problems), BadSample("no_caption", "neither a .txt nor `captions` in a .json"))


def _text(data: bytes, lines: bool) -> list[str]:
    text = _decode(data)
    return text.splitlines() if lines else [text]


def _listed(captions: object) -> list[str]:
    """The strings of a list, or one string."""
    if isinstance(captions, str):
        return [captions]
    if not isinstance(captions, list):
        raise BadSample("bad_json", "`captions` is not a list of strings")
    texts = [text for text in captions if isinstance(text, str)]
    if captions and not texts:
        raise BadSample("bad_json", "`captions` holds no string")
    return texts


def _usable(found: Sequence[str]) -> tuple[str, ...]:
    captions = [text for text in (caption.strip() for caption in found) if text]
    if not captions:
        raise BadSample("empty_caption", "every caption is empty")
    whole = [t for t in captions if not any("\ud800" <= char <= "\udfff" for char in t)]
    if not whole:
        raise BadSample("not_utf8", "a caption has a lone surrogate")
    return tuple(whole)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", f"byte {error.start} of the text is not UTF-8") from None


def _read_json(data: bytes) -> dict[str, object]:
    text = _decode(data)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from None
    if not isinstance(record, dict):
        raise BadSample("bad_json", "not an object")
    return record


def read_label(members: Mapping[str, bytes]) -> int:
    """KEY.cls, -1 where there is none. Raises `BadSample` ("bad_label")."""
    if "cls" not in members:
        return -1
    text = members["cls"].strip()
    if not text.isdigit() or len(text) > 9:
        raise BadSample("bad_label", f"{text[:40]!r} is no class number")
    return int(text)


def concept_id(captions: Sequence[str]) -> int:
    """A signed 64-bit hash: equal for equal lists of captions."""
    digest = hashlib.blake2b(digest_size=8)
    for caption in captions:
        text = caption.encode()
        digest.update(len(text).to_bytes(8, "big") + text)
    return int.from_bytes(digest.digest(), "big", signed=True)
