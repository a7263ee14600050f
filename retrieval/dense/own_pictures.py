"""Masks or boxes of a user's own pictures, as files."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from contrastive.distributed import barrier, gather_objects, is_main, own_share
from data.class_names import CLASS_NAMES_FILE
from data.config import OnError
from data.dense.mask_files import read_picture
from data.files import write_atomically, write_json, write_text_atomically
from data.problems import Problem, attempt, skip_or_raise
from data.progress import Progress
from retrieval.dense.average_precision import ScoredBox
from retrieval.dense.evaluate_dense import Detector, Segmenter
from retrieval.dense.painted import framed, mask_image, painted


def write_found(
    segmenter: Segmenter | Detector,
    files: Sequence[Path],
    patch_sizes: Sequence[int],
    out: Path,
    *,
    shorter_side: int | None = None,
    on_error: OnError = "skip",
) -> dict[str, int]:
    """Write OUT/classnames.txt, and for each patch size and picture OUT/patch_14/NAME.jpg, the
    picture under its mask's colours with the names below, and OUT/patch_14/masks/NAME.png, the mask
    itself: 8 bits with a palette, 0 background, k the k-th name. Of a detector NAME.jpg has frames,
    and OUT/patch_14/boxes/NAME.json lists them, best first: name, box (left, top, width, height,
    pixels) and score. Of a.jpg and a.png the NAMEs have their suffix.

    Ranks take pictures in turn. Returns how many could not be read, by the reason; with on_error
    "raise" the first is raised as a `DataError`.
    """
    if is_main():
        lines = "".join(f"{name}\n" for name in segmenter.class_names)
        write_text_atomically(out / CLASS_NAMES_FILE, lines)
    skipped: dict[str, int] = {}
    stems = Counter(file.stem for file in files)
    own = own_share(files)
    for file in Progress(own, "pictures", unit="img", disable=not is_main()):
        picture = attempt(str(file), partial(read_picture, file))
        if isinstance(picture, Problem):
            skip_or_raise(picture, "", on_error, skipped)
            continue
        for size in patch_sizes:
            folder = out / f"patch_{size}"
            name = file.stem if stems[file.stem] == 1 else file.name
            if isinstance(segmenter, Detector):
                boxes = segmenter.boxes_in(picture, size, shorter_side)
                shown = framed(picture, boxes, segmenter.class_names)
                write_json(folder / "boxes" / f"{name}.json", listed(boxes, segmenter.class_names))
            else:
                mask, _ = segmenter.labels_and_scores(picture, size, shorter_side)
                _save(mask_image(mask), "PNG", folder / "masks" / f"{name}.png")
                shown = painted(picture, mask, segmenter.class_names)
            _save(shown, "JPEG", folder / f"{name}.jpg")
    barrier(patient=True)
    return dict(sum(map(Counter, gather_objects(skipped)), Counter[str]()))


def listed(boxes: Sequence[ScoredBox], class_names: Sequence[str]) -> dict[str, Any]:
    """Boxes as a JSON file has them."""
    found = [{"name": class_names[b.label - 1], "box": b.box, "score": b.score} for b in boxes]
    return {"boxes": found}


def _save(image: Image.Image, kind: str, file: Path) -> None:
    encoded = BytesIO()
    image.save(encoded, kind, quality=90)
    write_atomically(file, lambda opened: opened.write(encoded.getbuffer()))
