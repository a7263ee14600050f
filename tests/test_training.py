"""Training under DeepSpeed: ranks and chunks change nothing, and nothing is lost by a kill."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_TOWER
from forked import ranks
from open_clip.loss import ClipLoss, SigLipLoss
from rank_program import GLOBAL_BATCH, global_batch
from safetensors.torch import load_file

from contrastive import LitModel, load_vision_tower
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.run.checkpoint import newest_checkpoint
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.padding import TokenBatch
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.config import VisionConfig
from data.config import DataConfig
from data.errors import DataError, UsageError

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parent / "rank_program.py"
STEPS, KEPT, KILLED = 14, 4, 6  # an epoch is 6 steps and a bit

# name -> what differs; every case runs at one and at two ranks
CASES = {
    f"{loss}-stage{stage}-chunk{chunk}": {"loss": loss, "stage": stage, "chunk": chunk}
    for loss in ("sigmoid", "softmax")
    for stage in (0, 1, 2, 3)
    for chunk in (0, 4)
}
CASES |= {
    f"{loss}-{what}": {"loss": loss, "stage": 2, "chunk": 4, **more}
    for loss in ("sigmoid", "softmax")
    for what, more in {"bad": {"bad": True}, "captions": {"positives": "caption"}}.items()
}


def config(out: Path, name: str, text: str, shards: Path, stage: int, **changes) -> TrainConfig:
    cfg = TrainConfig(
        name=name,
        out=str(out),
        data=DataConfig(shards=(f"{shards}/train/*.tar",), num_workers=2, block_shards=2),
        vision=VisionConfig(tower=TINY_TOWER, patch_sizes=(48, 30)),
        text=TextConfig(tower=text, context_length=12),
        loss=LossConfig(kind="softmax" if stage % 2 else "sigmoid"),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        zero=ZeroConfig(stage=stage, micro_batch_size=4),
        global_batch_size=16,
        init_samples=32,
        steps=STEPS,
        log_every=1,
        eval_every=1,
        checkpoint_every=KEPT,
        keep_checkpoints=99,
    )
    return dataclasses.replace(cfg, **changes)


def run(folder: Path, count: int, text: str, gradients: dict, trainings: list) -> Path:
    """One launch; returns the folder with what it wrote."""
    folder.mkdir()
    cases = {name: case | {"tower": TINY_TOWER} for name, case in gradients.items()}
    job = {"text": text, "gradients": cases, "trainings": trainings}
    (folder / "job.json").write_text(json.dumps(job))
    done = ranks(count, PROGRAM, str(folder / "job.json"))
    killed = any("kill_at" in training for training in trainings)
    assert killed or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def training(cfg: TrainConfig, seen: Path, *, resume: bool = False, **more) -> dict:
    return {"config": dataclasses.asdict(cfg), "seen": str(seen), "resume": resume, **more}


def cut_back(source: Path, target: Path) -> None:
    """A copy of a run as it was after KEPT steps."""
    shutil.copytree(source, target)
    for checkpoint in (target / "checkpoints").glob("step_*"):
        if checkpoint.name > f"step_{KEPT:08d}":
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_text, emoji_shards) -> Path:
    """One rank: all gradient cases, and an uninterrupted training at every ZeRO stage."""
    folder = tmp_path_factory.mktemp("launch") / "one"
    runs = [
        training(config(folder, f"zero{s}", tiny_text, emoji_shards, s), folder / f"zero{s}.seen")
        for s in (0, 1, 2, 3)
    ]
    return run(folder, 1, tiny_text, CASES, runs)


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_text, emoji_shards) -> Path:
    """Two ranks: all gradient cases, the main job at small size, ZeRO 2, and again from a cache."""
    folder = tmp_path_factory.mktemp("launch") / "two"
    cfg = config(folder, "zero2", tiny_text, emoji_shards, 2)
    data = dataclasses.replace(cfg.data, features=str(folder / "cache"))
    cached = dataclasses.replace(cfg, name="cached", data=data)
    runs = [training(c, folder / f"{c.name}.seen") for c in (cfg, cached)]
    return run(folder, 2, tiny_text, CASES, runs)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_text, emoji_shards) -> Path:
    """Two ranks, killed by SIGKILL in mid-epoch, two steps after a checkpoint."""
    folder = tmp_path_factory.mktemp("launch") / "killed"
    cfg = config(folder, "zero2", tiny_text, emoji_shards, 2)
    return run(folder, 2, tiny_text, {}, [training(cfg, folder / "first.seen", kill_at=KILLED)])


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, tiny_text, emoji_shards, one, killed) -> Path:
    """Two ranks go on with the killed run, and with one-rank runs of every ZeRO stage."""
    folder = tmp_path_factory.mktemp("launch") / "resumed"
    data = DataConfig(shards=(f"{emoji_shards}/train/*.tar",), num_workers=0, block_shards=2)
    after = config(killed, "zero2", tiny_text, emoji_shards, 2, data=data)
    trainings = [training(after, killed / "second.seen", resume=True)]
    for stage in (0, 1, 2, 3):
        cut_back(one / f"zero{stage}", killed / f"one{stage}")
        cfg = config(killed, f"one{stage}", tiny_text, emoji_shards, stage)
        trainings.append(training(cfg, killed / f"one{stage}.seen", resume=True))
    run(folder, 2, tiny_text, {}, trainings)
    return killed


def seen_keys(file: Path, ranks: int) -> dict[int, list[str]]:
    """Step -> the global batch's keys, in order."""
    parts: list[dict[int, list[str]]] = []
    for rank in range(ranks):
        lines = file.with_suffix(f".{rank}of{ranks}").read_text().splitlines()
        parts.append(dict(json.loads(line) for line in lines))
    return {step: [key for part in parts for key in part[step]] for step in parts[0]}


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "model" / "model.safetensors")


