"""Making a tower flexible: the start, the gradients, ranks, resuming, and what is refused."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import PARITY, TINY_TOWER
from forked import ranks, run
from huggingface_hub import ModelCard
from launcher import ROOT
from safetensors.torch import load_file
from shard_maker import png, write_tar
from test_towers import OWN_VIT, make_open_clip

from contrastive import LitModel, VisionTower, load_vision_tower
from contrastive.flexify.config import (
    AugmentConfig,
    DistillationConfig,
    FlexifyConfig,
    StudentConfig,
    TeacherConfig,
)
from contrastive.flexify.loop import flexify
from contrastive.flexify.student import build_student
from contrastive.flexify.whole_model import teachers_model
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.vision.build import build_vision_tower
from contrastive.vision.config import PatchDropoutConfig
from contrastive.vision.tower_config import TowerConfig
from data.config import DataConfig
from data.errors import DataError, UsageError
from data.progress import say_once

PROGRAM = Path(__file__).parent / "flexify_program.py"
GAP_TOWER = f"bigvision:{PARITY / 'bigvision_flexi_gap_p16_g15.npz'}"  # patch 16 divides 240 px
STEPS, KEPT, KILLED = 6, 2, 4


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Two shards of pictures with labels 0 to 9 and no captions; one label is missing."""
    folder = tmp_path_factory.mktemp("pictures")
    for shard in range(2):
        members = []
        for i in range(14):
            key = f"s{shard}_{i:02d}"
            members.append((f"{key}.png", png(100 * shard + i, (20, 24))))
            if (shard, i) != (1, 3):
                members.append((f"{key}.cls", str(i % 10).encode()))
        write_tar(folder / f"{shard:04d}.tar", members)
    write_tar(folder / "bad.tar", [("x.png", b"no picture"), ("x.cls", b"3")])
    return folder


def config(out: Path, pictures: Path, name: str = "run", **changes) -> FlexifyConfig:
    """Every loss and every option at once, small."""
    cfg = FlexifyConfig(
        name=name,
        out=str(out),
        data=DataConfig(
            shards=(f"{pictures}/*.tar",),
            views=3,
            crop=0.5,
            flip=True,
            num_workers=0,
            block_shards=4,
        ),
        teacher=TeacherConfig(tower=TINY_TOWER, patch_size=48),
        student=StudentConfig(patch_sizes=(60, 48, 40), max_aspect=2.0),
        loss=DistillationConfig(kl=1.0, features=1.0, labels=0.5, normaliser_samples=16),
        patch_dropout=PatchDropoutConfig(keep_rate=0.8, keep_rate_end=0.5, schedule="linear"),
        augment=AugmentConfig(mixup=0.3),
        optim=OptimConfig(name="sgd", lr=0.05, clip_norm=1.0, warmup_steps=1),
        zero=ZeroConfig(micro_batch_size=2),
        global_batch_size=8,
        steps=STEPS,
        log_every=1,
        eval_every=2,
        val_samples=40,
        checkpoint_every=KEPT,
        keep_checkpoints=9,
    )
    return dataclasses.replace(cfg, **changes)


