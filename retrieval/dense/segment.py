"""Zero-shot segmentation: which class each pixel is of, by the similarity of its patch to names."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from contrastive.model.lit import LitModel
from contrastive.vision.grids import choose_grid
from contrastive.vision.patch_features import check_has_patches
from contrastive.vision.tower import VisionTower
from data.class_names import DEFAULT_TEMPLATES
from data.config import MAX_PIXELS
from data.dense.picture import BACKGROUND, MOST_CLASSES
from data.errors import UsageError
from data.given import Images, as_rgb, is_normalised, list_images
from retrieval.dense.map_of_windows import map_of_windows
from retrieval.dense.upsample import upsampled
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.regions.boxes import check_windows

MAX_WINDOWS = 32  # of one forward
MOST_PATCHES = 65_536  # of one picture, in all windows


class Windows(NamedTuple):
    """A picture's pixels, and the corners (in patches) of the windows that they are read in."""

    pixels: Float[Tensor, "3 h w"]
    corners: Sequence[tuple[int, int]]
    size: tuple[int, int]
    """Rows and columns of a window, in patches."""

    def by_forward(
        self, patch_size: int
    ) -> Iterator[tuple[Sequence[tuple[int, int]], Float[Tensor, "n 3 h w"]]]:
        """Corners and pixels of those that share a forward."""
        height, width = (length * patch_size for length in self.size)
        for start in range(0, len(self.corners), MAX_WINDOWS):
            corners = self.corners[start : start + MAX_WINDOWS]
            places = [(row * patch_size, column * patch_size) for row, column in corners]
            cut = [self.pixels[:, y : y + height, x : x + width] for y, x in places]
            yield corners, torch.stack(cut)


