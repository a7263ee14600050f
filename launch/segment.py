"""Masks and boxes by words, or by what was trained, at every patch size: how good, what they cost.

    deepspeed launch/segment.py --model runs/dense/model --root ADEChallengeData2016 \\
        --patch-sizes 28 14 --out report            # or python launch/segment.py ...
    python launch/segment.py ... --root runs/scenes/heldout_style --background 0.1
    python launch/segment.py --model runs/scenes/model --pictures holiday/ --out masks
    python launch/segment.py --model runs/demo/model --pictures a.jpg --class-names lemon ship ...

A decoder of launch/dense.py stands in the place of a model; it brings its classes, which are
matched to a set's by name. Heads of boxes find whatever names they are given.

ROOT holds the data as published, unpacked; nothing is downloaded. What it is, is recognised:
- ade20k: images/, annotations/, objectInfo150.txt (ADEChallengeData2016)
- voc: JPEGImages/, SegmentationClass/, ImageSets/Segmentation/ (VOCdevkit/VOC2012)
- coco: annotations/instances_*.json and images (boxes)
- coco-panoptic: annotations/panoptic_*.json with panoptic_*/ and images (masks and segments)
- coco-stuff: stuffthingmaps/ and labels.txt, and images
- masks: images/, masks/ and classnames.txt (python -m data.scenes)

Mean IoU is measured where there are masks, AP where there are boxes, PQ where there are segments.
classnames.txt and zeroshot_classification_templates.txt in ROOT replace the set's own texts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from contrastive.launch_context import take_arguments
from data.class_names import DEFAULT_TEMPLATES
from data.config import OnError
from data.dense.dense_dataset import DenseDataset
from data.dense.layouts import load_dense
from data.errors import UsageError, exit_on_usage_error
from data.files import make_folder
from data.image_headers import images_in
from retrieval.embed.config import check_sizes
from retrieval.evaluation.datasets import tell_apart
from retrieval.model_folder import check_model_folder, decoder_kind
from retrieval.regions.boxes import check_windows

if TYPE_CHECKING:
    from retrieval import TrainedDetector, TrainedSegmenter, ZeroShotSegmenter


@dataclass(frozen=True)
class Args:
    model: str
    """Folder of the model, or of a decoder: RUN/model."""
    root: tuple[str, ...] = ()
    """Folders of data sets; each gives columns of the table."""
    pictures: tuple[str, ...] = ()
    """Instead of data sets: pictures of your own, or folders of them, whose masks or boxes go to
    `out`."""
    class_names: tuple[str, ...] = ()
    """What to find in your own pictures; a decoder of masks has its own."""
    dataset: str = ""
    """ade20k, voc, coco, coco-panoptic, coco-stuff or masks, where a folder holds several."""
    split: str = ""
    """As the layout calls it: training, train2017, ... Empty: the one to evaluate on."""
    patch_sizes: tuple[int, ...] = ()
    """In pixels. Empty: all of the model's, or that a decoder was trained at; of these the finest
    for your own pictures."""
    background: float | None = None
    """Pixels whose best cosine is below are background. Not given: every pixel is of some class."""
    shorter_side: int | None = None
    """Pixels that a picture is read at, in windows of the model's image size. Not given: as many
    patches as one such window has."""
    value_path: bool = False
    """Let each patch attend to itself alone in the block that is read (MaskCLIP)."""
    windows: tuple[int, ...] = ()
    """In place of patches, read windows that overlap by half, each as a picture of its own: how
    many a side, for each size."""
    out: str = ""
    """Folder for report.json, report.md, report.txt and dense.png; for masks."""
    on_error: OnError = "skip"
    """Skip and count pictures that cannot be used, or stop at the first."""


class Segmenters:
    """What says where things are, for one set of classes or another: by words, or trained."""

    def __init__(self, args: Args) -> None:
        from contrastive.distributed import device
        from contrastive.model.lit import LitModel
        from retrieval import TrainedDetector, TrainedSegmenter

        self.args = args
        self.found: LitModel | TrainedSegmenter | TrainedDetector
        kind = decoder_kind(args.model)
        if kind == "boxes":
            # average precision judges every box
            self.found = TrainedDetector.from_pretrained(
                args.model, threshold=0.0 if args.root else 0.1, device=device()
            )
            self.tower = self.found.trained.tower
        elif kind:
            self.found = TrainedSegmenter.from_pretrained(args.model, device())
            self.tower = self.found.trained.tower
        else:
            self.found = LitModel.from_pretrained(args.model, device=device())
            self.tower = self.found.vision
        for size in args.patch_sizes:
            self.tower.check_patch_size(size)
        self.sizes = tuple(dict.fromkeys(args.patch_sizes)) or tuple(self.found.patch_sizes)

    def of(
        self, names: Sequence[str], templates: Sequence[str]
    ) -> "ZeroShotSegmenter | TrainedSegmenter | TrainedDetector":
        """For these classes; those of a decoder where there are none."""
        from retrieval import TrainedDetector, TrainedSegmenter, ZeroShotSegmenter

        if isinstance(self.found, TrainedDetector):
            return self.found.asked(names, templates) if names else self.found
        if isinstance(self.found, TrainedSegmenter):
            return TrainedSegmenter(self.found.trained, names or None)
        return ZeroShotSegmenter(
            self.found, names, templates,
            background=self.args.background, value_path=self.args.value_path,
            windows=self.args.windows,
        )  # fmt: skip


def evaluate_all(args: Args, datasets: list[DenseDataset]) -> None:
    """Measure costs and results, and print the report. If a data set fails, those finished before
    are still reported."""
    from contrastive.distributed import barrier, is_main
    from retrieval import TrainedSegmenter, evaluate_dense
    from retrieval.evaluation.costs import measure_costs
    from retrieval.evaluation.report import Report

    made = Segmenters(args)
    segmenters = [made.of(dataset.class_names, dataset.templates) for dataset in datasets]
    costs = measure_costs(made.tower, made.sizes) if is_main() else []
    barrier(patient=True)
    results = []
    try:
        for segmenter, dataset in zip(segmenters, datasets, strict=True):
            found = evaluate_dense(
                segmenter,
                dataset,
                made.sizes,
                shorter_side=args.shorter_side,
                on_error=args.on_error,
            )
            remark = ""
            if isinstance(segmenter, TrainedSegmenter):
                remark = segmenter.matched.sentence()
            elif args.windows:
                count = sum(each**2 for each in args.windows)
                remark = f"{count} windows a picture, each costs what the table says"
            results.append(replace(found, remark=remark))
    finally:
        if is_main() and results:
            Report(args.model, costs, results).tell(args.out)
    barrier()


def segment_pictures(args: Args, files: list[Path]) -> None:
    """Write masks or boxes of pictures, and say where they are."""
    from contrastive.distributed import is_main
    from retrieval.dense.own_pictures import write_found

    made = Segmenters(args)
    sizes = made.sizes if args.patch_sizes else (min(made.sizes),)
    segmenter = made.of(args.class_names, DEFAULT_TEMPLATES)
    skipped = write_found(
        segmenter, files, sizes, Path(args.out),
        shorter_side=args.shorter_side, on_error=args.on_error,
    )  # fmt: skip
    done = len(files) - sum(skipped.values())
    why = ", ".join(f"{kind} {count:,}" for kind, count in sorted(skipped.items()))
    if not done:
        raise UsageError(f"pictures: none could be used ({why})")
    if is_main():
        for size in sizes:
            print(f"{Path(args.out) / f'patch_{size}'}: {done:,} of {len(files):,} pictures")
        if skipped:
            print(f"not read: {why}")


def list_pictures(places: Sequence[str]) -> list[Path]:
    """Files, and the images of folders. Raises `UsageError` where there are none, and for two of
    one name."""
    files: list[Path] = []
    for place in map(Path, places):
        found = images_in(place) if place.is_dir() else [place] if place.is_file() else []
        if not found:
            raise UsageError(f"pictures={place}: there is no picture")
        files += found
    twice = [name for name, count in Counter(file.name for file in files).items() if count > 1]
    if twice:
        raise UsageError(f"pictures: two are called {twice[0]}, and so would their masks be")
    return files


def check_flags(args: Args) -> None:
    """Raises `UsageError` for what cannot go together, before anything is loaded."""
    check_sizes(args.patch_sizes, ())
    if bool(args.root) == bool(args.pictures):
        raise UsageError(
            "give root=FOLDER, a data set to measure on, or pictures=FOLDER of your own"
        )
    if args.background is not None and not -1 <= args.background <= 1:
        raise UsageError(f"background={args.background}: a cosine, -1 to 1")
    if args.shorter_side is not None and args.shorter_side < 1:
        raise UsageError(f"shorter_side {args.shorter_side}: at least 1")
    check_windows(args.windows)
    for name in ("shorter_side", "value_path"):
        if args.windows and getattr(args, name):
            raise UsageError(f"{name} is of patches, which windows do without")
    if args.class_names and args.root:
        raise UsageError("class_names are for pictures; a data set has its own")
    if args.pictures and not args.out:
        raise UsageError("pictures need a folder for their masks: out=masks")


def check_kind(args: Args) -> None:
    """Raises `UsageError` for what a decoder does not take, and a model of texts needs."""
    kind = decoder_kind(args.model)
    if kind:
        given = (args.background is not None, args.value_path, args.windows)
        for name, value in zip(("background", "value_path", "windows"), given, strict=True):
            if value:
                raise UsageError(f"{name} is of cosines with words: a decoder was trained without")
        if args.class_names and kind != "boxes":
            raise UsageError("class_names: a decoder has its own")
    elif args.pictures and not args.class_names:
        raise UsageError("class_names: say what to find in the pictures, such as lemon ship")


def main() -> None:
    args = tyro.cli(Args, args=take_arguments(), description=__doc__)
    with exit_on_usage_error(Args):
        check_flags(args)
        if args.out:
            make_folder(args.out)
        found = [load_dense(root, args.dataset, args.split) for root in args.root]
        datasets = tell_apart(found, args.root)
        files = list_pictures(args.pictures)
        check_model_folder(args.model)
        check_kind(args)
        from contrastive.distributed import launched

        with launched():
            if datasets:
                evaluate_all(args, datasets)
            else:
                segment_pictures(args, files)


if __name__ == "__main__":
    main()