def flat(values: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    parts = [v.double().reshape(-1) for k, v in sorted(values.items()) if k.startswith(prefix)]
    return torch.cat(parts)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# ---- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_a_step_on_one_process_equals_open_clip(loss, one, tiny_text):
    torch.manual_seed(0)
    tower = load_vision_tower(TINY_TOWER)
    encoder = TextEncoder(load_text_tower(TextConfig(tower=tiny_text)), 32)
    model = LitModel(tower, TextSide(encoder, LossConfig(kind=loss)))
    batch, features = global_batch(False, encoder.tower.tokenizer)
    tokens = TokenBatch.of(encoder.tower, batch.tokens)
    texts, images = encoder(tokens), model.embed_features(features)
    if loss == "sigmoid":
        value = SigLipLoss()(images, texts, model.text.scale(), model.text.logit_bias)
    else:
        value = ClipLoss()(images, texts, model.text.scale())
    value.backward()
    got = load_file(one / f"{loss}-stage0-chunk0.safetensors")
    expected = {
        f"gradient.{n}": p.grad.reshape(-1) for n, p in model.text.named_parameters()
        if p.grad is not None
    }  # fmt: skip
    assert relative(got["loss"], value.detach().reshape(1)) <= 1e-5
    assert relative(flat(got, "gradient."), flat(expected, "gradient.")) <= 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_stages_chunks_and_ranks_change_nothing(case, ranks, one, two):
    loss = CASES[case]["loss"]
    same = case if "stage" not in case else f"{loss}-stage0-chunk0"
    expected = load_file(one / f"{same}.safetensors")
    got = load_file({"one": one, "two": two}[ranks] / f"{case}.safetensors")
    assert set(got) == set(expected)
    for part in ("loss", "gradient.", "weight."):
        assert relative(flat(got, part), flat(expected, part)) <= 1e-5


def test_bad_samples_leave_the_loss_of_the_good_ones(one, tiny_text):
    """Dropping slots 2 and 12 to 15 equals open_clip's loss over the other eleven pairs."""
    torch.manual_seed(0)
    load_vision_tower(TINY_TOWER)  # draws from the same generator first, as the program does
    encoder = TextEncoder(load_text_tower(TextConfig(tower=tiny_text)), 32)
    side = TextSide(encoder, LossConfig(kind="softmax"))
    batch, features = global_batch(True, encoder.tower.tokenizer)
    good = batch.valid.nonzero()[:, 0]
    assert len(good) == GLOBAL_BATCH - 5
    tokens = TokenBatch.of(encoder.tower, batch.tokens.take(good.numpy()))
    images = torch.nn.functional.normalize(features[good], dim=-1)
    value = ClipLoss()(images, *side(tokens)[:2])
    got = load_file(one / "softmax-bad.safetensors")["loss"]
    assert got.item() == pytest.approx(value.item(), rel=1e-5)


# ---- whole runs ------------------------------------------------------------------------------


def test_main_job_writes_what_it_promises(two):
    folder = two / "zero2"
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, STEPS + 1))
    assert all(x["norm"] == pytest.approx(1) for x in lines if "norm" in x)
    assert {x["patch_size"] for x in lines if "loss" in x} == {48, 30}
    assert list((folder / "tensorboard").iterdir())
    saved = json.loads((folder / "config.json").read_text())
    assert saved["format"] == 1
    assert saved["train"]["zero"]["stage"] == 2
    model = LitModel.from_pretrained(folder / "model")
    assert model.encode_text(["a cat"]).shape == (1, 32)
    assert model.card.steps == STEPS
    assert model.card.samples > 0
    assert list(model.card.shards) == saved["train"]["data"]["shards"]
    assert model.card.command == saved["command"]
    assert "rank_program.py" in saved["command"]
    assert saved["revision"] in (folder / "model" / "README.md").read_text()


