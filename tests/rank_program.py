"""Run under the deepspeed launcher by test_training.py: many cases in one launch.

    deepspeed --num_accelerators N tests/rank_program.py JOB.json

The job names the cases; rank 0 writes what each gives to safetensors files beside the job.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from gradients import WORDS, add_spread_lora, step_gradients
from safetensors.torch import save_file

from contrastive import distributed
from contrastive.model.config import LossConfig
from contrastive.model.lit import LitModel
from contrastive.model.text_side import TextSide
from contrastive.run.config import ZeroConfig
from contrastive.run.config_file import from_dict
from contrastive.run.zero import whole_parameters
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.load import load_vision_tower
from data.batch import Batch
from data.captions import Tokenizer
from data.pipeline.captioned import CaptionedPipeline
from data.token_ids import TokenIds

GLOBAL_BATCH = 16


def global_batch(
    bad: bool, tokenizer: Tokenizer, several: bool = False
) -> tuple[Batch, torch.Tensor]:
    """The same 16 samples for any number of ranks; with `bad`, 5 unreadable ones among them; with
    `several`, one to three captions each."""
    generator = torch.Generator().manual_seed(3)
    captions = [
        " ".join(
            WORDS[int(i)] for i in torch.randint(len(WORDS), (1 + n % 5,), generator=generator)
        )
        for n in range(GLOBAL_BATCH)
    ]
    valid = torch.ones(GLOBAL_BATCH, dtype=torch.bool)
    if bad:  # 12 to 15 are one whole chunk of the last rank
        valid[[2, 12, 13, 14, 15]] = False
    zeros = torch.zeros(GLOBAL_BATCH, dtype=torch.int64)
    concepts = torch.arange(GLOBAL_BATCH) // 2
    tokens = TokenIds.of(tokenizer(captions))
    batch = Batch(0, captions, None, captions, tokens, concepts, valid, zeros, zeros, zeros)
    features = torch.randn(GLOBAL_BATCH, 32, generator=generator)
    if several:
        slots = np.repeat(np.arange(GLOBAL_BATCH), [1 + n % 3 for n in range(GLOBAL_BATCH)])
        captions = [" ".join(WORDS[(n + i) % 12] for i in range(1 + n % 4)) for n in slots]
        batch = replace(batch, slots=slots, tokens=TokenIds.of(tokenizer(captions)))
    return batch, features


def gradient_case(case: dict, text: str) -> dict[str, torch.Tensor]:
    """Loss, gradient and the weights after one SGD step of one configuration."""
    torch.manual_seed(0)
    tower = load_vision_tower(case["tower"])
    loss = LossConfig(kind=case["loss"], positives=case.get("positives", "pair"))
    encoder = TextEncoder(load_text_tower(TextConfig(tower=text, dropout=0.0)), 32)
    model = LitModel(tower, TextSide(encoder, loss), head=case.get("head", "none"))
    if "lora" in case:
        add_spread_lora(encoder.tower, case["lora"])
    if model.head is not None:
        torch.nn.init.normal_(model.head.out.weight, std=0.1)
    zero = ZeroConfig(stage=case["stage"], micro_batch_size=case["chunk"])
    tokenizer = encoder.tower.tokenizer
    batch, features = global_batch(case.get("bad", False), tokenizer, case.get("several", False))
    out = step_gradients(model, zero, batch, features)
    with whole_parameters(model.trained):
        out |= {
            f"weight.{n}": p.detach().clone().reshape(-1)
            for n, p in model.trained.named_parameters()
        }
    return out


def train_case(case: dict) -> None:
    """A whole training; dies by SIGKILL at step `kill_at` and writes down the keys it saw."""
    cfg = from_dict(TrainConfig, case["config"])
    seen = Path(case["seen"]).with_suffix(f".{distributed.rank()}of{distributed.world_size()}")

    def witness(step: int, model: LitModel) -> dict[str, float]:
        if step == case.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        texts = model.encode_text(["a cat"])  # a callback may use the model at every ZeRO stage
        return {"norm": float(texts.norm())}

    steps_of = CaptionedPipeline.steps

    def noted(self: CaptionedPipeline, start: int, steps: int) -> Iterator[list[Batch]]:
        for step, parts in enumerate(map(list, steps_of(self, start, steps)), start):
            if start or case.get("note", True):
                with seen.open("a") as file:
                    file.write(json.dumps([step, [k for part in parts for k in part.keys]]) + "\n")
            yield parts

    with patch.object(CaptionedPipeline, "steps", noted):
        train(cfg, callbacks=[witness], resume=case["resume"])


def main() -> None:
    job_file = Path(sys.argv[-1])
    distributed.init_from_launcher()
    job = json.loads(job_file.read_text())
    for name, case in job["gradients"].items():
        result = gradient_case(case, job["text"])
        if distributed.is_main():
            save_file(result, job_file.parent / f"{name}.safetensors")
    for case in job["trainings"]:
        train_case(case)
    distributed.shutdown()


if __name__ == "__main__":
    main()
