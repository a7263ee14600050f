"""Reading photos and their captions from files of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from data.batch import Pixels
from data.captions import read_captions
from data.config import MAX_PIXELS
from data.problems import BadSample, Problem, attempt
from data.shards.location import image_digest
from data.shards.tar import MAX_IMAGE_BYTES, MAX_TEXT_BYTES
from data.transform import Cuts, ImageTransform
from retrieval.photos.exif import UNKNOWN, Exif, read_exif
from retrieval.photos.listing import Photo


@dataclass(frozen=True)
class LoadedPhoto:
    """A photo with its pixels, the id of a row with the same contents, or what is wrong with it."""

    photo: Photo
    caption: str = ""
    digest: int = 0  # 0 where it was not read
    pixels: Pixels | None = None
    known: int | None = None
    exif: Exif = UNKNOWN
    problem: Problem | None = None
    caption_problem: Problem | None = None


class Photos(Dataset):
    """Photos read from files of their own; of known contents, only digests."""

    def __init__(
        self,
        photos: Sequence[Photo],
        transform: ImageTransform,
        same_file: Mapping[str, int],
        contents: Mapping[int, int],
        cuts: Cuts | None = None,
    ) -> None:
        """same_file: key -> id of the row that was made of this file; contents: digest -> id. cuts:
        what photos are read by in place of squares."""
        self._photos, self._transform, self._cuts = photos, transform, cuts
        self._same_file, self._contents = same_file, contents

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, number: int) -> LoadedPhoto:
        photo = self._photos[number]
        caption = attempt(photo.key, lambda: read_caption(photo))
        loaded = attempt(photo.key, lambda: self._read(photo))
        if isinstance(loaded, Problem):
            return LoadedPhoto(photo, problem=loaded)
        if isinstance(caption, Problem):
            return LoadedPhoto(photo, "", *loaded, caption_problem=caption)
        return LoadedPhoto(photo, caption, *loaded)

    def _read(self, photo: Photo) -> tuple[int, Pixels | None, int | None, Exif]:
        """Digest, pixels, id, facts."""
        if photo.key in self._same_file:
            return 0, None, self._same_file[photo.key], UNKNOWN
        data = _bytes(Path(photo.path), photo.size, MAX_IMAGE_BYTES)
        digest = image_digest(data)
        if digest in self._contents:
            return digest, None, self._contents[digest], read_exif(data)
        image = self._transform.decode(data, MAX_PIXELS)
        return digest, self._transform.pixels(image, self._cuts), None, read_exif(data)


def read_caption(photo: Photo) -> str:
    """The caption in KEY.txt or KEY.json beside the photo, "" without either. Raises `BadSample`
    where neither has a usable one."""
    payloads, problem = {}, None
    for file in photo.captions:
        try:
            beside = Path(photo.path).with_suffix(f".{file.ext}")
            payloads[file.ext] = _bytes(beside, file.size, MAX_TEXT_BYTES)
        except BadSample as bad:
            problem = bad
    if problem and not payloads:
        raise problem
    return read_captions(payloads)[0] if payloads else ""


def _bytes(file: Path, size: int, limit: int) -> bytes:
    if size > limit:
        raise BadSample("file_too_large", f"{file.name} of {size} bytes, the limit is {limit}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadSample("unreadable", str(error)) from None
