"""Train a decoder that says what each pixel is, or heads that find boxes by words, on the patches
of a locked image tower.

deepspeed launch/dense.py [RECIPE] [--flags]      # recipes: scenes (the default), boxes
deepspeed launch/dense.py --resume runs/NAME      # go on from the newest checkpoint
python launch/segment.py --model runs/NAME/model --pictures holiday/ --out masks
"""

from typing import TYPE_CHECKING

from contrastive.cli import parse_run
from contrastive.dense.config import DenseConfig
from contrastive.launch_context import take_arguments
from contrastive.recipes import DENSE_RECIPES, default_box_scenes, default_scenes
from contrastive.vision.config import check_tower_spec
from data.errors import UsageError, exit_on_usage_error
from retrieval.model_folder import check_model_folder

if TYPE_CHECKING:
    from contrastive.dense.decoder_folder import ClassTexts, TrainedDecoder
    from contrastive.dense.loop import Callback
    from contrastive.model.lit import LitModel
    from data.dense.dense_dataset import DenseDataset


def open_named(text: str, split: str = "") -> "DenseDataset":
    """LAYOUT:FOLDER, or a folder whose layout is recognised."""
    from data.dense.layouts import LAYOUTS, load_dense

    kind, _, root = text.partition(":")
    if root and kind in LAYOUTS:
        return load_dense(root, kind, split)
    return load_dense(text, "", split)


def build_default(pictures: str) -> None:
    """The scenes that a recipe trains on, where they are missing."""
    from data.scenes.build import build_scenes

    if pictures == DENSE_RECIPES["scenes"]().data.pictures:
        build_scenes(default_scenes(), count=300, num_classes=120, kinds=True)
    if pictures == DENSE_RECIPES["boxes"]().data.pictures:
        build_scenes(default_box_scenes(), count=600, boxes=True)


def load_texts(model: str) -> "LitModel":
    """On this rank's device."""
    from contrastive import LitModel, distributed

    return LitModel.from_pretrained(model, device=distributed.device())


def texts_of(model: "LitModel", dataset: "DenseDataset") -> "ClassTexts":
    """The vectors of the names of what boxes show."""
    from contrastive.dense.decoder_folder import ClassTexts
    from retrieval.evaluation.classify import embed_classes

    embeds = embed_classes(model, dataset.class_names, dataset.templates)
    return ClassTexts(embeds, model.text_fingerprint, model.image_affine())


def evaluators(
    cfg: DenseConfig, trained_on: "DenseDataset", model: "LitModel | None"
) -> "list[Callback]":
    """An evaluation of each set of `eval_data`, on all ranks, at `eval_patch_sizes`.

    model: whose texts say what to find. Raises `UsageError` for sets of other classes, where none
    can be asked for.
    """
    from retrieval import TrainedDetector, TrainedSegmenter, evaluate_dense
    from retrieval.evaluation.datasets import tell_apart

    def evaluator(dataset: "DenseDataset") -> "Callback":
        embeds = texts_of(model, dataset).embeds if model else None

        def run(step: int, trained: "TrainedDecoder") -> dict[str, float]:
            sizes = cfg.eval_patch_sizes or (max(trained.patch_sizes),)
            judged: TrainedSegmenter | TrainedDetector
            if model:
                names, templates = dataset.class_names, dataset.templates
                judged = TrainedDetector(
                    trained, model, names, templates, threshold=0.0, class_embeds=embeds
                )
            else:
                judged = TrainedSegmenter(trained)
            found = evaluate_dense(judged, dataset, sizes).dense or {}
            return {
                f"{dataset.name}/p{size}/{what}": value
                for size, scores in found.items()
                for what, value in (("miou", scores.miou), ("ap50", scores.ap50))
                if value is not None and (what == "ap50") == bool(model)
            }

        return run

    datasets = [open_named(text) for text in cfg.eval_data]
    for text, dataset in zip(cfg.eval_data, datasets, strict=True):
        if not model and list(dataset.class_names) != list(trained_on.class_names):
            raise UsageError(f"eval_data {text}: its classes are not those of data.pictures")
    return [evaluator(dataset) for dataset in tell_apart(datasets, cfg.eval_data)]


def main() -> None:
    with exit_on_usage_error(DenseConfig, "resume"):
        what = "Train a decoder that says what each pixel is, on a locked image tower's patches."
        cfg, resume = parse_run(take_arguments(), DENSE_RECIPES, "scenes", "launch/dense.py", what)
        boxes = cfg.decoder.kind == "boxes"
        if boxes:
            check_model_folder(cfg.vision.tower)
        check_tower_spec(cfg.vision.tower)
        if not cfg.data.pictures:
            raise UsageError("data.pictures: name the folder of pictures to train on")

        from contrastive import distributed
        from contrastive.dense.loop import train_decoder

        with distributed.launched():
            if distributed.is_main():
                build_default(cfg.data.pictures)
            distributed.barrier(patient=True)
            dataset = open_named(cfg.data.pictures, cfg.data.split)
            model = load_texts(cfg.vision.tower) if boxes else None
            texts = texts_of(model, dataset) if model else None
            callbacks = evaluators(cfg, dataset, model)
            folder = train_decoder(cfg, dataset, callbacks, texts=texts, resume=resume)
            if distributed.is_main():
                print(f"decoder: {folder / 'model'}; python launch/segment.py uses it as a --model")


if __name__ == "__main__":
    main()
