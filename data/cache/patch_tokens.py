"""Features of patches on disk: of a set of pictures, one file for each patch size.

    DIR/manifest.json      which tower, which pictures
    DIR/p28.npy            (pictures, rows, columns, d), float16

They stay what they are as long as the tower is locked, so a decoder trains without a forward of it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int

from data.cache.checksums import write_or_explain
from data.errors import UsageError
from data.files import load_array, sealed

FORMAT = 1


class PatchTokenCache:
    """What a folder holds of some pictures, read as memory-mapped arrays.

    made_of: what the features depend on, by name; a folder made of anything else is refused with a
    `UsageError` that says what differs.
    """

    def __init__(self, folder: str | Path, made_of: Mapping[str, str]) -> None:
        self.folder, self.made_of = Path(folder), dict(made_of)
        self._opened: dict[int, np.ndarray] = {}
        self._check()

    def _check(self) -> None:
        file = self.folder / "manifest.json"
        if not file.exists():
            return
        try:
            found = json.loads(file.read_text())
            saved = dict(found["patch_tokens"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file} is no manifest of patches' features ({error!r}); name another folder"
            ) from None
        if found.get("format") != FORMAT:
            raise UsageError(f"{file} has format {found.get('format')!r}, allowed is {FORMAT}")
        for name, value in self.made_of.items():
            if saved.get(name) != value:
                raise UsageError(
                    f"the features in {self.folder} were computed with {name} {saved.get(name)}, "
                    f"this run has {value}; name another folder"
                )

    def claim(self) -> None:
        """Write the manifest."""
        values = sealed({"format": FORMAT, "patch_tokens": self.made_of})
        text = json.dumps(values, indent=1) + "\n"
        write_or_explain(self.folder / "manifest.json", lambda file: file.write(text.encode()))

    def missing(self, patch_sizes: Sequence[int]) -> list[int]:
        """Those that the folder has no file of."""
        return [size for size in patch_sizes if not self._file(size).exists()]

    def begin(self, patch_size: int, shape: Sequence[int]) -> None:
        """Make an empty file to `write` to. Raises `UsageError` where the disk has no room."""
        part = self._part(patch_size)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(part, "w+", np.float16, tuple(shape)).flush()
            with open(part, "r+b") as file:  # else a full disk ends the process by a signal
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UsageError(f"{part} cannot be written: {error.strerror}") from error

    def write(
        self, patch_size: int, rows: Sequence[int], features: Float16[np.ndarray, "n r c d"]
    ) -> None:
        """Of these pictures; after `begin`, by any number of processes."""
        array = np.load(self._part(patch_size), mmap_mode="r+")
        array[rows] = features
        array.flush()

    def finish(self, patch_size: int) -> None:
        """Every picture is written: the file is there from now on."""
        os.replace(self._part(patch_size), self._file(patch_size))

    def read(self, patch_size: int, rows: Int[np.ndarray, " n"]) -> Float16[np.ndarray, "n r c d"]:
        """Raises `UsageError` for a damaged file."""
        array = self._opened.get(patch_size)
        if array is None:
            try:
                array = load_array(self._file(patch_size), mapped=True)
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"{self._file(patch_size)} cannot be read ({error}); delete it, and it is "
                    "computed again"
                ) from None
            self._opened[patch_size] = array
        return array[rows]

    def _file(self, patch_size: int) -> Path:
        return self.folder / f"p{patch_size}.npy"

    def _part(self, patch_size: int) -> Path:
        return self.folder / f".p{patch_size}.npy.part"
