"""A training whose last rank's GPU runs out of memory at the third step.

deepspeed --num_accelerators N tests/memory_program.py CONFIG.json
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from contrastive import distributed
from contrastive.run.config_file import from_dict
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.train.step import TrainStep
from data.errors import exit_on_usage_error


def main() -> None:
    cfg = from_dict(TrainConfig, json.loads(Path(sys.argv[-1]).read_text()))
    step_of = TrainStep.__call__

    def step(self: TrainStep, batch: Any, *rest: Any) -> torch.Tensor:
        if batch.step == 2 and distributed.rank() == distributed.world_size() - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step_of(self, batch, *rest)

    with (
        exit_on_usage_error(TrainConfig),
        distributed.launched(),
        patch.object(TrainStep, "__call__", step),
    ):
        train(cfg)


if __name__ == "__main__":
    main()
