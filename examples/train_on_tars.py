"""Train a text tower on your own tars, as a call from Python.

    python examples/train_on_tars.py 'photos/{0000..0009}.tar' --steps 2000
    deepspeed examples/train_on_tars.py 'photos/{0000..0009}.tar' --steps 2000     # all GPUs

The tars hold KEY.jpg and KEY.txt. Begins with the recipe `demo` and changes what differs: shards,
towers, sizes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from contrastive import LitModel, distributed
from contrastive.recipes import demo
from contrastive.train.loop import train


def main(arguments: Sequence[str] | None = None) -> None:
    distributed.init_from_launcher()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--image-tower", default="dinov2s-flexi")
    parser.add_argument("--text-tower", default="minilm")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", default="runs")
    args = parser.parse_args(arguments)

    recipe = demo()
    cfg = replace(
        recipe,
        name="mine",
        out=args.out,
        data=replace(recipe.data, shards=tuple(args.shards), features=f"{args.out}/features"),
        vision=replace(recipe.vision, tower=args.image_tower, patch_sizes=()),  # all it offers
        text=replace(recipe.text, tower=args.text_tower, context_length=32),
        optim=replace(recipe.optim, warmup_steps=args.steps // 20),
        global_batch_size=args.batch,
        steps=args.steps,
        eval_every=args.steps,
    )
    folder = train(cfg, callbacks=[log_temperature])
    if distributed.is_main():
        model = LitModel.from_pretrained(folder / "model")
        print(f"{folder / 'model'} reads images at patch sizes {model.patch_sizes}")
    distributed.shutdown()


def log_temperature(step: int, model: LitModel) -> dict[str, float]:
    """A callback: what it returns goes into metrics.jsonl, every `eval_every` steps."""
    return {"logit_scale": model.text.scale().item()}


if __name__ == "__main__":
    main()
