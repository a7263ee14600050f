"""Train a decoder that says what each pixel is, on the patches of a locked image tower.

deepspeed launch/dense.py [RECIPE] [--flags]      # recipes: scenes (the default)
deepspeed launch/dense.py --resume runs/NAME      # go on from the newest checkpoint
python launch/segment.py --model runs/NAME/model --pictures holiday/ --out masks
"""

from typing import TYPE_CHECKING

from contrastive.cli import parse_run
from contrastive.dense.config import DenseConfig
from contrastive.launch_context import take_arguments
from contrastive.recipes import DENSE_RECIPES, default_scenes
from contrastive.vision.config import check_tower_spec
from data.errors import UsageError, exit_on_usage_error

if TYPE_CHECKING:
    from contrastive.dense.decoder_folder import TrainedDecoder
    from contrastive.dense.loop import Callback
    from data.dense.dense_dataset import DenseDataset


def open_named(text: str, split: str = "") -> "DenseDataset":
    """LAYOUT:FOLDER, or a folder whose layout is recognised."""
    from data.dense.layouts import LAYOUTS, load_dense

    kind, _, root = text.partition(":")
    if root and kind in LAYOUTS:
        return load_dense(root, kind, split)
    return load_dense(text, "", split)


def evaluators(cfg: DenseConfig, trained_on: "DenseDataset") -> "list[Callback]":
    """An evaluation of each set of `eval_data`, on all ranks, at `eval_patch_sizes`.

    Raises `UsageError` for sets of other classes.
    """
    from retrieval import TrainedSegmenter, evaluate_dense
    from retrieval.evaluation.datasets import tell_apart

    def evaluator(dataset: "DenseDataset") -> "Callback":
        def run(step: int, trained: "TrainedDecoder") -> dict[str, float]:
            sizes = cfg.eval_patch_sizes or (max(trained.patch_sizes),)
            found = evaluate_dense(TrainedSegmenter(trained), dataset, sizes).dense or {}
            return {
                f"{dataset.name}/p{size}/miou": scores.miou
                for size, scores in found.items()
                if scores.miou is not None
            }

        return run

    datasets = [open_named(text) for text in cfg.eval_data]
    for text, dataset in zip(cfg.eval_data, datasets, strict=True):
        if list(dataset.class_names) != list(trained_on.class_names):
            raise UsageError(f"eval_data {text}: its classes are not those of data.pictures")
    return [evaluator(dataset) for dataset in tell_apart(datasets, cfg.eval_data)]


def main() -> None:
    with exit_on_usage_error(DenseConfig, "resume"):
        what = "Train a decoder that says what each pixel is, on a locked image tower's patches."
        cfg, resume = parse_run(take_arguments(), DENSE_RECIPES, "scenes", "launch/dense.py", what)
        check_tower_spec(cfg.vision.tower)
        scenes = cfg.data.pictures == DENSE_RECIPES["scenes"]().data.pictures  # built if missing
        if not cfg.data.pictures:
            raise UsageError("data.pictures: name the folder of pictures with masks to train on")

        from contrastive import distributed
        from contrastive.dense.loop import train_decoder

        with distributed.launched():
            if scenes and distributed.is_main():
                from data.scenes.build import build_scenes

                build_scenes(default_scenes(), count=300, num_classes=120, kinds=True)
            distributed.barrier(patient=True)
            dataset = open_named(cfg.data.pictures, cfg.data.split)
            folder = train_decoder(cfg, dataset, evaluators(cfg, dataset), resume=resume)
            if distributed.is_main():
                print(f"decoder: {folder / 'model'}; python launch/segment.py uses it as a --model")


if __name__ == "__main__":
    main()
