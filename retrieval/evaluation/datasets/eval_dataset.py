"""An evaluation set: images with labels or captions, and the texts to classify them with.

Opening one imports no torch, so that a data set that is not there is reported at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.config import NUM_WORKERS, OnError
from data.errors import UsageError
from data.shards.names import is_local
from retrieval.evaluation.datasets.image_source import ImageSource

if TYPE_CHECKING:
    from data.pipeline.reader import ShardReader
    from data.transform import Cuts, ImageTransform
    from retrieval.evaluation.datasets.image_reader import ImageReader


@dataclass(frozen=True)
class EvalDataset:
    """Images, either in `shards` or as `images`, and what they are evaluated with.

    Without class names it serves for recall alone.
    """

    name: str
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    shards: Sequence[str] = ()
    images: ImageSource | None = None
    accepted: Sequence[tuple[int, ...]] = ()
    """Per image, the classes that are right for it, where that may be several (ReaL)."""
    captioned: bool = False
    """A retrieval set: recall is what it is for, and each of an image's captions is its own. (In
    other sets images that carry an equal caption share it.)"""
    left_out: int = 0
    """Images that are there, and that the set's protocol does not score."""

    def num_images(self) -> int:
        """Images of all ranks, good or bad; 0 where streamed shards do not say."""
        if self.images is not None:
            return len(self.images)
        from data.shards.index import load_summaries

        if not all(map(is_local, self.shards)):
            return 0
        return sum(s.num_samples for s in load_summaries(self.shards))

    def check_captions(self) -> None:
        """Raise `UsageError` if no image has a caption, which recall needs. Of shards it is not
        known."""
        images = self.images
        if images is not None and not any(images.captions(row) for row in range(len(images))):
            raise UsageError(f"recall needs captions, and no image of {self.name} has any")

    def reader(
        self,
        transform: "ImageTransform",
        batch_size: int = 64,
        num_workers: int = NUM_WORKERS,
        on_error: OnError = "skip",
        need_captions: bool = False,
        cuts: "Cuts | None" = None,
    ) -> "ShardReader | ImageReader":
        """This rank's share, which yields `EvalBatch`: whole batches, which ranks take in turn.
        cuts: of `shaped` images."""
        from contrastive.distributed import rank, world_size
        from data.pipeline.reader import ShardReader
        from retrieval.evaluation.datasets.image_reader import ImageReader

        share = rank(), world_size()
        if self.images is not None:
            return ImageReader(
                self.images, transform, batch_size, num_workers, on_error, share, cuts=cuts
            )
        return ShardReader(
            self.shards,
            transform,
            batch_size=batch_size,
            num_workers=num_workers,
            need_captions=need_captions,
            need_labels=bool(self.class_names),
            caption_lines=self.captioned,
            share=share,
            on_error=on_error,
            cuts=cuts,
        )
