"""How far a coarse patch size finds what the model's own patch size finds, as an index keeps it.

It is measured on the index's own images (`retrieval.search.neighbours`), kept as agreement.json
beside the manifest, and read here, without torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.files import is_intact, sealed, write_json
from retrieval.detail import Detail, as_key, from_key, said

NEAREST = 10  # neighbours of an image that are compared
# Sizes above had 0.81 to 0.99 of the own size's precision@10, those below 0.50 to 0.67
# (benchmarks/agreement.py).
MIN_NEIGHBOURS = 0.3
# Images' neighbours are harder to find than what words ask for: the demo's patch 56 has 0.73 of
# patch 28's among 5,804 drawings, and by captions alone 0.96 of patch 16's recall@10 among 48,176
# (benchmarks/coarse_to_fine.py). Below, coarse to fine loses most of what is to be found.
MIN_CANDIDATES = 0.5
CHANGED = 0.2  # share of the images that was added or deleted, above which it is measured again


@dataclass(frozen=True)
class SizeAgreement:
    """Of the nearest images at the own patch size, which share one patch size finds; 0 to 1."""

    neighbours: float  # among as many of its own nearest
    candidates: float | None
    """Among its first `CANDIDATES`, which coarse to fine ranks again; None where the images that
    were compared are too few to tell."""


@dataclass(frozen=True)
class Agreement:
    """What was measured of an index."""

    own: Detail  # the patch size that the others are compared with
    queries: int  # images whose neighbours were looked for
    images: int  # among which: all of the index, or those that were encoded at the own size
    count: int  # images of the index then
    next_id: int  # of the index then: images with higher ids were added since
    image_fingerprint: str
    indexed: tuple[Detail, ...]  # patch sizes of the index
    sizes: Mapping[Detail, SizeAgreement] = field(default_factory=dict)  # not of the own

    def line(self, patch_size: Detail) -> str:
        """What was found at a patch size, "" where it was not compared."""
        found = self.sizes.get(patch_size)
        if found is None:
            return ""
        among = (
            ""
            if found.candidates is None
            else f", {found.candidates:.0%} among its first candidates"
        )
        return (
            f"{_finds(patch_size)} {found.neighbours:.0%} of the nearest images that "
            f"{_finds(self.own)}{among}"
        )

    def warning(self, patch_size: Detail, refined: bool = False) -> str:
        """One sentence where a patch size finds too little, else "".

        refined: its candidates are ranked again at the own patch size.
        """
        found = self.sizes.get(patch_size)
        if found is None:
            return ""
        if found.candidates is not None and found.candidates < MIN_CANDIDATES:
            too_few = "too few even for candidates that are ranked again"
        elif found.neighbours < MIN_NEIGHBOURS and not refined:
            too_few = f"too few to do without ranking again at {said(self.own)}"
        else:
            return ""
        return (
            f"{self.line(patch_size)}: {too_few}; launch/flexify.py --teacher.tower, with this "
            "model, makes one that is good at every patch size"
        )

    def as_json(self) -> dict[str, Any]:
        sizes = {str(as_key(size)): asdict(found) for size, found in self.sizes.items()}
        keys = {"own": as_key(self.own), "indexed": [as_key(size) for size in self.indexed]}
        return sealed({"format": 1, **asdict(replace(self, sizes={})), **keys, "sizes": sizes})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Agreement":
        """Raises ValueError, KeyError, TypeError or AttributeError for what is none."""
        if values["format"] != 1 or not is_intact(values):
            raise ValueError("other values than were written")
        given = {name: values[name] for name in cls.__dataclass_fields__}
        sizes = {from_key(key): SizeAgreement(**found) for key, found in values["sizes"].items()}
        indexed = tuple(map(from_key, values["indexed"]))
        own = from_key(values["own"])
        return cls(**{**given, "own": own, "indexed": indexed, "sizes": sizes})


def _finds(detail: Detail) -> str:
    return f"{said(detail)} find" + ("s" if isinstance(detail, int) else "")


def agreement_file(folder: Path) -> Path:
    """Where an index keeps it."""
    return folder / "agreement.json"


def read_agreement(folder: Path) -> Agreement | None:
    """What was measured of an index; None where nothing was, or the file is damaged."""
    file = agreement_file(folder)
    try:
        stat = file.stat()
    except OSError:
        return None
    return _read(file, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=64)
def _read(file: Path, modified: int, inode: int) -> Agreement | None:
    try:
        return Agreement.from_json(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # measured anew by the next change


def write_agreement(folder: Path, agreement: Agreement) -> None:
    write_json(agreement_file(folder), agreement.as_json())
