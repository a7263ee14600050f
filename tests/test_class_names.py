"""Class names and templates: what CLIP_benchmark's files hold, and what is refused."""

from pathlib import Path

import pytest

from data.class_names import (
    fill_template,
    read_class_names,
    read_templates,
)
from data.errors import UsageError


def test_names_keep_their_order_repeats_and_accents(tmp_path: Path) -> None:
    file = tmp_path / "classnames.txt"
    file.write_bytes("crane\r\npiñata\nT-shirt\ncrane\n\n".encode())
    assert read_class_names(file) == ["crane", "piñata", "T-shirt", "crane"]


def test_filling_leaves_other_braces_alone() -> None:
    assert fill_template("a {c} {x}, {c}", "{dog}") == "a {dog} {x}, {dog}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"cat\n\ndog\n", ":2: empty line"),
        (b"cat\n\xff\n", "not UTF-8"),
    ],
)
def test_names_that_would_shift_the_labels_are_refused(
    tmp_path: Path, content: bytes, says: str
) -> None:
    file = tmp_path / "classnames.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        read_class_names(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt: No such file"):
        read_class_names(tmp_path / "none.txt")


def test_a_template_without_a_place_for_the_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a photo of {c}\na photo\n")
    with pytest.raises(UsageError, match=r":2: no \{c\}"):
        read_templates(file)
