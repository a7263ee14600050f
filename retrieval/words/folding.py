"""Texts as they are compared: without case, accents and compatibility forms."""

import pyarrow as pa
import pyarrow.compute as pc


def folded(texts: pa.Array) -> pa.Array:
    """Texts without what a reader may leave out: case, accents, compatibility forms (the ligature
    for fi, full-width letters); ß is ss.

    Of the combining marks only those of Latin, Greek and Cyrillic go: a Japanese or Indic letter
    without its marks is another one.
    """
    texts = pc.utf8_normalize(texts, form="NFKD")
    texts = pc.replace_substring_regex(texts, pattern="[\u0300-\u036f]+", replacement="")
    texts = pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC"))
    for letter, usual in (("ß", "ss"), ("ς", "σ")):  # which lower case leaves as they are
        texts = pc.replace_substring(texts, pattern=letter, replacement=usual)
    return texts


def folded_text(text: str) -> str:
    """`folded` of one text."""
    if text.isascii():
        return text.lower()
    return folded(pa.array([text], pa.string()))[0].as_py()
