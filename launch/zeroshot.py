"""Zero-shot classification at every patch size: accuracy, and what it costs.

    deepspeed launch/zeroshot.py --model runs/demo/model --dataset imagenet --root ILSVRC2012 \
        --patch-sizes 56 28 --out report            # or python launch/zeroshot.py ...

Layouts: shards (classnames.txt, zeroshot_classification_templates.txt, *.tar with .cls), folder
(ROOT/<class name>/*.jpg), imagenet (ROOT/val/<wnid>/*.JPEG). Nothing is downloaded.
"""

from dataclasses import dataclass

import tyro

from contrastive.distributed import barrier, device, init_from_launcher, is_main, shutdown
from contrastive.lit import LitModel
from data.errors import exit_on_usage_error
from data.samples import OnError
from retrieval.datasets import DatasetKind, load_dataset
from retrieval.embed import check_patch_sizes
from retrieval.evaluate import evaluate
from retrieval.report import Report, measure_costs


@dataclass(frozen=True)
class Args:
    model: str
    """Folder of the model."""
    root: tuple[str, ...]
    """Folder of the data set; several give several columns of one table."""
    dataset: DatasetKind = "shards"
    """How the data set lies on disk."""
    patch_sizes: tuple[int, ...] = ()
    """Pixels; all of the model's when not given."""
    recall: bool = False
    """Also recall@k between images and captions (shards with captions)."""
    out: str = ""
    """Folder for report.json, report.md, report.txt and accuracy.png."""
    batch_size: int = 64
    """Images per forward, one rank."""
    num_workers: int = 2
    """Loader processes per rank."""
    on_error: OnError = "skip"
    """Skip and count images that cannot be read, or stop at the first."""


def main() -> None:
    init_from_launcher()
    args = tyro.cli(Args, description=__doc__)
    with exit_on_usage_error():
        datasets = [load_dataset(args.dataset, root) for root in args.root]
        model = LitModel.from_pretrained(args.model, device=device())
        sizes = check_patch_sizes(model, args.patch_sizes)
        results = [
            evaluate(
                model, dataset, sizes, args.recall, args.batch_size, args.num_workers, args.on_error
            )
            for dataset in datasets
        ]
        barrier()
        if is_main():
            report = Report(args.model, measure_costs(model, sizes), results)
            print(report.text())
            for file in report.save(args.out) if args.out else []:
                print(file)
        barrier()
    shutdown()


if __name__ == "__main__":
    main()
