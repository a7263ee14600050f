"""Masks and boxes by words at every patch size: how good, and what they cost.

    deepspeed launch/segment.py --model runs/dense/model --root ADEChallengeData2016 \\
        --patch-sizes 28 14 --out report            # or python launch/segment.py ...
    python launch/segment.py ... --root runs/scenes/heldout_style --background 0.1

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

from dataclasses import dataclass

import tyro

from contrastive.launch_context import take_arguments
from data.config import OnError
from data.dense.dense_dataset import DenseDataset
from data.dense.layouts import load_dense
from data.errors import UsageError, exit_on_usage_error
from data.files import make_folder
from retrieval.embed.config import check_sizes
from retrieval.evaluation.datasets import tell_apart
from retrieval.model_folder import check_model_folder


@dataclass(frozen=True)
class Args:
    model: str
    """Folder of the model."""
    root: tuple[str, ...]
    """Folders of data sets; each gives columns of the table."""
    dataset: str = ""
    """ade20k, voc, coco, coco-panoptic, coco-stuff or masks, where a folder holds several."""
    split: str = ""
    """As the layout calls it: training, train2017, ... Empty: the one to evaluate on."""
    patch_sizes: tuple[int, ...] = ()
    """In pixels. Empty: all of the model's."""
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
    """Folder for report.json, report.md, report.txt and dense.png."""
    on_error: OnError = "skip"
    """Skip and count pictures that cannot be used, or stop at the first."""


def evaluate_all(args: Args, datasets: list[DenseDataset]) -> None:
    """Measure costs and results, and print the report. If a data set fails, those finished before
    are still reported."""
    from contrastive.distributed import barrier, device, is_main
    from contrastive.model.lit import LitModel
    from retrieval import ZeroShotSegmenter, evaluate_dense
    from retrieval.embed.encode import check_encodes
    from retrieval.evaluation.costs import measure_costs
    from retrieval.evaluation.report import Report

    model = LitModel.from_pretrained(args.model, device=device())
    check_encodes(model, *args.patch_sizes)
    sizes = tuple(dict.fromkeys(args.patch_sizes)) or tuple(model.patch_sizes)
    segmenters = [
        ZeroShotSegmenter(
            model, dataset.class_names, dataset.templates,
            background=args.background, value_path=args.value_path,
            windows=args.windows,
        )
        for dataset in datasets
    ]  # fmt: skip
    costs = measure_costs(model, sizes) if is_main() else []
    barrier(patient=True)
    results = []
    try:
        for segmenter, dataset in zip(segmenters, datasets, strict=True):
            results.append(
                evaluate_dense(
                    segmenter,
                    dataset,
                    sizes,
                    shorter_side=args.shorter_side,
                    on_error=args.on_error,
                )
            )
    finally:
        if is_main() and results:
            Report(args.model, costs, results).tell(args.out)
    barrier()


def main() -> None:
    args = tyro.cli(Args, args=take_arguments(), description=__doc__)
    with exit_on_usage_error(Args):
        check_sizes(args.patch_sizes, ())
        if args.background is not None and not -1 <= args.background <= 1:
            raise UsageError(f"background={args.background}: a cosine, -1 to 1")
        if args.shorter_side is not None and args.shorter_side < 1:
            raise UsageError(f"shorter_side {args.shorter_side}: at least 1")
        if args.out:
            make_folder(args.out)
        found = [load_dense(root, args.dataset, args.split) for root in args.root]
        datasets = tell_apart(found, args.root)
        check_model_folder(args.model)
        from contrastive.distributed import launched

        with launched():
            evaluate_all(args, datasets)


if __name__ == "__main__":
    main()
