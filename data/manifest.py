"""manifest.json of a feature cache: what its features are of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.errors import UsageError
from data.intact import write_or_explain

_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Which tower, shards and augmentation a folder of features belongs to."""

    image_fingerprint: str
    shards: Mapping[str, Mapping[str, int]]  # name -> size (bytes), samples
    augment: str = ""  # how augmented views are made; "" where there are none
    width: int = 0  # d

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """None where there is no manifest; `UsageError` where it is no feature cache's."""
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
        if not isinstance(values, dict) or not names <= values.keys():
            raise UsageError(f"{str(path)!r} is no feature cache's manifest, name another folder")
        if values.get("format") != _FORMAT:
            raise UsageError(
                f"{str(path)!r} has format {values.get('format')!r}, allowed is {_FORMAT}"
            )
        augment = values.get("augment", "")
        return cls(values["image_fingerprint"], values["shards"], augment, values["width"])

    def check(self, folder: Path, wanted: "Manifest") -> None:
        """Raises `UsageError` with what differs, unless `folder` may hold what is wanted too."""
        cache = f"the feature cache {str(folder)!r}"
        if self.image_fingerprint != wanted.image_fingerprint:
            raise UsageError(
                f"{cache} was computed by {self.image_fingerprint!r}, this run needs "
                f"{wanted.image_fingerprint!r}, name another folder"
            )
        if self.augment and wanted.augment and self.augment != wanted.augment:
            raise UsageError(
                f"{cache} has augmented views of {self.augment!r}, this run needs "
                f"{wanted.augment!r}, name another folder"
            )
        for name, entry in wanted.shards.items():
            cached = self.shards.get(name, entry)
            for what, unit in (("size", "bytes"), ("samples", "samples")):
                if cached[what] != entry[what]:
                    raise UsageError(
                        f"{cache} was computed when shard {name!r} had {cached[what]} {unit}, it "
                        f"has {entry[what]} now, name another folder"
                    )

    def write(self, folder: Path, width: int) -> None:
        """Join this with the manifest that is there."""
        old = Manifest.read(folder)
        if old is not None:
            old.check(folder, self)
        values = {
            "format": _FORMAT,
            "image_fingerprint": self.image_fingerprint,
            "width": width,
            "augment": self.augment or (old.augment if old else ""),
            "shards": {**(old.shards if old else {}), **self.shards},
        }
        text = json.dumps(values, indent=1) + "\n"
        write_or_explain(folder / "manifest.json", lambda file: file.write(text.encode()))
