"""How finely images are read, by which stored vectors are told apart: at a patch size, or within a
budget of tokens. Imports nothing heavy.

Files and folders name a patch size as they always did (28, "patch_28"), a budget "tokens_64".
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from data.errors import UsageError


@dataclass(frozen=True, order=True)
class MaxTokens:
    """At most so many patches an image; rows, columns and patch size are chosen for its shape
    (`contrastive.vision.grids.choose_grid`)."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"max_tokens {self.count}: allowed are 1 and more")

    def __str__(self) -> str:
        return f"{self.count} tokens"


Detail: TypeAlias = int | MaxTokens
"""A patch size in pixels, or a budget. What is stored together is of one kind: at every patch size
an image has a number of tokens, so budgets alone say what patch sizes would say beside them."""

D = TypeVar("D", int, MaxTokens, Detail)


def coarse_first(details: Iterable[D]) -> list[D]:
    """Sorted: the fewest tokens first."""
    return sorted(details, key=lambda d: -d if isinstance(d, int) else d.count)


def finest(details: Iterable[D]) -> D:
    return coarse_first(details)[-1]


def coarsest(details: Iterable[D]) -> D:
    return coarse_first(details)[0]


def said(*details: Detail) -> str:
    """In words: "patch 56, 28", "64 tokens"."""
    numbers = ", ".join(str(d if isinstance(d, int) else d.count) for d in details)
    return f"{numbers} tokens" if isinstance(details[0], MaxTokens) else f"patch {numbers}"


def said_pair(coarse: Detail, fine: Detail) -> str:
    """In words: "patch 56 to 28", "16 to 64 tokens", "patch 56 to 64 tokens"."""
    if isinstance(coarse, int):
        return f"patch {coarse} to {fine}"
    if isinstance(fine, int):
        return f"{coarse} to patch {fine}"
    return f"{coarse.count} to {fine}"


def encoding(detail: Detail) -> dict[str, int]:
    """As arguments of `LitModel.encode_image`."""
    return {"patch_size": detail} if isinstance(detail, int) else {"max_tokens": detail.count}


def answered(prefix: str = "", detail: Detail | None = None) -> dict[str, int | None]:
    """As fields of an answer, such as `query_patch_size` and `query_max_tokens`: one, or none, is
    known."""
    return {
        f"{prefix}patch_size": detail if isinstance(detail, int) else None,
        f"{prefix}max_tokens": detail.count if isinstance(detail, MaxTokens) else None,
    }


def num_tokens(detail: Detail, image_size: int) -> int:
    """Patches of an image that a tower reads as a square of `image_size`, at most."""
    return (image_size // detail) ** 2 if isinstance(detail, int) else detail.count


# ---- files ---------------------------------------------------------------------------------


def as_key(detail: Detail) -> int | str:
    """As JSON and SQLite keep it: 28, or "tokens_64"."""
    return detail if isinstance(detail, int) else f"tokens_{detail.count}"


def from_key(key: int | str) -> Detail:
    """What `as_key` gave, or str of that. Raises ValueError."""
    found = re.fullmatch(r"tokens_(\d+)", str(key))
    return MaxTokens(int(found[1])) if found else int(key)


def folder_name(detail: Detail) -> str:
    """Of its vectors: "patch_28", "tokens_64"."""
    return f"patch_{detail}" if isinstance(detail, int) else f"tokens_{detail.count}"


def to_manifest(details: Iterable[Detail]) -> dict[str, Any]:
    """The entries of a manifest: `patch_sizes`, and `max_tokens` where there are budgets."""
    details = list(details)
    budgets = [d.count for d in details if isinstance(d, MaxTokens)]
    entries: dict[str, Any] = {"patch_sizes": [d for d in details if isinstance(d, int)]}
    return {**entries, "max_tokens": budgets} if budgets else entries


def of_manifest(manifest: Mapping[str, Any]) -> tuple[Detail, ...]:
    """What `to_manifest` wrote. Raises KeyError or TypeError for what it did not."""
    return (*manifest["patch_sizes"], *map(MaxTokens, manifest.get("max_tokens", ())))


def manifest_format(details: Iterable[Detail]) -> int:
    """1, as ever, of patch sizes. Earlier versions would take a folder of budgets for one without
    vectors; they refuse format 2."""
    return 2 if any(isinstance(d, MaxTokens) for d in details) else 1