def staged(out: Path, pictures: Path, stage: int, **changes) -> FlexifyConfig:
    zero = ZeroConfig(stage=stage, micro_batch_size=2)
    return config(out, pictures, f"zero{stage}", zero=zero, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def relative(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any tensor, beyond what float32 rounds, relative to how far
    training moved it."""
    start = load_vision_tower(TINY_TOWER).state_dict()
    rounding = torch.finfo(torch.float32).eps
    return max(
        float(
            ((got[n] - expected[n]).norm() - rounding * expected[n].norm()).clamp_min(0)
            / (expected[n] - start[n]).norm()
        )
        for n in expected
    )


def job(folder: Path, configs: list[FlexifyConfig], **more) -> Path:
    file = folder / "job.json"
    file.write_text(json.dumps({"configs": [dataclasses.asdict(c) for c in configs], **more}))
    return file


@pytest.fixture(scope="module")
def one(tmp_path_factory, pictures) -> Path:
    """One rank, in this process, at every ZeRO stage; stage 0 in one micro-batch."""
    folder = tmp_path_factory.mktemp("one")
    flexify(staged(folder, pictures, 0))
    flexify(config(folder, pictures, "whole", zero=ZeroConfig(micro_batch_size=0)))
    for stage in (1, 2, 3):
        flexify(staged(folder, pictures, stage))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, pictures) -> Path:
    """Two ranks, one launch, at every ZeRO stage."""
    folder = tmp_path_factory.mktemp("two")
    runs = [staged(folder, pictures, stage) for stage in (0, 1, 2, 3)]
    done = ranks(2, PROGRAM, str(job(folder, runs)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


# ---- the start -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "grid"), [(0, 0), (32, 0), (0, 20), (24, 17), (16, 15)])
def test_the_student_starts_as_its_teacher(kernel, grid):
    """At the teacher's own patch size, whatever larger sizes are stored."""
    teacher = load_vision_tower(GAP_TOWER)
    cfg = StudentConfig(kernel_size=kernel, grid=grid)
    student = build_student(cfg, TeacherConfig(tower=GAP_TOWER), 16)
    assert student.net.patch_embed.proj.weight.shape[-1] == (kernel or 16)
    assert student.net.pos_embed.shape[1] == (grid or 15) ** 2
    images = torch.randn(2, 3, 240, 240)
    with torch.no_grad():
        got, expected = student(images, 16), teacher(images, 16)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    coarse = teacher(images, 48)
    with torch.no_grad():  # elsewhere it is close, as a resize is
        assert torch.cosine_similarity(student(images, 48), coarse).min() > 0.9


def test_the_default_tower_starts_as_its_teacher_with_a_smaller_grid():
    teacher = load_vision_tower("dinov2s")  # 37 x 37 positions, of which 16 x 16 are used
    cfg = StudentConfig(kernel_size=32, grid=16)
    student = build_student(cfg, TeacherConfig(tower="dinov2s"), 14)
    assert student.patch_sizes == teacher.patch_sizes
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        got, expected = student(images, 14), teacher(images, 14)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("pooling", ["token", "avg", "map"])
def test_pooling_and_a_new_head(pooling):
    cfg = StudentConfig(pooling=pooling, num_classes=7)
    student = build_student(cfg, TeacherConfig(tower=TINY_TOWER), 48)
    teacher = load_vision_tower(TINY_TOWER)
    assert student.net.head.out_features == 7
    images = torch.randn(2, 3, 240, 240)
    with torch.no_grad():
        tokens = teacher.net.norm(teacher.net.blocks(teacher.embed_patches(images, 48)))
        got = student(images, 48)
    expected = {"token": tokens[:, 0], "avg": tokens[:, 1:].mean(1)}
    if pooling in expected:
        torch.testing.assert_close(got, expected[pooling])
    else:
        assert got.shape == (2, 32)
        assert not torch.allclose(got, tokens[:, 0])


def test_a_student_keeps_the_one_patch_size_that_its_tower_was_saved_with(tmp_path):
    """Unless that is the kernel's own: a checkpoint lists no other."""
    from contrastive.vision.formats.own_format import save_vision_tower

    args = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2}
    for listed, offered in (((8,), (8,)), ((16,), (16, 8, 4))):
        config_ = TowerConfig("vit_tiny_patch16_224", args, 64, listed)
        folder = tmp_path / f"{listed[0]}"
        save_vision_tower(build_vision_tower(config_), folder)
        student = build_student(StudentConfig(), TeacherConfig(tower=str(folder)), 16)
        assert student.patch_sizes == offered


def test_a_mean_pooled_timm_vit_can_pool_by_attention(tmp_path):
    """timm keeps such a ViT's last norm behind the pooling; it moves before."""
    net = timm.create_model("vit_tiny_patch16_224", depth=1, global_pool="avg")
    tower = VisionTower(
        net, TowerConfig("vit_tiny_patch16_224", {"depth": 1, "global_pool": "avg"})
    )
    torch.nn.init.normal_(net.fc_norm.weight)
    from contrastive.vision.formats.own_format import save_vision_tower

    save_vision_tower(tower, tmp_path)
    student = build_student(StudentConfig(pooling="map"), TeacherConfig(tower=str(tmp_path)), 16)
    assert torch.equal(student.net.norm.weight, net.fc_norm.weight)


# ---- gradients -------------------------------------------------------------------------------


def test_gradients_through_the_resize_are_exact_in_float64():
    """Analytic against numeric, into stored kernel, positions, and class token."""
    config = TowerConfig(
        "vit_tiny_patch16_224",
        {"embed_dim": 4, "depth": 1, "num_heads": 1, "patch_size": 4, "img_size": 12},
        image_size=12,
    )
    torch.manual_seed(0)
    tower = build_vision_tower(config).double()
    images = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    stored = [tower.net.patch_embed.proj.weight, tower.net.pos_embed, tower.net.cls_token]
    for patch_size in (6, 4, 3):

        def tokens(*_, patch_size=patch_size):
            return tower.embed_patches(images, patch_size)

        assert torch.autograd.gradcheck(tokens, stored)


def test_training_changes_the_stored_kernel_and_positions(one):
    before, after = load_vision_tower(TINY_TOWER).state_dict(), weights(one / "zero0")
    for name in (
        "net.patch_embed.proj.weight",
        "net.pos_embed",
        "net.cls_token",
        "net.head.weight",
    ):
        assert not torch.equal(after[name], before[name]), name


def test_only_what_is_trainable_changes(pictures, tmp_path):
    student = StudentConfig(patch_sizes=(60,), trainable=(r"patch_embed\.proj", "pos_embed"))
    cfg = config(tmp_path, pictures, student=student, steps=1)
    after, before = weights(flexify(cfg)), load_vision_tower(TINY_TOWER).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {
        "net.patch_embed.proj.weight", "net.patch_embed.proj.bias", "net.pos_embed",
    }  # fmt: skip


def test_distillation_brings_other_patch_sizes_closer(pictures, tmp_path):
    cfg = config(
        tmp_path,
        pictures,
        student=StudentConfig(patch_sizes=(60, 48, 40)),
        loss=DistillationConfig(features=1.0, distance="mse", normaliser_samples=28),
        patch_dropout=PatchDropoutConfig(),
        augment=AugmentConfig(),
        optim=OptimConfig(lr=1e-3),
        steps=30,
        eval_every=30,
        checkpoint_every=0,
        val_samples=28,
    )
    start = dataclasses.replace(
        cfg, name="start", steps=1, eval_every=1, optim=OptimConfig(lr=1e-9)
    )
    rows = [
        json.loads((flexify(c) / "model" / "config.json").read_text())["validation"]["patch_sizes"]
        for c in (start, cfg)
    ]
    assert rows[0]["48"]["cosine"] == pytest.approx(1, abs=1e-4)
    for size in ("60", "40"):
        assert rows[1][size]["cosine"] > rows[0][size]["cosine"] + 0.02


# ---- ranks, stages, resuming -----------------------------------------------------------------


def test_micro_batches_change_nothing(one):
    assert relative(weights(one / "whole"), weights(one / "zero0")) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_equals_stage_0(stage, one):
    assert relative(weights(one / f"zero{stage}"), weights(one / "zero0")) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_process(stage, one, two):
    """Mixing, random views, kept patches, a bad picture, every loss, and the table."""
    expected, got = one / "zero0", two / f"zero{stage}"
    assert relative(weights(got), weights(expected)) <= 1e-5
    tables = [
        json.loads((f / "model/config.json").read_text())["validation"] for f in (got, expected)
    ]
    for size, row in tables[0]["patch_sizes"].items():
        assert row == pytest.approx(tables[1]["patch_sizes"][size], rel=1e-4, abs=1e-6)
    losses = [
        [
            x["loss"]
            for x in map(json.loads, (f / "metrics.jsonl").read_text().split("\n")[:-1])
            if "loss" in x
        ]
        for f in (got, expected)
    ]
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical_to_never_killed(pictures, tmp_path):
    def cfg(name):
        adam = OptimConfig(lr=1e-3, warmup_steps=1, schedule="linear", cooldown_steps=3)
        return config(tmp_path, pictures, name, optim=adam)

    flexify(cfg("whole"))
    file = job(tmp_path, [cfg("killed")], kill_at=KILLED)
    done = run(PROGRAM, file)
    assert done.returncode == -9, done.stderr[-3000:]
    assert not (tmp_path / "killed/checkpoints/step_00000006").exists()
    flexify(cfg("killed"), resume=True)
    got, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    lines = [json.loads(x) for x in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (3, "cpu")])
