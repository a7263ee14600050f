"""One image that a search finds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from data.config import MAX_PIXELS
from data.images import decode_image
from data.shards.location import ImageLocation, read_image
from retrieval.embed.partitions import OWN_COLUMNS
from retrieval.regions.boxes import Box


class Hit(NamedTuple):
    """One image found: its place in a shard (or a file of its own), and its cosine similarity."""

    id: int
    similarity: float
    key: str
    caption: str
    shard: str
    offset: int
    size: int
    columns: Mapping[str, Any] = {}  # the index's others
    digest: int = 0  # `image_digest` of the image file; 0: the index has none
    words: float = 0.0  # BM25 of its texts, where words were searched for; 0: it has none of them
    box: Box | None = None  # the part that was found, where regions were searched

    @classmethod
    def of(cls, similarity: float, row: Mapping[str, Any], words: float = 0.0) -> "Hit":
        """From a row of metadata."""
        others = {name: value for name, value in row.items() if name not in OWN_COLUMNS}
        return cls(
            row["id"], similarity, row["key"], row["caption"],
            row["shard"], row["offset"], row["size"], others, row.get("digest") or 0, words,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Hit({self.similarity:.3f}, {self.caption!r}, key={self.key!r}, id={self.id})"

    @property
    def location(self) -> ImageLocation:
        """Where the bytes of the image file lie."""
        return ImageLocation(self.shard, self.offset, self.size, self.digest)

    def image_bytes(self) -> bytes:
        """The image file. Raises as `read_image`: `ImageChangedError` where another image lies in
        its place by now. Indexes by 0.1.0 cannot tell."""
        return read_image(self.location)

    def image(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """The image, RGB."""
        return decode_image(self.image_bytes(), max_pixels)
