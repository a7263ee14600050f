"""manifest.json says what an index folder holds: its segments, and where its tombstones lie.

The file is replaced, never changed in place. It is read before anything heavy is imported.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.config import Fit
from data.errors import UsageError
from data.files import check_there, is_intact, sealed, write_json
from retrieval.detail import (
    Detail,
    as_key,
    from_key,
    manifest_format,
    of_manifest,
    said,
    to_manifest,
)
from retrieval.index.choose import RERANKED
from retrieval.index.config import K_FACTOR, LATENCY_MS, IndexType, IndexTypeChoice


@dataclass(frozen=True)
class Tuning:
    """How far a search of one FAISS index looks by default."""

    nprobe: int = 1  # inverted lists looked into: ivf, ivfpq, rabitq
    ef: int = 16  # efSearch, candidates kept on the walk: hnsw
    exact_below: float = 0.0  # filters that match a smaller share are answered by a scan
    recall: float = 1.0  # at ten, measured
    query_ms: float = 0.0  # median of one query alone, measured; 0 where nothing was
    k_factor: int = K_FACTOR  # times k, that float16 vectors rank again: ivfpq, rabitq
    captions: int = 0  # that were the queries; 0: vectors of the index, moved

    def line(self, index_type: IndexType) -> str:
        """What was measured, in words; "" for types that look at everything."""
        if not self.query_ms:
            return ""
        looks = f"ef {self.ef}" if index_type == "hnsw" else f"nprobe {self.nprobe}"
        if index_type in RERANKED:
            looks += f", {self.k_factor} times k ranked again"
        near = f"{self.captions} captions" if self.captions else "vectors between its images"
        hint = "" if self.captions else "; texts may find fewer"
        return (
            f"{looks}: {self.recall:.1%} of the ten nearest to {near}, {self.query_ms:.2g} ms{hint}"
        )


# What 0.1.0 did not measure, and took it for. It keeps keys of an entry that it does not know, but
# knows all of "tuning", so these lie beside it, under "tuned".
_TUNED = {"k_factor": K_FACTOR, "captions": 0}


@dataclass(frozen=True)
class SegmentEntry:
    """One segment: vectors and rows that are never changed once written."""

    number: int
    index_type: IndexType
    count: int
    first_id: int
    last_id: int
    bytes: Mapping[str, int]  # per file, see `segment_files`
    blake2b: Mapping[str, str] = field(default_factory=dict)  # per file; of earlier indexes none
    tuning: Mapping[Detail, Tuning] = field(default_factory=dict)  # by patch size; of a delta none
    delta: bool = False  # added since the last compaction
    words: Mapping[str, Any] = field(default_factory=dict)  # of `write_words`; {}: there are none
    unknown: Mapping[str, Any] = field(default_factory=dict)  # keys of others, kept as they are

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "SegmentEntry":
        """Raises KeyError, TypeError or AttributeError for what is no entry."""
        values = {**entry, "index_type": entry["kind"]}
        del values["kind"]
        more = values.pop("tuned", {})
        values["tuning"] = {
            from_key(size): Tuning(**measured, **more.get(size, {}))
            for size, measured in values.get("tuning", {}).items()
        }
        return cls(**_known(cls, values))

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "number": self.number,
            "kind": self.index_type,
            "count": self.count,
            "first_id": self.first_id,
            "last_id": self.last_id,
            "bytes": dict(self.bytes),
            "blake2b": dict(self.blake2b),
        }
        if self.tuning:
            tuning = {str(as_key(size)): asdict(measured) for size, measured in self.tuning.items()}
            more = {size: {key: one.pop(key) for key in _TUNED} for size, one in tuning.items()}
            entry["tuning"] = tuning
            if any(one != _TUNED for one in more.values()):
                entry["tuned"] = more
        if self.words:
            entry["words"] = dict(self.words)
        return {**entry, "delta": self.delta, **self.unknown}


@dataclass(frozen=True)
class IndexManifest:
    """One state of an index."""

    image_fingerprint: str
    text_fingerprint: str  # of the model at the build; not compared
    width: int
    patch_sizes: tuple[Detail, ...]
    fit: Fit | None = None  # by which the model reads images here; None: by its own
    images: str = ""  # folder of the photos that the index follows, "" for one made from shards
    count: int = 0  # rows, without deleted ones
    asked_type: IndexTypeChoice = "auto"
    index_type: IndexType = "flat"
    reason: str = ""  # for the index type
    latency_ms: float = LATENCY_MS  # that one query may take
    memory_bytes: int = 0  # that the index may take while it is built and searched
    generation: int = 0  # changes since the build
    next_id: int = 0
    next_segment: int = 0
    tombstones: str = ""  # file of the deleted ids, "" where none were deleted
    # Of that file, under its name: 0.1.0 keeps the entry when it writes another file.
    tombstones_blake2b: Mapping[str, str] = field(default_factory=dict)
    segments: tuple[SegmentEntry, ...] = ()
    unknown: Mapping[str, Any] = field(default_factory=dict)  # keys of others, kept as they are

    @classmethod
    def from_json(cls, manifest: Mapping[str, Any]) -> "IndexManifest":
        """Raises KeyError, TypeError or AttributeError for what is no manifest."""
        values = {**manifest, "generation": manifest["generation"], "deleted": manifest["deleted"]}
        values["segments"] = tuple(map(SegmentEntry.from_json, manifest["segments"]))
        values["patch_sizes"] = of_manifest(manifest)
        values.pop("max_tokens", None)
        values |= {name: values.pop(key) for name, key in _KEYS.items() if key in values}
        return cls(**_known(cls, values))

    def tuning_line(self, patch_size: Detail) -> str:
        """How far a search looks at a patch size and what it finds there, of the segment that finds
        least; "" for exact types."""
        measured = [(e.tuning[patch_size], e) for e in self.segments if patch_size in e.tuning]
        if not measured:
            return ""
        tuning, entry = min(measured, key=lambda pair: pair[0].recall)
        line = tuning.line(entry.index_type)
        return f"{said(patch_size)}: {line}" if line else ""

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["segments"] = [entry.to_json() for entry in self.segments]
        values |= to_manifest(self.patch_sizes)
        if not self.fit:
            del values["fit"]
        unknown = values.pop("unknown")
        named = {_KEYS.get(name, name): value for name, value in values.items()}
        return {"format": manifest_format(self.patch_sizes), **named, **unknown}


# Keys that are named otherwise here.
_KEYS = {
    "asked_type": "asked_kind", "index_type": "kind", "tombstones": "deleted",
    "tombstones_blake2b": "deleted_blake2b",
}  # fmt: skip


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, those that are no fields of `cls` gathered under `unknown`."""
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    known = {name: value for name, value in values.items() if name in fields}
    others = {name: value for name, value in values.items() if name not in fields}
    return {**known, "unknown": {name: v for name, v in others.items() if name != "format"}}


def read_index_manifest(folder: Path) -> IndexManifest:
    """The manifest of an index folder. Raises `UsageError` if it has none."""
    check_there(folder)
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}); build the index again") from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") not in (1, 2)
        or "segments" not in manifest
    ):
        raise UsageError(f"{folder} holds no index of format 1 or 2; launch/index.py makes one")
    try:
        seal = manifest.pop("seal", {})
        if seal.get("generation") == manifest["generation"] and not is_intact({**manifest, **seal}):
            raise ValueError("other values than were written")
        return IndexManifest.from_json(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{file} is damaged ({error}); build the index again") from error


def write_index_manifest(folder: Path, manifest: IndexManifest) -> None:
    """Make this the state of an index.

    The manifest holds a digest of itself and the generation that it is of: 0.1.0 keeps the entry as
    it is when it changes the index, which is no damage.
    """
    values = manifest.to_json()
    seal = {"generation": manifest.generation, "blake2b": sealed(values)["blake2b"]}
    write_json(folder / "manifest.json", {**values, "seal": seal})
