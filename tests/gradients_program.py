"""Gradients of a batch in micro-batches, against open_clip's loss of all its texts in one forward.

    deepspeed --num_accelerators N tests/gradients_program.py JOB.json

Run by tests/test_equivalence.py on small towers and by benchmarks/lit_equivalence.py on the default
image tower. The job names towers and cases; rank 0 writes a row per case into rows.json beside it.
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gradients import (
    Gradients,
    build_model,
    one_shot_gradients,
    random_pairs,
    relative_error,
    step_gradients,
)

from contrastive import LitModel, distributed
from contrastive.model.config import LossConfig
from contrastive.run.config import ZeroConfig


def main() -> None:
    job_file = Path(sys.argv[-1])
    distributed.init_from_launcher()
    job = json.loads(job_file.read_text())

    def build(loss: Any, dtype: str) -> LitModel:
        loss_config = LossConfig(kind=loss)
        return build_model(job["tower"], job["text"], loss_config, getattr(torch, dtype))

    @cache
    def one_shot(loss: str, dtype: str) -> Gradients:
        model = build(loss, dtype)
        return one_shot_gradients(model, *random_pairs(model, job["pairs"]))

    rows = {}
    for name, case in job["cases"].items():
        loss, dtype = case["loss"], case["dtype"]
        model = build(loss, dtype)
        zero = ZeroConfig(stage=case["stage"], micro_batch_size=job["micro_batch_size"])
        found = step_gradients(model, zero, *random_pairs(model, job["pairs"]))
        if distributed.is_main():
            whole = one_shot(loss, dtype)
            row: dict[str, Any] = {"ranks": distributed.world_size(), **case}
            row["loss_to_one_shot"] = float(abs(found["loss"] / whole["loss"] - 1))
            row["to_one_shot"] = relative_error(found, whole)
            if dtype == "float32":  # compare with float64 to attribute the rounding error
                exact = one_shot(loss, "float64")
                row["to_float64"] = relative_error(found, exact)
                row["one_shot_to_float64"] = relative_error(whole, exact)
            rows[name] = row
    if distributed.is_main():
        (job_file.parent / "rows.json").write_text(json.dumps(rows))
    distributed.shutdown()


if __name__ == "__main__":
    main()