class ZeroShotSegmenter:
    """Says of each pixel which of several classes it is of, at any patch size.

    class_names, templates, class_embeds: as `ZeroShotClassifier` takes them; at most 254 names.
    background: the least similarity (a cosine) of a pixel to the class it is most like; below, it
    is background. None: every pixel is of some class.
    value_path: as `LitModel.encode_patches` takes it.
    windows: in place of patches, read windows that overlap by half, each as a picture of its own
    (`retrieval.dense.map_of_windows`): how many a side, for each size; (3, 5) reads 34. A model
    needs no tokens of patches then.
    Raises `UsageError` as `ZeroShotClassifier`, for a model that has no tokens of patches, and for
    more than 256 windows.
    """

    def __init__(
        self,
        model: LitModel,
        class_names: Sequence[str],
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        *,
        background: float | None = None,
        value_path: bool = False,
        windows: Sequence[int] = (),
        class_embeds: Float[np.ndarray, "c d"] | None = None,
    ) -> None:
        if windows:
            check_windows(windows)
            if value_path:
                raise UsageError("value_path is of patches, which windows do without")
        else:
            check_has_patches(model.vision)
        if background is not None and not -1 <= background <= 1:
            raise UsageError(f"background {background}: a cosine, -1 to 1")
        if not isinstance(class_names, str) and len(class_names) > MOST_CLASSES:
            raise UsageError(f"{len(class_names):,} class names: at most {MOST_CLASSES}")
        classifier = ZeroShotClassifier(model, class_names, templates, class_embeds)
        self.model, self.class_names = model, classifier.class_names
        self.background, self.value_path, self.windows = background, value_path, tuple(windows)
        self.class_embeds = torch.from_numpy(classifier.class_embeds).to(model.device)

    def predict(
        self, images: Images, patch_size: int | None = None, *, shorter_side: int | None = None
    ) -> list[UInt8[np.ndarray, "h w"]]:
        """A mask of each picture, at its own resolution: 0 is background, k the k-th class.

        images, patch_size, shorter_side: as `similarities` takes them.
        """
        return [
            self.labels_and_scores(image, patch_size, shorter_side)[0]
            for image in opened_images(images)
        ]

    def similarities(
        self, images: Images, patch_size: int | None = None, *, shorter_side: int | None = None
    ) -> list[Float[np.ndarray, "r c k"]]:
        """The cosine of each patch and each class, in rows and columns; a map of each picture.

        images: as `LitModel.encode_image` takes them, one or many; nothing of a picture is cut
        away. patch_size: None takes the model's finest. shorter_side: pixels that it is resized to;
        None, as many patches as a square of the model's image size has. Larger than that size, the
        picture is read in windows of it that overlap by half, and each patch takes the mean of its
        windows.
        Raises `UsageError` for a picture that cannot be read, and as `LitModel.encode_patches`.
        """
        return [self._map(i, patch_size, shorter_side) for i in opened_images(images)]

    def labels_and_scores(
        self,
        picture: Image.Image | Tensor,
        patch_size: int | None,
        shorter_side: int | None = None,
    ) -> tuple[UInt8[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
        """The mask that `predict` gives, and the cosine of each pixel and the class it is most
        like."""
        return self.judged(self._map(picture, patch_size, shorter_side), shape_of(picture))

    def judged(
        self, similarities: Float[np.ndarray, "r c k"], shape: tuple[int, int]
    ) -> tuple[UInt8[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
        """`labels_and_scores` of a map, for a picture of `shape` = (height, width)."""
        labels, most = self.best(similarities, shape)
        if self.background is not None:
            labels[most < self.background] = BACKGROUND
        return labels, most

    def best(
        self, similarities: Float[np.ndarray, "r c k"], shape: tuple[int, int]
    ) -> tuple[UInt8[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
        """The label of the class that each pixel is most like, and their cosine."""
        labels, most = np.empty(shape, np.uint8), np.empty(shape, np.float32)
        for rows, values in upsampled(similarities, shape):
            scores, classes = values.max(0)
            labels[rows], most[rows] = classes + 1, scores
        return labels, most

    def _map(
        self, image: Image.Image | Tensor, patch_size: int | None, shorter_side: int | None
    ) -> Float[np.ndarray, "r c k"]:
        def cosines(pixels: Tensor, size: int) -> Tensor:
            return self.model.encode_patches(pixels, size, self.value_path) @ self.class_embeds.T

        tower = self.model.vision
        size = tower.patch_sizes[-1] if patch_size is None else patch_size
        if self.windows:
            if shorter_side is not None:
                raise UsageError("shorter_side is of patches; windows are read as they are")
            return map_of_windows(self.model, self.class_embeds, image, size, self.windows)
        return map_by_windows(tower, cosines, image, size, shorter_side)


@torch.no_grad()
def map_by_windows(
    tower: VisionTower,
    of_pixels: Callable[[Float[Tensor, "n 3 h w"], int], Float[Tensor, "n r c k"]],
    image: Image.Image | Tensor,
    patch_size: int,
    shorter_side: int | None,
) -> Float[np.ndarray, "r c k"]:
    """What `of_pixels(pixels, patch_size)` gives of a picture's patches: the mean of their windows.

    Raises as `ZeroShotSegmenter.similarities`.
    """
    windows = windows_of(tower, image, patch_size, shorter_side)
    (rows, columns), pixels, size = windows.size, windows.pixels, patch_size
    sums: Tensor | None = None
    device = next(tower.parameters()).device
    count = torch.zeros(pixels.shape[1] // size, pixels.shape[2] // size, 1, device=device)
    for corners, cut in windows.by_forward(size):
        maps = of_pixels(cut, size)
        if sums is None:
            sums = maps.new_zeros(*count.shape[:2], maps.shape[-1])
        for (row, column), found in zip(corners, maps, strict=True):
            sums[row : row + rows, column : column + columns] += found
            count[row : row + rows, column : column + columns] += 1
    assert sums is not None
    return (sums / count).cpu().numpy()


def windows_of(
    tower: VisionTower, image: Image.Image | Tensor, patch_size: int, shorter_side: int | None
) -> Windows:
    """In which a picture is read; one where `shorter_side` is None. Raises as
    `ZeroShotSegmenter.similarities`."""
    shape = shape_of(image)
    if isinstance(image, Tensor):
        if shorter_side is not None:
            raise UsageError("pixels that are already normalised are read as large as they are")
        tower.check_patch_size(patch_size, shape)
        return Windows(image, [(0, 0)], (shape[0] // patch_size, shape[1] // patch_size))
    tower.check_patch_size(patch_size)
    side = tower.image_size // patch_size
    if shorter_side is None:
        grid = choose_grid(shape, side**2, tower.image_size, "aspect", patch_size)
        rows, columns = size = (grid.rows, grid.columns)
    else:
        if shorter_side < patch_size:
            raise UsageError(f"shorter_side {shorter_side}: at least a patch, {patch_size} px")
        scale = shorter_side / min(shape) / patch_size
        rows, columns = (max(1, round(length * scale)) for length in shape)
        size = (min(rows, side), min(columns, side))
    if rows * columns > MOST_PATCHES:
        raise UsageError(f"{rows} x {columns} patches: at most {MOST_PATCHES:,} of a picture")
    if rows * columns * patch_size**2 > MAX_PIXELS:
        size_read = f"{rows * patch_size:,} x {columns * patch_size:,}"
        raise UsageError(f"{size_read} pixels: at most {MAX_PIXELS:,} of a picture are read")
    whole = replace(tower.transform, fit="aspect")
    pixels = whole.normalise(whole.at(image, rows * patch_size, columns * patch_size))
    down, across = _starts(rows, size[0]), _starts(columns, size[1])
    return Windows(pixels, [(row, column) for row in down for column in across], size)


def whole_pixels(
    tower: VisionTower, image: Image.Image | Tensor, patch_size: int
) -> Float[Tensor, "3 h w"]:
    """Of all of a picture, as many patches as a square of the tower's image size has."""
    return windows_of(tower, image, patch_size, None).pixels


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin that overlap by half or more, the first at 0, the last at the end."""
    count = 1 + -(-(length - window) // max(1, window // 2))
    return [i * (length - window) // max(1, count - 1) for i in range(count)]


def opened_images(images: Images) -> Iterator[Image.Image | Tensor]:
    """Normalised pixels as they are, anything else as a picture. Raises as `data.given.as_rgb`."""
    return (i if is_normalised(i) else as_rgb(i) for i in list_images(images))


def shape_of(image: Image.Image | Tensor) -> tuple[int, int]:
    """Height and width, pixels."""
    if isinstance(image, Tensor):
        return image.shape[1], image.shape[2]
    return image.height, image.width
