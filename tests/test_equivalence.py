"""Micro-batches, ranks and the cache change no gradient of a large batch and no loss of a run."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import TINY_TOWER
from forked import ranks
from launcher import ROOT

from contrastive.model.config import LossConfig
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.text.config import TextConfig
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.config import VisionConfig
from data.config import DataConfig

pytestmark = pytest.mark.slow
PAIRS, MICRO_BATCH_SIZE, STEPS = 4096, 64, 100
LOSSES = ("sigmoid", "softmax")
BOUNDS = {"float64": 1e-10, "float32": 1e-5}
CASES = {
    f"{loss}-{dtype}-zero{stage}": {"loss": loss, "dtype": dtype, "stage": stage}
    for loss in LOSSES
    # float64 knows no stages; ZeRO 2 reduces gradients over ranks after each micro-batch
    for dtype, stage in [("float64", 0), ("float32", 0), ("float32", 2)]
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_text) -> dict[int, dict[str, dict]]:
    """Ranks -> case -> relative difference of its gradients to open_clip's in one forward."""
    job = {
        "tower": TINY_TOWER,
        "text": tiny_text,
        "pairs": PAIRS,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "cases": CASES,
    }
    found = {}
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{count}")
        (folder / "job.json").write_text(json.dumps(job))
        program = ROOT / "tests" / "gradients_program.py"
        done = ranks(count, program, str(folder / "job.json"), timeout_s=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found[count] = json.loads((folder / "rows.json").read_text())
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradients_in_micro_batches_equal_those_in_one_shot(case, ranks, rows):
    row = rows[ranks][case]
    assert row["ranks"] == ranks
    assert row["to_one_shot"] <= BOUNDS[row["dtype"]]
    assert row["loss_to_one_shot"] <= 1e-6


def losses_of(cfg: TrainConfig) -> list[float]:
    lines = (train(cfg) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_cache_changes_no_loss(loss, tiny_text, emoji_shards, tmp_path):
    cfg = TrainConfig(
        name="pixels",
        out=str(tmp_path),
        data=DataConfig(shards=(f"{emoji_shards}/train/*.tar",), num_workers=0),
        vision=VisionConfig(tower=TINY_TOWER, patch_sizes=(48, 30)),
        text=TextConfig(tower=tiny_text, context_length=12),
        loss=LossConfig(kind=loss),
        optim=OptimConfig(lr=1e-3, warmup_steps=5),
        zero=ZeroConfig(micro_batch_size=4),
        global_batch_size=8,
        init_samples=64,
        steps=STEPS,
        log_every=1,
    )
    data = dataclasses.replace(cfg.data, features=str(tmp_path / "features"))
    pixels = losses_of(cfg)
    cached = losses_of(dataclasses.replace(cfg, name="cached", data=data))
    assert len(pixels) == STEPS
    assert Path(data.features, "manifest.json").exists()
    assert cached == pytest.approx(pixels, rel=1e-4)