def test_the_locked_tower_is_bit_identical_after_training(two):
    before = load_vision_tower(TINY_TOWER).state_dict()
    after = weights(two / "zero2")
    assert all(torch.equal(value, after[f"vision.{name}"]) for name, value in before.items())


def test_two_ranks_fill_a_cache_and_train_the_same_from_it(two, emoji_shards):
    names = {file.name for file in (two / "cache").iterdir()}
    for shard in (emoji_shards / "train").glob("*.tar"):
        wanted = {f"{shard.stem}.{end}" for end in ("p48.npy", "p30.npy", "keys.txt", "sums.json")}
        assert wanted <= names
        assert any(name.startswith(f"{shard.stem}.texts.") for name in names)
    assert seen_keys(two / "cached.seen", 2) == seen_keys(two / "zero2.seen", 2)
    a, b = weights(two / "zero2"), weights(two / "cached")
    assert relative(flat(b, "text."), flat(a, "text.")) <= 1e-3


@pytest.mark.parametrize("stage", [2])
def test_two_ranks_train_what_one_does(stage, one, two):
    assert seen_keys(two / f"zero{stage}.seen", 2) == seen_keys(one / f"zero{stage}.seen", 1)
    a, b = weights(one / f"zero{stage}"), weights(two / f"zero{stage}")
    assert relative(flat(b, "text."), flat(a, "text.")) <= 1e-3


