"""Features of patches on disk: of a set of pictures, one file for each patch size.

    DIR/manifest.json      which tower, which pictures, digests of the files
    DIR/pictures.json      of each picture: size, time of its last change, digest
    DIR/p28.npy            (pictures, rows, columns, d), float16

They stay what they are as long as the tower is locked, so a decoder trains without a forward of it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Int

from data.cache.checksums import write_or_explain
from data.errors import UsageError
from data.files import check_seal, file_digest, load_array, sealed
from data.shards.identity import Identity, confirm

FORMAT = 1
PICTURES = "pictures.json"


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
        found = self._read()
        if not found:
            return
        saved = found["patch_tokens"]
        for name, value in self.made_of.items():
            if saved.get(name) != value:
                raise UsageError(
                    f"the features in {self.folder} were computed with {name} {saved.get(name)}, "
                    f"this run has {value}; name another folder"
                )

    def _read(self) -> dict[str, Any]:
        """The manifest, {} where there is none. Raises `UsageError`."""
        file = self.folder / "manifest.json"
        if not file.exists():
            return {}
        try:
            found: dict[str, Any] = json.loads(file.read_text())
            check_seal(file, found)
            wanted = {"patch_tokens", "files"} <= found.keys()
        except (OSError, ValueError, AttributeError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            wanted = False
        if not wanted:
            raise UsageError(f"{file} is no manifest of patches' features; name another folder")
        if found.get("format") != FORMAT:
            raise UsageError(f"{file} has format {found.get('format')!r}, allowed is {FORMAT}")
        return found

    def _digests(self) -> dict[str, str]:
        """Of each file that is whole."""
        return dict(self._read().get("files", {}))

    def claim(self, **digests: str) -> None:
        """Write the manifest. digests: of more files, by name."""
        files = self._digests() | digests
        values = sealed({"format": FORMAT, "patch_tokens": self.made_of, "files": files})
        text = json.dumps(values, indent=1) + "\n"
        write_or_explain(self.folder / "manifest.json", lambda file: file.write(text.encode()))

    def note_pictures(self, identities: Sequence[Identity]) -> None:
        """What the features are computed from, by which `check_pictures` tells a change."""
        text = json.dumps(sealed({"format": FORMAT, "pictures": list(identities)})) + "\n"
        write_or_explain(self.folder / PICTURES, lambda file: file.write(text.encode()))

    def check_pictures(self, files: Sequence[str]) -> None:
        """Raises `UsageError` where one is not what it was when its features were computed, though
        its name and size are. A copy, of another time, is read whole, once."""
        file = self.folder / PICTURES
        if not file.exists():
            return
        try:
            found = json.loads(file.read_text())
            check_seal(file, found)
            noted: list[Identity] = found["pictures"]
            pairs = list(zip(files, noted, strict=True))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{file} is no list of these pictures; name another folder") from None
        confirmed = []
        for picture, identity in pairs:
            try:
                same = confirm(picture, identity) if os.path.isfile(picture) else identity
            except OSError:  # it cannot be read now; its features were computed when it could
                same = identity
            if same is None:
                raise UsageError(
                    f"{picture} has changed since the features in {self.folder} were computed; "
                    "name another folder"
                )
            confirmed.append(same)
        if confirmed != noted:
            with suppress(UsageError):  # a folder that cannot be written: they are read again
                self.note_pictures(confirmed)

    def missing(self, patch_sizes: Sequence[int]) -> list[int]:
        """Those that the folder has no whole file of."""
        whole = self._digests()
        return [
            size
            for size in patch_sizes
            if not self._file(size).exists() or self._file(size).name not in whole
        ]

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
        part, file = self._part(patch_size), self._file(patch_size)
        digest = file_digest(part)
        os.replace(part, file)
        self.claim(**{file.name: digest})

    def read(self, patch_size: int, rows: Int[np.ndarray, " n"]) -> Float16[np.ndarray, "n r c d"]:
        """The first call for a patch size reads the whole file, about 1 GB/s. Raises `UsageError`
        for a damaged one."""
        if patch_size not in self._opened:
            self._opened[patch_size] = self._open(self._file(patch_size))
        return self._opened[patch_size][rows]

    def _open(self, file: Path) -> np.ndarray:
        try:
            if file_digest(file) != self._digests().get(file.name):
                raise ValueError("its contents are not those that were written")
            array: np.ndarray = load_array(file, mapped=True)
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            why = f"{file} cannot be read ({error}); delete it, and it is computed again"
            raise UsageError(why) from None
        return array

    def _file(self, patch_size: int) -> Path:
        return self.folder / f"p{patch_size}.npy"

    def _part(self, patch_size: int) -> Path:
        return self.folder / f".p{patch_size}.npy.part"
