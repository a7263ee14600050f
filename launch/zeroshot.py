"""Zero-shot classification and retrieval at every patch size: how good, and what it costs.

    deepspeed launch/zeroshot.py --model runs/demo/model --dataset imagenet --root ILSVRC2012 \\
        --patch-sizes 56 28 --out report            # or python launch/zeroshot.py ...
    python launch/zeroshot.py ... --max-tokens 16 36 64 100 --fit aspect

ROOT holds the data as published, unpacked; nothing is downloaded.

Data sets:
- shards: CLIP_benchmark's layout (classnames.txt, zeroshot_classification_templates.txt, *.tar or
test/*.tar; dataset_type.txt for retrieval)
- folder: ROOT/<class name>/*.jpg
- imagenet: val/<wnid>/, or the flat files with the development kit
- imagenet-real: imagenet's images, with real.json beside them
- imagenet-v2, imagenet-a, imagenet-r, imagenet-sketch, objectnet: their archives
- flickr30k, coco: dataset_NAME.json (Karpathy's splits) and the images
- cifar10, cifar100, pets, flowers102, food101, caltech101, dtd, ...: as torchvision reads them
- torchvision:CLASS: any other data set of torchvision
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from contrastive.launch_context import take_arguments
from data.config import NUM_WORKERS, Fit, OnError
from data.errors import UsageError, exit_on_usage_error
from data.files import make_folder
from retrieval.embed.config import check_batches, check_sizes
from retrieval.evaluation.config import MAX_EXAMPLES
from retrieval.evaluation.datasets import EvalDataset, load_dataset, tell_apart
from retrieval.model_folder import check_model_folder

if TYPE_CHECKING:
    from contrastive.model.lit import LitModel
    from retrieval.evaluation.results import DatasetResult


@dataclass(frozen=True)
class Args:
    model: str
    """open_clip:ARCHITECTURE@TAG or @FILE, transformers:FOLDER, or a model's folder."""
    root: tuple[str, ...]
    """Folders of the data set; each gives a column of the table."""
    dataset: str = "shards"
    """shards, folder, imagenet, objectnet, coco, cifar10, torchvision:CLASS, ...: see above.
    An unknown name lists all."""
    patch_sizes: tuple[int, ...] = ()
    """In pixels. Empty: all of the model's."""
    max_tokens: tuple[int, ...] = ()
    """Instead of patch sizes: at most so many patches an image, any number."""
    fit: Fit | None = None
    """crop cuts a square from the middle of an image, squash makes one of the whole, aspect keeps
    its shape. Not given: the model's own."""
    recall: bool = False
    """Also measure recall@k between images and captions; retrieval sets always do.
    Images without captions count for the accuracy only."""
    calibrate: int = 0
    """So many images, at most 500 and half of all, are drawn for a temperature per patch size, by
    which the model's probabilities become as often right as they say. Of the first --root they are
    kept in the model's folder, for the service's shares."""
    out: str = ""
    """Folder for report.json, report.md, report.txt and accuracy.png."""
    batch_size: int = 64
    """Images per forward, one rank."""
    num_workers: int = NUM_WORKERS
    """Loader processes per rank."""
    on_error: OnError = "skip"
    """Skip and count unreadable images, or stop at the first."""


def open_datasets(args: Args) -> list[EvalDataset]:
    """The data set in each folder, under names that differ. Raises `UsageError`."""
    several = len(args.root) > 1
    datasets = [
        load_dataset(args.dataset, root, Path(root).resolve().name if several else "")
        for root in args.root
    ]
    for dataset in datasets if args.recall else ():
        dataset.check_captions()
    return tell_apart(datasets, args.root)


def evaluate_all(args: Args, datasets: list[EvalDataset]) -> None:
    """Measure costs and results, and print the report. If a data set fails, those finished before
    are still reported."""
    from contrastive.distributed import barrier, device, is_main
    from contrastive.model.lit import LitModel
    from contrastive.model.with_fit import with_fit
    from retrieval.embed.encode import check_details
    from retrieval.evaluation.costs import measure_costs
    from retrieval.evaluation.evaluate import evaluate
    from retrieval.evaluation.report import Report
    from retrieval.evaluation.results import DatasetResult

    model = with_fit(LitModel.from_pretrained(args.model, device=device()), args.fit)
    sizes = check_details(model, args.patch_sizes, args.max_tokens)
    costs = measure_costs(model, sizes) if is_main() else []
    barrier(patient=True)
    how = (sizes, args.recall, args.batch_size, args.num_workers, args.on_error, args.calibrate)
    results: list[DatasetResult] = []
    try:
        for dataset in datasets:
            results.append(evaluate(model, dataset, *how))
    finally:
        if is_main() and results:
            Report(args.model, costs, results).tell(args.out)
            if args.calibrate:
                keep_temperatures(args.model, model, results[0])
    barrier()


def keep_temperatures(folder: str, model: "LitModel", result: "DatasetResult") -> None:
    """Write a model's temperatures beside it, and say so."""
    from retrieval.evaluation.calibration_error import write_temperatures

    errors = result.calibration.items()
    found = {size: error.temperature for size, error in errors if error.temperature}
    if not found or not Path(folder).is_dir():
        why = "is no folder" if found else "has too few labelled images to fit them on"
        where = folder if found else result.name
        print(f"no temperatures are kept: {where} {why}", file=sys.stderr)
        return
    fingerprints = (model.image_fingerprint, model.text_fingerprint)
    try:
        print(write_temperatures(Path(folder), fingerprints, found, result.name))
    except OSError as error:
        print(f"no temperatures are kept: {folder}: {error.strerror}", file=sys.stderr)


def main() -> None:
    args = tyro.cli(Args, args=take_arguments(), description=__doc__)
    with exit_on_usage_error(Args):
        check_batches(args.batch_size, args.num_workers, least_size=1)
        check_sizes(args.patch_sizes, args.max_tokens)
        if not 0 <= args.calibrate <= MAX_EXAMPLES:
            raise UsageError(f"--calibrate {args.calibrate}: allowed are 0 to {MAX_EXAMPLES}")
        if args.out:
            make_folder(args.out)
        datasets = open_datasets(args)
        check_model_folder(args.model)
        from contrastive.distributed import launched

        with launched():
            evaluate_all(args, datasets)


if __name__ == "__main__":
    main()