def test_bfloat16_and_offload_train(stage, offload, pictures, tmp_path):
    zero = ZeroConfig(stage=stage, offload=offload, precision="bfloat16", micro_batch_size=4)
    teacher = TeacherConfig(tower=TINY_TOWER, patch_size=48, dtype="bfloat16")
    cfg = config(tmp_path, pictures, zero=zero, teacher=teacher, optim=OptimConfig(), steps=2)
    after, before = weights(flexify(cfg)), load_vision_tower(TINY_TOWER).state_dict()
    assert all(value.dtype == torch.float32 for value in after.values())
    assert not torch.equal(after["net.pos_embed"], before["net.pos_embed"])


def test_another_teacher_is_refused_on_resume(pictures, tmp_path):
    cfg = config(tmp_path, pictures, steps=1)
    flexify(cfg)
    other = dataclasses.replace(cfg, teacher=TeacherConfig(GAP_TOWER), loss=DistillationConfig())
    with pytest.raises(UsageError, match="was trained with teacher"):
        flexify(other, resume=True)
    with pytest.raises(UsageError, match="holds a run of 1 steps"):
        flexify(cfg)


# ---- what comes out --------------------------------------------------------------------------


def test_the_saved_tower_loads_with_its_patch_sizes_and_table(one):
    tower = load_vision_tower(str(one / "zero0" / "model"))
    assert tower.patch_sizes == (60, 48, 40)
    assert tower(torch.randn(1, 3, 240, 240), 40).shape == (1, 32)
    table = json.loads((one / "zero0/model/config.json").read_text())["validation"]
    assert table["samples"] == 28  # of 40 asked; one of the 29 is bad
    assert table["held_out"] is False
    assert set(table["patch_sizes"]) == {"60", "48", "40"}
    assert set(table["patch_sizes"]["48"]) == {"cosine", "kl", "agreement", "top1"}


