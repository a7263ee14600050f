"""Run under the deepspeed launcher, or alone, by test_flexify.py: whole trainings, one launch.

deepspeed --num_accelerators N tests/flexify_program.py JOB.json
"""

import json
import os
import signal
import sys
from pathlib import Path

from contrastive import VisionTower, distributed
from contrastive.flexify.config import FlexifyConfig
from contrastive.flexify.loop import flexify
from contrastive.run.config_file import from_dict


def main() -> None:
    job = json.loads(Path(sys.argv[-1]).read_text())
    distributed.init_from_launcher()

    def witness(step: int, tower: VisionTower) -> dict[str, float]:
        if step == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"width": tower.embed_dim}

    for config in job["configs"]:
        flexify(from_dict(FlexifyConfig, config), [witness])
    distributed.shutdown()


if __name__ == "__main__":
    main()
