"""The texts of a sample: its captions and its label, drawing one, telling equal lists."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from data.problems import BadSample


def read_captions(members: Mapping[str, bytes]) -> tuple[str, ...]:
    """All captions of a sample, stripped, empty ones left out. `members`: extension -> bytes.

    A list under `captions` in the JSON wins, then the .txt, then img2dataset's `caption` in the
    JSON. Raises `BadSample`: "no_caption", "empty_caption", "not_utf8", "bad_json".
    """
    record = _read_json(members["json"]) if "json" in members else {}
    listed, single = record.get("captions"), record.get("caption")
    if listed is not None:
        if isinstance(listed, str):
            listed = [listed]
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            raise BadSample("bad_json", "`captions` is not a list of strings")
        found = listed
    elif "txt" in members:
        found = [_decode(members["txt"])]
    elif isinstance(single, str):
        found = [single]
    else:
        raise BadSample("no_caption", "neither a .txt nor `captions` in a .json")
    captions = tuple(text for text in (caption.strip() for caption in found) if text)
    if not captions:
        raise BadSample("empty_caption", "every caption is empty")
    if any("\ud800" <= char <= "\udfff" for text in captions for char in text):
        raise BadSample("not_utf8", "a caption has a lone surrogate")
    return captions


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


def draw_caption(captions: Sequence[str], seed: int, epoch: int, key: str) -> str:
    """One caption, uniformly, as a pure function of its arguments."""
    if len(captions) == 1:
        return captions[0]
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return captions[int.from_bytes(digest, "big") % len(captions)]


def concept_id(captions: Sequence[str]) -> int:
    """64 bits, signed: equal lists of captions give equal numbers."""
    digest = hashlib.blake2b(digest_size=8)
    for caption in captions:
        text = caption.encode()
        digest.update(len(text).to_bytes(8, "big") + text)
    return int.from_bytes(digest.digest(), "big", signed=True)