def test_the_saved_tower_has_a_card_with_what_each_patch_size_costs_and_gives(one):
    model = one / "zero0" / "model"
    card = ModelCard.load(model / "README.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "| patch | tokens | GFLOPs | cosine | kl | agreement, % | top1, % |" in card.text
    table = json.loads((model / "config.json").read_text())["validation"]["patch_sizes"]
    for size in (60, 48, 40):
        (row,) = (line for line in card.text.splitlines() if line.startswith(f"| {size} | "))
        assert f"| {table[str(size)]['cosine']:.4f} |" in row
    assert "means over 28 training images, the teacher at patch " in card.text
    assert "images\n- Command: `" in card.text


def test_cached_teacher_features_train_what_live_ones_do(pictures, tmp_path):
    student = StudentConfig(patch_sizes=(60, 48, 40))
    live = config(tmp_path, pictures, "live", augment=AugmentConfig(), student=student)
    data = dataclasses.replace(live.data, features=str(tmp_path / "cache"))
    cached = dataclasses.replace(live, name="cached", data=data)
    assert relative(weights(flexify(cached)), weights(flexify(live))) <= 1e-5


def test_a_teacher_of_another_image_size_and_kind_teaches(pictures, tmp_path):
    """A ConvNet at 64 px teaches labels' probabilities to a ViT at 96 px."""
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=10)
    from contrastive.vision.formats.own_format import save_vision_tower

    config_ = TowerConfig("resnet10t", {"num_classes": 10}, 64, mean=(0.4,) * 3, std=(0.2,) * 3)
    save_vision_tower(VisionTower(net, config_), tmp_path / "teacher")
    cfg = config(
        tmp_path,
        pictures,
        teacher=TeacherConfig(str(tmp_path / "teacher")),
        student=StudentConfig(tower=TINY_TOWER, image_size=96, patch_sizes=(24, 16)),
        loss=DistillationConfig(kl=1.0, features=0.0, labels=0.5, label_loss="sigmoid"),
        steps=2,
    )
    folder = flexify(cfg)
    tower = load_vision_tower(str(folder / "model"))
    assert (tower.image_size, tower.patch_sizes) == (96, (24, 16))
    table = json.loads((folder / "model/config.json").read_text())["validation"]
    assert set(table["patch_sizes"]["24"]) == {"kl", "agreement", "top1"}

    wide = dataclasses.replace(cfg.student, max_aspect=2.0)
    with pytest.raises(UsageError, match="reads squares alone; allowed: 1"):
        flexify(dataclasses.replace(cfg, name="wide", student=wide))