def test_killed_and_resumed_is_bit_identical_to_never_killed(resumed, two):
    """The resumed run has no loader workers, the others two per rank."""
    first, second = (seen_keys(resumed / f"{name}.seen", 2) for name in ("first", "second"))
    whole = seen_keys(two / "zero2.seen", 2)
    assert set(first) >= set(range(KILLED))  # what loader workers had read ahead
    assert {s: k for s, k in second.items() if s >= KEPT} == {
        s: k for s, k in whole.items() if s >= KEPT
    }
    got, expected = weights(resumed / "zero2"), weights(two / "zero2")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    lines = [json.loads(x) for x in (resumed / "zero2/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_number_of_ranks_goes_on_from_the_same_position(stage, resumed, one):
    got = seen_keys(resumed / f"one{stage}.seen", 2)
    whole = seen_keys(one / f"zero{stage}.seen", 1)
    assert {s: k for s, k in got.items() if s >= KEPT} == {
        s: k for s, k in whole.items() if s >= KEPT
    }
    a, b = weights(one / f"zero{stage}"), weights(resumed / f"one{stage}")
    assert relative(flat(b, "text."), flat(a, "text.")) <= 1e-3


def test_an_interrupted_checkpoint_is_ignored(one, tmp_path):
    cut_back(one / "zero1", tmp_path / "run")
    broken = tmp_path / "run" / "checkpoints" / "step_00000008"
    broken.mkdir()
    found, state = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.name == f"step_{KEPT:08d}"
    assert state["step"] == KEPT


def test_a_checkpoint_of_another_tower_or_data_is_refused(one, tmp_path, tiny_text, emoji_shards):
    cut_back(one / "zero0", tmp_path / "run")
    cfg = config(tmp_path, "run", tiny_text, emoji_shards, 0)
    other = dataclasses.replace(cfg.vision, dtype="bfloat16")
    with pytest.raises(UsageError, match="was trained with image tower"):
        train(dataclasses.replace(cfg, vision=other), resume=True)
    fewer = dataclasses.replace(cfg.data, shards=(f"{emoji_shards}/train/noto*.tar",))
    with pytest.raises(UsageError, match="was trained with data"):
        train(dataclasses.replace(cfg, data=fewer), resume=True)


def test_a_kill_between_model_and_checkpoint_leaves_a_whole_model(one, tmp_path):
    """`model/` is replaced by a rename, before the checkpoint that makes the run count as done."""
    model = LitModel.from_pretrained(one / "zero0" / "model")
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "half").touch()
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model.part").exists()
    assert LitModel.from_pretrained(tmp_path / "model").text_fingerprint == model.text_fingerprint


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (2, "cpu"), (3, "cpu")])
def test_bfloat16_and_offload_train_and_old_checkpoints_go(
    stage, offload, tiny_text, emoji_shards, tmp_path
):
    cfg = config(tmp_path, "run", tiny_text, emoji_shards, stage, keep_checkpoints=2)
    zero = ZeroConfig(stage=stage, offload=offload, precision="bfloat16", micro_batch_size=4)
    data = dataclasses.replace(cfg.data, num_workers=0)
    folder = train(dataclasses.replace(cfg, zero=zero, data=data))
    kept = sorted(d.name for d in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000012", "step_00000014"]
    after = weights(folder)
    assert all(value.dtype == torch.float32 for value in after.values())
    assert after["text.logit_scale"] != pytest.approx(cfg.loss.temperature_init)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_towers_train_what_plain_ones_do(tiny_text, emoji_shards, tmp_path):
    found = {}
    for name, compiled in (("plain", False), ("compiled", True)):
        cfg = config(tmp_path, name, tiny_text, emoji_shards, 0, eval_every=0, steps=4)
        cfg = dataclasses.replace(cfg, compile=compiled, checkpoint_every=0)
        found[name] = weights(train(cfg))
    assert set(found["compiled"]) == set(found["plain"])
    a, b = flat(found["plain"], "text."), flat(found["compiled"], "text.")
    assert relative(b, a) <= 1e-3


def test_a_global_batch_above_a_chunk_needs_no_flag(tiny_text, emoji_shards, tmp_path):
    """The chunk is found: 300 pairs are two chunks of 150, and train as one of 300 does."""
    found = {}
    for chunk in (0, 300):
        cfg = config(tmp_path, f"run{chunk}", tiny_text, emoji_shards, 0, eval_every=0, steps=2)
        zero = ZeroConfig(micro_batch_size=chunk)
        cfg = dataclasses.replace(
            cfg, zero=zero, global_batch_size=300, checkpoint_every=0, optim=OptimConfig(name="sgd")
        )
        found[chunk] = weights(train(cfg))
    assert relative(flat(found[0], "text."), flat(found[300], "text.")) <= 1e-5


@pytest.mark.parametrize("log_every", [1, 10])  # told by the loss, and by the weights before a save
def test_a_run_that_diverges_stops_and_saves_nothing(
    log_every: int, emoji_shards: Path, tiny_text: str, tmp_path: Path
) -> None:
    optim = OptimConfig(name="sgd", lr=1e30, clip_norm=0.0)
    cfg = config(tmp_path, "run", tiny_text, emoji_shards, 0, optim=optim, log_every=log_every)
    with pytest.raises(DataError, match=r"step \d: .*lower optim\.lr"):
        train(dataclasses.replace(cfg, steps=6, checkpoint_every=3))
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_rank_without_memory_says_so_and_ends_all(tiny_text, emoji_shards, tmp_path):
    cfg = config(tmp_path, "spent", tiny_text, emoji_shards, 1)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    program = PROGRAM.with_name("memory_program.py")
    done = ranks(2, program, str(tmp_path / "config.json"))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error (rank 1)")]
    assert len(said) == 1
    assert "out of memory with micro-batches of 4; --zero.micro-batch-size 2 takes less" in said[0]
