"""Run under the deepspeed launcher by test_evaluate_ranks.py: several sets in one launch.

deepspeed --num_accelerators N tests/evaluate_program.py JOB.json
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image

from contrastive.distributed import device, init_from_launcher, is_main, shutdown, world_size
from contrastive.model.lit import LitModel
from data.errors import exit_on_usage_error
from retrieval import ZeroShotSegmenter, evaluate_dense, load_dense
from retrieval.evaluation.datasets import load_named
from retrieval.evaluation.evaluate import evaluate
from retrieval.evaluation.report_json import report_json


def results(model: LitModel, job: dict) -> dict:
    """What the report says of every set of the job."""
    found = [
        evaluate(model, load_named(text), [48, 40], recall, batch_size=4, num_workers=0, examples=5)
        for text, recall in job["sets"].items()
    ]
    for root in job["dense"]:
        dataset = load_dense(root)
        colours = [Image.new("RGB", (240, 240), colour) for colour in dataset.class_names]
        means = model.encode_patches(colours, 40, value_path=True).mean((1, 2))
        embeds = torch.nn.functional.normalize(means, dim=-1).detach().numpy()
        segmenter = ZeroShotSegmenter(
            model, dataset.class_names, value_path=True, class_embeds=embeds
        )
        found.append(evaluate_dense(segmenter, dataset, [48, 40]))
    return {d["name"]: d for d in report_json("tiny", [], found)["datasets"]}


def main() -> None:
    init_from_launcher()
    job = json.loads(Path(sys.argv[-1]).read_text())
    with exit_on_usage_error():
        found = results(LitModel.from_pretrained(job["model"], device=device()), job)
    if is_main():
        Path(job["out"]).write_text(json.dumps({"ranks": world_size(), "results": found}))
    shutdown()


if __name__ == "__main__":
    main()