@pytest.mark.parametrize("spec", [TINY_TOWER, GAP_TOWER])
def test_an_exported_tower_is_the_same_function_in_timm(spec, tmp_path, monkeypatch):
    """launch/export.py, then timm alone."""
    import runpy

    tower = load_vision_tower(spec)
    arguments = [
        "--model",
        spec,
        "--to",
        "timm",
        "--patch-size",
        "30",
        "--out",
        str(tmp_path / "x"),
    ]
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    runpy.run_path(str(ROOT / "launch" / "export.py"), run_name="__main__")
    net = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    images = torch.randn(2, 3, 240, 240)
    with torch.no_grad():
        features = net.forward_head(net.forward_features(images), pre_logits=True)
        torch.testing.assert_close(features, tower(images, 30), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net(images), tower.net.head(tower(images, 30)))
    assert net.pretrained_cfg["input_size"] == (3, 240, 240)
    assert tuple(net.pretrained_cfg["mean"]) == tower.mean


def test_the_program_trains_resumes_and_says_what_is_wrong(pictures, tmp_path, monkeypatch, capsys):
    import runpy

    program = str(ROOT / "launch" / "flexify.py")
    monkeypatch.setattr("contrastive.distributed.shutdown", lambda: None)  # other tests go on

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["flexify.py", *arguments])
        runpy.run_path(program, run_name="__main__")
        return capsys.readouterr().out

    flags = [
        "imagenet", "--name", "x", "--out", str(tmp_path), "--steps", "2",
        "--data.shards", f"{pictures}/*.tar", "--data.num-workers", "0",
        "--teacher.tower", GAP_TOWER, "--student.patch-sizes", "60", "48", "--zero.stage", "0",
        "--student.grid", "16", "--global-batch-size", "4", "--val-samples", "8",
        "--data.views", "3", "--checkpoint-every", "1", "--optim.warmup-steps", "0",
    ]  # fmt: skip
    assert f"tower: {tmp_path / 'x' / 'model'}" in call(*flags)
    tower = load_vision_tower(str(tmp_path / "x" / "model"))
    assert tower.net.patch_embed.proj.weight.shape[-1] == 32
    assert tower.patch_sizes == (60, 48)
    call("--resume", str(tmp_path / "x"))
    for wrong, sentence in (
        (["--resume", str(tmp_path / "x"), "--student.pooling", "map"], "cannot change on resume"),
        (["imagenet21k"], "unknown recipe 'imagenet21k'; allowed: clip, dinov2s, imagenet"),
        ([*flags, "--name", "y", "--student.patch-sizes", "37"], "patch size 37 does not divide"),
        ([*flags, "--name", "y", "--student.patch-sizes"], "--student.patch-sizes is empty"),
    ):
        with pytest.raises(SystemExit) as stopped:
            call(*wrong)
        assert stopped.value.code == 2
        said = capsys.readouterr()
        assert sentence in " ".join((said.err + said.out).split())


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"student": {"patch_sizes": (37,)}},
            "patch size 37 does not divide the image side of 240",
        ),
        ({"student": {"patch_sizes": ()}}, "student.patch_sizes is empty"),
        (
            {"student": {"image_size": 31, "patch_sizes": None}},
            "student.image_size 31: no patch size gives a grid",
        ),
        ({"student": {"grid": -1}}, "student.grid -1: at least 0"),
        ({"student": {"max_aspect": 0.5}}, "student.max_aspect 0.5: allowed are 1 to 8"),
        ({"student": {"patch_sizes": (48,), "patch_weights": (1.0, 2.0)}}, "one for each"),
        ({"student": {"trainable": ("nothing",)}}, "'nothing' finds no parameter"),
        ({"student": {"num_classes": 7}}, "teacher has 10, the student 7; allowed"),
        ({"student": {"tower": "wide"}, "loss": {"kl": 0.0}}, "have width 32 and the student's 48"),
        ({"student": {"pooling": "token", "tower": GAP_TOWER}}, "has no class token; allowed: own"),
        (
            {"student": {"trainable": ("head",)}, "loss": {"kl": 0.0, "labels": 0.0}},
            "leaves nothing that these losses could train",
        ),
        ({"teacher": {"patch_size": 37}}, "patch size 37 does not divide"),
        ({"student": {"patch_sizes": (48, 0)}}, "patch size 0 does not divide"),
        ({"student": {"patch_sizes": (48, -3)}}, "patch size -3 does not divide"),
        ({"loss": {"kl": 0.0, "features": 0.0, "labels": 0.0}}, "are all 0: weigh one"),
        (
            {"patch_dropout": {"keep_rate": 0.0}},
            "patch_dropout.keep_rate 0.0: allowed are shares above 0",
        ),
        ({"augment": {"randaugment": 31}}, "augment.randaugment 31: allowed are 0 to 30"),
        ({"optim": {"name": "adafactor"}, "zero": {"stage": 2}}, "adafactor needs zero.stage 0"),
        ({"optim": {"cooldown_steps": 3}}, "optim.cooldown_steps needs optim.schedule linear"),
        (
            {"global_batch_size": 7, "zero": {"micro_batch_size": 0}},
            "augment.mixup needs pairs: global_batch_size 7",
        ),
        (
            {"data": {"features": "cache"}},
            "what the teacher says of whole images; leave out the cache, or student.max_aspect",
        ),
        (
            {"student": {"max_aspect": 1.0}, "data": {"features": "cache"}},
            "leave out augment.randaugment and augment.mixup, or the cache",
        ),
        ({"val_shards": ("/no/such.tar",)}, "no shard matches"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_training(changes, sentence, pictures, tmp_path):
    if changes.get("student", {}).get("tower") == "wide":
        from contrastive.vision.formats.own_format import save_vision_tower

        args = {"embed_dim": 48, "depth": 1, "num_heads": 2, "num_classes": 10}
        wide = TowerConfig("vit_tiny_patch16_224", args, image_size=224)
        save_vision_tower(build_vision_tower(wide), tmp_path / "wide")
        student = {"tower": str(tmp_path / "wide"), "patch_sizes": None}
        changes = {**changes, "student": student}
    with pytest.raises(UsageError, match=sentence) as refused:  # noqa: PT012
        cfg = config(tmp_path, pictures)
        for name, value in changes.items():
            part = getattr(cfg, name)
            if isinstance(value, dict):
                value = dataclasses.replace(part, **value)
            cfg = dataclasses.replace(cfg, **{name: value})
        flexify(cfg)
    assert str(refused.value).count(". ") == 0
    assert not (tmp_path / "run").exists()


def test_labels_out_of_range_are_refused_before_training(pictures, tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("a.cls", b"12")])
    data = dataclasses.replace(config(tmp_path, pictures).data, shards=(str(tmp_path / "x.tar"),))
    with pytest.raises(UsageError, match="hold label 12, but the student has 10 classes; allowed"):
        flexify(config(tmp_path, pictures, data=data))
    write_tar(tmp_path / "x.tar", [("a.png", png(1))])
    with pytest.raises(UsageError, match=r"needs KEY\.cls members"):
        flexify(config(tmp_path, pictures, data=data))
    write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("a.cls", b"1.0")])
    with pytest.raises(UsageError, match=r"data.shards hold 1 that are no class number"):
        flexify(config(tmp_path, pictures, data=data))
    write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("a.cls", b"7")])
    cfg = config(tmp_path, pictures, val_shards=(str(tmp_path / "x.tar"),))
    cfg = dataclasses.replace(cfg, loss=DistillationConfig(labels=1.0))
    cfg = dataclasses.replace(cfg, student=dataclasses.replace(cfg.student, num_classes=3))
    with pytest.raises(UsageError, match=r"data.shards hold label 9, but the student has 3"):
        flexify(cfg)
    write_tar(tmp_path / "low.tar", [("a.png", png(1)), ("a.cls", b"2")])
    data = dataclasses.replace(cfg.data, shards=(str(tmp_path / "low.tar"),))
    with pytest.raises(UsageError, match="val_shards hold label 7, but the student has 3"):
        flexify(dataclasses.replace(cfg, data=data))
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_a_head_cannot_teach_classes(pictures, tmp_path):
    cfg = config(tmp_path, pictures, teacher=TeacherConfig("dinov2s"))
    with pytest.raises(UsageError, match=r"teacher\.tower dinov2s has no class head; allowed"):
        flexify(dataclasses.replace(cfg, student=StudentConfig()))


