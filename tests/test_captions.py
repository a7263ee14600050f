"""Captions: which ones a sample has, and which one a step sees."""

import json
from collections import Counter

import pytest

from data.captions import concept_id, read_captions
from data.pipeline.draw import draw
from data.problems import BadSample


def as_json(**record: object) -> bytes:
    return json.dumps(record).encode()


def test_a_list_in_the_json_wins_then_the_text_then_img2datasets_caption() -> None:
    both = as_json(captions=["a cat", " a pet "], caption="old")
    assert read_captions({"txt": b"text", "json": both}) == ("a cat", "a pet")
    assert read_captions({"txt": b" text\n", "json": as_json(caption="old")}) == ("text",)
    assert read_captions({"json": as_json(caption="old", sha256="x")}) == ("old",)
    assert read_captions({"txt": "﻿mit Umlaut: ä".encode()}) == ("mit Umlaut: ä",)


def test_empty_captions_are_left_out_of_a_list() -> None:
    assert read_captions({"json": as_json(captions=["", "a", " "])}) == ("a",)


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({}, "no_caption"),
        ({"json": as_json(width=3)}, "no_caption"),
        ({"txt": b" \n\t"}, "empty_caption"),
        ({"json": as_json(captions=["", "  "])}, "empty_caption"),
        ({"json": as_json(captions=[])}, "empty_caption"),
        ({"txt": b"caf\xe9"}, "not_utf8"),
        ({"json": b'{"captions": ["caf\xe9"]}'}, "not_utf8"),
        ({"json": b'{"captions": ["\\ud800"]}'}, "not_utf8"),
        ({"txt": b" ", "json": b"{"}, "bad_json"),
        ({"json": as_json(captions=[None, 1])}, "bad_json"),
        ({"json": b"[" * 100_000}, "bad_json"),
        ({"json": b"[1]"}, "bad_json"),
        ({"json": as_json(captions={"a": 1})}, "bad_json"),
    ],
)
def test_bad_captions_are_named_by_kind(members: dict[str, bytes], kind: str) -> None:
    with pytest.raises(BadSample) as caught:
        read_captions(members)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "record",
    [
        b"[1]", b"null", b"", b"{", b'"text"', b"caf\xe9", b"[" * 100_000, as_json(width=3),
        as_json(captions=[]), as_json(captions=["", None]), as_json(captions={"a": 1}),
        as_json(captions=3), as_json(captions=None, caption=None), b'{"captions": ["\\ud800"]}',
    ],
)  # fmt: skip
def test_a_json_without_a_usable_caption_loses_no_text(record: bytes) -> None:
    assert read_captions({"txt": b"a cat", "json": record}) == ("a cat",)


@pytest.mark.parametrize("text", [b"", b" \n", b"caf\xe9"])
def test_an_unusable_text_loses_no_caption_of_the_json(text: bytes) -> None:
    assert read_captions({"txt": text, "json": as_json(caption="a cat")}) == ("a cat",)


def test_a_bad_caption_of_a_list_loses_itself_alone() -> None:
    mixed = as_json(captions=["a", None, 3, "b", ["c"], "\ud800", " "])
    assert read_captions({"json": mixed}) == ("a", "b")
    assert read_captions({"json": as_json(captions=[1, "a"])}) == ("a",)


def test_drawing_is_pure_and_even() -> None:
    drawn = [draw(3, 0, epoch, "key") for epoch in range(3000)]
    assert drawn == [draw(3, 0, epoch, "key") for epoch in range(3000)]
    assert min(Counter(drawn).values()) > 900
    other_keys = [draw(3, 0, 0, f"key{i}") for i in range(3000)]
    assert min(Counter(other_keys).values()) > 900
    assert drawn != [draw(3, 1, epoch, "key") for epoch in range(3000)]
    views = [draw(3, 0, epoch, "key", "view") for epoch in range(3000)]
    together = Counter(zip(drawn, views, strict=True))
    assert len(together) == 9  # captions and views are drawn independently
    assert min(together.values()) > 250


def test_concepts_are_equal_where_the_lists_are() -> None:
    assert concept_id(["a", "b"]) == concept_id(("a", "b"))
    lists = [["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ["a"], [""]]
    assert len({concept_id(captions) for captions in lists}) == len(lists)
    assert all(-(2**63) <= concept_id(captions) < 2**63 for captions in lists)
