"""Run under the deepspeed launcher by test_checkpoint.py: a training with slow steps.

deepspeed --num_accelerators N tests/stop_program.py CONFIG.json
"""

import json
import sys
import time
from pathlib import Path

from contrastive import LitModel, distributed
from contrastive.run.config_file import from_dict
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from data.errors import exit_on_usage_error


def wait(step: int, _: LitModel) -> dict[str, float]:
    time.sleep(0.5)
    return {"slept": 0.5}


def main() -> None:
    with exit_on_usage_error(TrainConfig, "resume"), distributed.launched():
        job = json.loads(Path(sys.argv[-1]).read_text())
        train(from_dict(TrainConfig, job["config"]), [wait], resume=job["resume"])


if __name__ == "__main__":
    main()
