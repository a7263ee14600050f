"""manifest.json of a feature cache: which tower computed it, over which shards."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data.cache.checksums import write_or_explain
from data.errors import UsageError

_FORMAT = 1
_OTHER = "name another folder"


@dataclass(frozen=True)
class Manifest:
    """The tower, the shards and the augmentation of a folder of features."""

    image_fingerprint: str
    shards: Mapping[str, Mapping[str, int]]  # name -> size (bytes), samples
    augment: str = ""  # how augmented views are made; "" where there are none
    width: int = 0  # d
    made_of: Mapping[str, str] = field(default_factory=dict)  # what the fingerprint hashes
    max_pixels: int = 0  # of images that were decoded; 0: not noted

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """None where there is no manifest; raises `UsageError` for anything else's."""
        path = folder / "manifest.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise UsageError(f"{str(folder)!r} is a file, name a folder") from None
        except ValueError as error:
            raise UsageError(f"{str(path)!r} is not JSON: {error}") from None
        names = {"image_fingerprint", "width", "shards"}
        whole = isinstance(values, dict) and names <= values.keys()
        if not whole or not _are_entries(values["shards"]):
            raise UsageError(f"{str(path)!r} is no feature cache's manifest, name another folder")
        if values.get("format") != _FORMAT:
            raise UsageError(
                f"{str(path)!r} has format {values.get('format')!r}, allowed is {_FORMAT}"
            )
        return cls(
            values["image_fingerprint"],
            values["shards"],
            values.get("augment", ""),
            values["width"],
            values.get("made_of", {}),
            values.get("max_pixels", 0),
        )

    def check(self, folder: Path, wanted: "Manifest") -> None:
        """Raises `UsageError` that says what differs, unless both may share `folder`."""
        cache = f"the feature cache {str(folder)!r}"
        if self.image_fingerprint != wanted.image_fingerprint:
            had, has = self._what_differs(wanted)
            raise UsageError(f"{cache} was computed by {had}, this run has {has}, {_OTHER}")
        if self.max_pixels and wanted.max_pixels and self.max_pixels != wanted.max_pixels:
            raise UsageError(
                f"{cache} was computed with data.max_pixels {self.max_pixels}, this run has "
                f"{wanted.max_pixels}, {_OTHER}"
            )
        if self.augment and wanted.augment and self.augment != wanted.augment:
            raise UsageError(
                f"{cache} has augmented views of {self.augment!r}, this run needs "
                f"{wanted.augment!r}, {_OTHER}"
            )
        for name, entry in wanted.shards.items():
            cached = self.shards.get(name, entry)
            for what, unit in (("size", "bytes"), ("samples", "samples")):
                if cached[what] != entry[what]:
                    raise UsageError(
                        f"{cache} was computed when shard {name!r} had {cached[what]} {unit}, it "
                        f"has {entry[what]} now, {_OTHER}"
                    )

    def _what_differs(self, wanted: "Manifest") -> tuple[str, str]:
        """The first part of the fingerprint that differs: the cache's, and the wanted one."""
        shared = [name for name in self.made_of if name in wanted.made_of]
        for name in shared:  # the weights come last: their digest depends on the dtype too
            if self.made_of[name] != wanted.made_of[name]:
                return f"{name} {self.made_of[name]}", f"{name} {wanted.made_of[name]}"
        return f"tower {self.image_fingerprint}", f"tower {wanted.image_fingerprint}"

    def write(self, folder: Path, width: int) -> None:
        """Write this; the shards of the manifest that is there stay in it."""
        old = Manifest.read(folder)
        if old is not None:
            old.check(folder, self)
        values = {
            "format": _FORMAT,
            "image_fingerprint": self.image_fingerprint,
            "width": width,
            "augment": self.augment or (old.augment if old else ""),
            "made_of": dict(self.made_of),
            "max_pixels": self.max_pixels or (old.max_pixels if old else 0),
            "shards": {**(old.shards if old else {}), **self.shards},
        }
        text = json.dumps(values, indent=1) + "\n"
        write_or_explain(folder / "manifest.json", lambda file: file.write(text.encode()))


def _are_entries(shards: object) -> bool:
    """Whether a manifest's shards are entries of sizes."""
    entries = shards.values() if isinstance(shards, dict) else [None]
    return all(isinstance(e, dict) and {"size", "samples"} <= e.keys() for e in entries)
