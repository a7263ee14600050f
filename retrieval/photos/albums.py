"""Where the indexes of photo folders lie that nobody gave a place, and which model makes them.

They are kept under `photos` of the cache folder, each named after its folder of photos; whatever
lies in them can be made again. Imports no torch.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data.errors import UsageError
from data.files import cache_folder, write_json
from retrieval.index.manifest import IndexManifest, read_index_manifest

GOOD_MODEL = "open_clip:ViT-B-32@laion2b_s34b_b79k"
_ITS_REPOSITORY = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
_ITS_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # fmt: skip


@dataclass(frozen=True)
class AlbumFacts:
    """What album.json says of an index that was made with this program."""

    model: str  # as it was named
    patch_sizes: tuple[int, ...] = ()  # that it shall have

    @classmethod
    def read(cls, album: Path) -> "AlbumFacts":
        """Nothing is known of an index that has no such file, or a damaged one."""
        try:
            facts = json.loads((album / "album.json").read_text())
            return cls(str(facts["model"]), tuple(map(int, facts["patch_sizes"])))
        except (OSError, ValueError, KeyError, TypeError):
            return cls("")

    def write(self, album: Path) -> None:
        write_json(album / "album.json", {"format": 1, **asdict(self)})


def find_album(images: Path, model: str = "", root: Path | None = None) -> Path:
    """The index of a folder of photos; where there is none yet, the place for it.

    model: by which it must have been made, "" for any. root: where albums lie. An album whose
    folder is gone is taken where `images` holds its photos: the folder was moved.
    """
    root = root or cache_folder("photos")
    gone = []
    for album, manifest in _albums(root):
        if model and AlbumFacts.read(album).model not in ("", model):
            continue
        if manifest.images == str(images):
            return album
        if manifest.count and not Path(manifest.images).is_dir():
            gone.append(album)
    for album in gone:
        if holds_its_photos(album, images):
            return album
    name = re.sub(r"[^\w. -]", "_", images.name).strip(". ") or "photos"
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, 10_000))
    return next(root / name for name in names if not (root / name).exists())


def holds_its_photos(album: Path, images: Path) -> bool:
    """Whether a folder holds what an index was made from elsewhere."""
    from retrieval.index.snapshot import Snapshot
    from retrieval.photos.changes import is_same_folder
    from retrieval.photos.listing import list_photos

    try:
        return is_same_folder(list_photos(images, album), Snapshot.open(album))
    except UsageError:  # a damaged index
        return False


def _albums(root: Path) -> Iterator[tuple[Path, IndexManifest]]:
    """Those used last first."""
    found = [file for file in root.glob("*/manifest.json") if file.is_file()]
    for file in sorted(found, key=lambda file: -file.stat().st_mtime):
        try:
            manifest = read_index_manifest(file.parent)
        except UsageError:
            continue
        if manifest.images:
            yield file.parent, manifest


def usual_model() -> str:
    """`GOOD_MODEL` where its weights are on this machine. Raises `UsageError` where they are not:
    nothing is downloaded that nobody asked for."""
    from huggingface_hub import try_to_load_from_cache

    for file in _ITS_FILES:
        if isinstance(try_to_load_from_cache(_ITS_REPOSITORY, file), str):
            return GOOD_MODEL
    raise UsageError(
        f"no model is given; --model {GOOD_MODEL} is a good one, 600 MB that are downloaded once; "
        "without a network name a CLIP or SigLIP that is on this machine, such as "
        "--model open_clip:ViT-B-32@FILE"
    )