def test_a_student_that_diverges_is_not_saved(pictures: Path, tmp_path: Path) -> None:
    optim = OptimConfig(name="sgd", lr=1e30, clip_norm=0.0)
    with pytest.raises(DataError, match=r"step \d: .*lower optim\.lr"):
        flexify(config(tmp_path, pictures, optim=optim))
    assert not (tmp_path / "run" / "model").exists()


# ---- a whole model ---------------------------------------------------------------------------


def test_a_clip_becomes_flexible_with_its_own_texts(pictures, tmp_path, capsys):
    """One run: what it leaves is a model, from a checkpoint or from the model of an index."""
    say_once.cache_clear()
    torch.manual_seed(0)
    make_open_clip(tmp_path / "clip", OWN_VIT)
    spec = f"open_clip:local-dir:{tmp_path / 'clip'}"
    LitModel.from_pretrained(spec).save_pretrained(tmp_path / "saved")  # offers patch 16 alone
    texts, images = ["a cat", "two dogs"], torch.randn(2, 3, 64, 64)
    for name, teacher in (("spec", spec), ("folder", str(tmp_path / "saved"))):
        start = LitModel.from_pretrained(teacher)
        cfg = config(
            tmp_path, pictures, name, steps=2,
            teacher=TeacherConfig(tower=teacher), student=StudentConfig(),
            loss=DistillationConfig(distance="mse", normaliser_samples=16),
            augment=AugmentConfig(),
        )  # fmt: skip
        folder = flexify(cfg) / "model"
        assert "loss.distance" not in capsys.readouterr().err
        model = LitModel.from_pretrained(folder)
        assert model.patch_sizes == (16, 8, 4)
        torch.testing.assert_close(model.encode_text(texts), start.encode_text(texts))
        torch.testing.assert_close(model.text.scale(), start.text.scale())
        assert not torch.equal(model.encode_image(images, 8), start.encode_image(images, 8))
        tower = load_vision_tower(str(folder))
        torch.testing.assert_close(tower(images, 8), model.vision(images, 8))
        saved = json.loads((folder / "config.json").read_text())
        assert set(saved["validation"]["patch_sizes"]) == {"16", "8", "4"}
        card = ModelCard.load(folder / "README.md")
        assert f"made flexible with {teacher} as its teacher" in card.text
        assert "against the teacher: cosine, %" in card.text
        assert card.data.pipeline_tag == "zero-shot-image-classification"
    loss = dataclasses.replace(cfg.loss, distance="cosine")
    flexify(dataclasses.replace(cfg, name="cosine", steps=1, loss=loss))
    assert "loss.distance cosine leaves open how long features are" in capsys.readouterr().err


def test_a_student_of_another_space_gets_no_texts(pictures, tmp_path):
    make_open_clip(tmp_path / "clip", OWN_VIT)
    spec = f"open_clip:local-dir:{tmp_path / 'clip'}"
    loss = DistillationConfig(features=0.0, labels=1.0)
    student = StudentConfig(tower=GAP_TOWER, num_classes=10, patch_sizes=(48,))
    cfg = config(
        tmp_path, pictures, steps=1, teacher=TeacherConfig(tower=spec), student=student, loss=loss
    )
    with pytest.raises(UsageError, match="does not describe a model"):
        LitModel.from_pretrained(flexify(cfg) / "model")


def test_it_is_said_why_a_student_gets_no_texts(pictures, tmp_path, capsys):
    say_once.cache_clear()
    make_open_clip(tmp_path / "clip", OWN_VIT)
    file = tmp_path / "clip/open_clip_config.json"
    facts = json.loads(file.read_text())
    facts["model_cfg"]["text_cfg"] |= {"hf_model_name": "any", "hf_pooler_type": "max_pooler"}
    file.write_text(json.dumps(facts))
    spec = f"open_clip:local-dir:{tmp_path / 'clip'}"
    assert teachers_model(config(tmp_path, pictures, teacher=TeacherConfig(spec))) is None
    said = capsys.readouterr().err
    assert "the result is an image tower alone: open_clip:local-dir:clip cannot be used" in said
