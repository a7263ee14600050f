"""Heads that find boxes by words: trained at several patch sizes, asked for anything at any."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import ranks
from launcher import ROOT
from PIL import Image
from safetensors.torch import load_file

from contrastive import LitModel
from contrastive.dense.box_heads import BoxHeads, Detections, box_bias
from contrastive.dense.config import DecoderConfig, DenseConfig, PicturesConfig
from contrastive.dense.decoder_folder import ClassTexts, load_decoder
from contrastive.dense.decoder_losses import BoxLoss, corners, match
from contrastive.dense.loop import train_decoder
from contrastive.dense.targets import BoxTargets
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.vision.config import VisionConfig
from data.dense.dense_dataset import DenseDataset
from data.dense.layouts import load_dense
from data.dense.picture import AnnotatedPicture, TrueBox
from data.errors import UsageError
from retrieval import TrainedDetector, TrainedSegmenter, evaluate_dense
from retrieval.dense.average_precision import ScoredBox, iou
from retrieval.dense.painted import framed
from retrieval.dense.trained_boxes import scored_boxes
from retrieval.evaluation.classify import embed_classes

STEPS = 6


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def targets(*pictures: Sequence[TrueBox], size: tuple[int, int] = (100, 100)) -> torch.Tensor:
    """As a batch has them."""
    made, image = BoxTargets(), Image.new("RGB", size)
    found = [made.of(AnnotatedPicture("", image, boxes=tuple(p)), 240) for p in pictures]
    return torch.from_numpy(made.stack(found))


# ---- heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (16, 16)])
def test_heads_read_any_grid_and_no_patch_sees_another(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    heads = BoxHeads(32, 24, 16)
    features, queries = torch.randn(2, *grid, 32), unit(7, 24)
    both = heads(features, queries)
    count = grid[0] * grid[1]
    assert (both.logits.shape, both.boxes.shape) == ((2, count, 7), (2, count, 4))
    assert ((both.boxes > 0) & (both.boxes < 1)).all()
    alone = heads(features[:, -1:, -1:], queries)
    torch.testing.assert_close(alone.logits[:, 0], both.logits[:, -1])
    cosines = heads.embed(features) @ queries.T
    torch.testing.assert_close((cosines - 0.5) * 10, both.logits)  # before training


@pytest.mark.parametrize("grid", [(2, 4), (16, 16)])
def test_a_box_of_zeros_is_the_patch_itself(grid: tuple[int, int]) -> None:
    rows, columns = grid
    boxes = corners(box_bias(rows, columns).sigmoid()).unflatten(0, grid)
    for row in range(rows):
        for column in range(columns):
            own = [column / columns, row / rows, (column + 1) / columns, (row + 1) / rows]
            torch.testing.assert_close(boxes[row, column], torch.tensor(own))


# ---- matching and loss -----------------------------------------------------------------------


def test_matching_does_not_depend_on_the_order_of_boxes() -> None:
    torch.manual_seed(1)
    found = Detections(torch.randn(1, 12, 5), torch.rand(1, 12, 4) * 0.5 + 0.1)
    classes, true = torch.tensor([0, 3, 3, 1]), torch.rand(4, 4) * 0.5 + 0.1
    pairs = dict(zip(*(t.tolist() for t in match(found, classes, true)), strict=True))
    assert sorted(pairs.values()) == [0, 1, 2, 3]
    turned = [2, 0, 3, 1]
    again = match(found, classes[turned], true[turned])
    assert {p: turned[n] for p, n in zip(*(t.tolist() for t in again), strict=True)} == pairs
    few = match(Detections(found.logits[:, :2], found.boxes[:, :2]), classes, true)
    assert len(few[0]) == 2  # fewer patches than boxes


def test_the_loss_is_that_of_the_sets_not_of_their_order() -> None:
    torch.manual_seed(2)
    loss = BoxLoss(BoxHeads(8, 6, 8), unit(3, 6))
    features = torch.randn(1, 4, 4, 8)
    boxes = [TrueBox((5, 5, 30, 20), 1), TrueBox((40, 50, 50, 40), 3), TrueBox((60, 5, 20, 30), 1)]
    one, other = (loss(features, targets(order)) for order in (boxes, boxes[::-1]))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        loss(features, torch.cat([targets(boxes), torch.zeros(1, 2, 6)], 1)), one
    )
    assert loss.count(targets(boxes, [])).item() == 3


def test_the_loss_falls_to_nothing_on_what_can_be_learned_by_heart() -> None:
    torch.manual_seed(3)
    loss = BoxLoss(BoxHeads(16, 8, 64), unit(4, 8))
    features = torch.randn(2, 4, 4, 16)
    wanted = targets(
        [TrueBox((10, 10, 30, 30), 1), TrueBox((50, 40, 40, 55), 2)], [TrueBox((20, 30, 50, 40), 4)]
    )
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3)
    shares = []
    for _ in range(600):
        share = loss(features, wanted) / loss.count(wanted)
        optimizer.zero_grad()
        share.backward()
        optimizer.step()
        shares.append(share.item())
    assert shares[0] > 1
    assert shares[-1] < 0.05
    (first, second) = scored_boxes(loss.decoder(features, loss.class_embeds), [(100, 100)] * 2, 0.5)
    assert [box.label for box in first] in ([1, 2], [2, 1])
    assert [box.label for box in second] == [4]
    assert iou(second[0].box, (20, 30, 50, 40)) > 0.9


def test_what_does_not_count_has_no_gradient_and_no_boxes_are_told_from_no_picture() -> None:
    torch.manual_seed(4)
    loss = BoxLoss(BoxHeads(8, 6, 8), unit(3, 6))
    features = torch.randn(1, 4, 4, 8)
    unusable = torch.from_numpy(BoxTargets().of_unusable(240))[None]
    loss(features, unusable).backward()
    assert loss.count(unusable) == 0
    assert not loss.decoder.class_embed.weight.grad.any()
    empty = targets([])
    loss(features, empty).backward()
    assert loss.count(empty) == 0
    assert loss.decoder.class_embed.weight.grad.any()  # whatever is found there is wrong


def test_a_crowd_is_matched_to_nothing_and_excuses_its_class_within_it() -> None:
    torch.manual_seed(5)
    loss = BoxLoss(BoxHeads(8, 6, 8), unit(3, 6))
    features = torch.randn(1, 4, 4, 8)
    crowd, empty = targets([TrueBox((0, 0, 100, 100), 2, crowd=True)]), targets([])
    assert loss.count(crowd) == 0
    others = BoxLoss(loss.decoder, loss.class_embeds[[0, 2]])
    torch.testing.assert_close(loss(features, crowd), others(features, empty))
    small = targets([TrueBox((0, 0, 1, 1), 2, crowd=True)])
    torch.testing.assert_close(loss(features, small), loss(features, empty))


def test_boxes_are_cut_at_the_pictures_edges() -> None:
    given = [
        TrueBox((-20, 10, 40, 20), 1),
        TrueBox((150, 90, 100, 30), 2),
        TrueBox((300, 0, 5, 5), 1),
    ]
    found = targets(given, size=(200, 100))[0]
    assert found[:, 0].tolist() == [1, 2]  # the third is outside
    expected = torch.tensor([[0.0, 0.1, 0.1, 0.3], [0.75, 0.9, 1.0, 1.0]])
    torch.testing.assert_close(corners(found[:, 2:]), expected)


# ---- training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tiny_model: LitModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes") / "model"
    tiny_model.save_pretrained(folder)
    return folder


def config(out: Path, name: str, scenes: Path, model: Path, **changes: Any) -> DenseConfig:
    cfg = DenseConfig(
        name=name,
        out=str(out),
        data=PicturesConfig(str(scenes / "train")),
        vision=VisionConfig(tower=str(model), patch_sizes=(48, 40)),
        decoder=DecoderConfig("boxes", 32),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        global_batch_size=4,
        steps=STEPS,
        log_every=1,
        checkpoint_every=3,
    )
    return replace(cfg, **changes)


def texts(model: LitModel, dataset: DenseDataset) -> ClassTexts:
    embeds = embed_classes(model, dataset.class_names, dataset.templates)
    return ClassTexts(embeds, model.text_fingerprint, model.image_affine())


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="module")
def trained(
    small_scenes: Path, tiny_model: LitModel, model_folder: Path, tmp_path_factory: Any
) -> Path:
    scenes = load_dense(small_scenes / "train")
    cfg = config(tmp_path_factory.mktemp("runs"), "whole", small_scenes, model_folder)
    return train_decoder(cfg, scenes, texts=texts(tiny_model, scenes))


def test_training_learns_and_finds_what_it_was_never_trained_to(
    trained: Path, small_scenes: Path
) -> None:
    found = losses(trained)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    scenes = load_dense(small_scenes / "heldout_captions")
    detector = TrainedDetector.from_pretrained(trained / "model", threshold=0.0)
    assert detector.class_names == list(load_dense(small_scenes / "train").class_names)
    assert detector.patch_sizes == (48, 40)
    asked = detector.asked(scenes.class_names, scenes.templates)
    picture = scenes.pictures.load(0).image.resize((90, 70))
    for size in (48, 24):  # at a patch size too that training did not draw
        (boxes,) = asked.predict(picture, size)
        scores = [one.score for one in boxes]
        assert scores == sorted(scores, reverse=True)
        assert 0 < len(boxes) <= 300
        assert {one.label for one in boxes} <= set(range(1, 21))
        for left, top, width, height in (one.box for one in boxes):
            assert min(left, top) >= 0
            assert left + width <= 90 + 1e-4
            assert top + height <= 70 + 1e-4
    strict = TrainedDetector.from_pretrained(trained / "model", scenes.class_names, threshold=1.0)
    assert strict.predict(picture, 48) == [[]]
    result = evaluate_dense(asked, scenes, [48, 40])
    assert result.num_images == 3
    assert result.dense[40].miou is None
    assert 0 <= result.dense[40].ap <= result.dense[40].ap50 <= 1


def test_of_two_boxes_of_one_query_that_overlap_the_better_is_given() -> None:
    boxes = torch.tensor([[[0.3, 0.3, 0.4, 0.4], [0.31, 0.3, 0.4, 0.4], [0.8, 0.8, 0.6, 0.2]]])
    logits = torch.tensor([[[2.0, -9.0], [1.0, 1.5], [0.5, -9.0]]])
    (found,) = scored_boxes(Detections(logits, boxes), [(100, 200)], 0.1)
    assert [one.label for one in found] == [1, 2, 1]
    assert found[0].box == pytest.approx((20, 10, 80, 40))
    assert found[2].box == pytest.approx((100, 70, 100, 20))  # cut at the edge


@pytest.fixture
def by_patch(trained: Path, tiny_model: LitModel) -> Callable[[torch.Tensor], TrainedDetector]:
    """A detector of one vector, whose boxes are the patches themselves."""
    loaded = load_decoder(trained / "model")
    assert isinstance(loaded.decoder, BoxHeads)
    last = loaded.decoder.box_head[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    return lambda vector: TrainedDetector(
        loaded, tiny_model, ["thing"], threshold=0.0, class_embeds=vector[None].numpy()
    )


def test_a_small_thing_in_the_corner_of_a_large_picture_has_its_box_there(
    by_patch: Callable[[torch.Tensor], TrainedDetector], tiny_model: LitModel
) -> None:
    picture = Image.new("RGB", (1920, 960), "gray")
    picture.paste("red", (1824, 864, 1920, 960))
    corner = picture.crop((1440, 480, 1920, 960))  # the last window of 240 pixels
    other = by_patch(unit(tiny_model.embed_dim))
    thing = other.heads.embed(other._features(corner, 48))[0, -1]
    detector = by_patch(thing.detach())
    found = detector.predict(picture, 48, shorter_side=480)[0]
    assert found[0].box == pytest.approx((1824, 864, 96, 96), abs=0.1)
    assert found[0].score == pytest.approx(detector.predict(corner, 48)[0][0].score, abs=1e-3)
    assert len(found) == 10 * 20  # what several windows show is one thing
    (whole,) = detector.predict(picture, 48)
    assert whole[0].box[2] > 2 * 96


def test_one_window_is_the_picture_as_a_whole(trained: Path, small_scenes: Path) -> None:
    detector = TrainedDetector.from_pretrained(trained / "model", ["lemon"], threshold=0.0)
    picture = load_dense(small_scenes / "train").pictures.load(0).image.resize((333, 333))
    assert detector.predict(picture, 48, shorter_side=240) == detector.predict(picture, 48)


def test_a_picture_of_a_thing_is_a_query(trained: Path, tiny_model: LitModel) -> None:
    red, green = (Image.new("RGB", (240, 240), colour) for colour in ("red", "lime"))
    detector = TrainedDetector(load_decoder(trained / "model"), tiny_model, [red, green])
    assert detector.class_names == ["picture 1", "picture 2"]
    features = detector._features(green, None)
    own = detector.heads.embed(features)[0] @ detector.class_embeds[1]
    assert own.max().item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(UsageError, match="1 texts and 1 pictures"):
        detector.asked([red, "lime"])


def test_micro_batches_and_ranks_change_nothing(
    trained: Path, small_scenes: Path, tiny_model: LitModel, model_folder: Path, tmp_path: Path
) -> None:
    scenes = load_dense(small_scenes / "train")
    parts = config(
        tmp_path, "parts", small_scenes, model_folder, zero=ZeroConfig(micro_batch_size=1)
    )
    folder = train_decoder(parts, scenes, texts=texts(tiny_model, scenes))
    np.testing.assert_allclose(losses(folder), losses(trained), rtol=1e-4)
    flags = {
        "name": "two", "out": tmp_path, "data.pictures": small_scenes / "train",
        "data.features": tmp_path / "features", "vision.tower": model_folder,
        "decoder.width": 32, "optim.lr": 1e-3, "optim.warmup-steps": 1, "global-batch-size": 4,
        "steps": STEPS, "log-every": 1, "zero.stage": 2, "eval-every": STEPS,
        "eval-patch-sizes": 40,
    }  # fmt: skip
    typed = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    typed += ["--vision.patch-sizes", "48", "40"]
    typed += ["--eval-data", str(small_scenes / "heldout_style")]
    done = ranks(2, ROOT / "launch/dense.py", "boxes", *typed)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(trained), rtol=1e-2)
    lines = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    assert any("heldout_style/p40/ap50" in line for line in lines)


def test_patches_start_where_whole_pictures_meet_the_texts(
    small_scenes: Path, tiny_model: LitModel, model_folder: Path, tmp_path: Path
) -> None:
    scenes = load_dense(small_scenes / "train")
    optim = OptimConfig(lr=1e-12, weight_decay=0.0)
    cfg = config(tmp_path, "still", small_scenes, model_folder, steps=1, optim=optim)
    folder = train_decoder(cfg, scenes, texts=texts(tiny_model, scenes))
    heads = load_decoder(folder / "model").decoder
    assert isinstance(heads, BoxHeads)
    features = torch.randn(2, 3, 4, tiny_model.vision.embed_dim)
    expected = tiny_model.embed_features(features.flatten(0, 2)).unflatten(0, (2, 12))
    torch.testing.assert_close(heads.embed(features), expected, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(
    trained: Path, small_scenes: Path, tiny_model: LitModel, model_folder: Path, tmp_path: Path
) -> None:
    scenes = load_dense(small_scenes / "train")
    cfg = config(tmp_path, "whole", small_scenes, model_folder, eval_every=1)
    said = texts(tiny_model, scenes)

    def stop(step: int, decoder: object) -> dict[str, float]:
        if step == 5:
            raise InterruptedError
        return {}

    with pytest.raises(InterruptedError):
        train_decoder(cfg, scenes, [stop], texts=said)
    with pytest.raises(UsageError, match=r"was trained with texts .*, now it is another"):
        train_decoder(cfg, scenes, texts=replace(said, fingerprint="another"), resume=True)
    train_decoder(cfg, scenes, [lambda step, decoder: {}], texts=said, resume=True)
    expected = load_file(trained / "model" / "model.safetensors")
    found = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_what_cannot_work_is_one_sentence(
    trained: Path, small_scenes: Path, tiny_model: LitModel, model_folder: Path, tmp_path: Path
) -> None:
    scenes = load_dense(small_scenes / "train")
    cfg = config(tmp_path, "run", small_scenes, model_folder)
    with pytest.raises(UsageError, match=r"decoder\.kind boxes: boxes need texts"):
        train_decoder(cfg, scenes)
    root = shutil.copytree(small_scenes / "train", tmp_path / "scenes")
    (root / "annotations.json").unlink()
    with pytest.raises(UsageError, match=r"\(no_boxes 3\); this decoder needs pictures with boxes"):
        train_decoder(cfg, load_dense(root), texts=texts(tiny_model, scenes))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="a decoder of kind boxes gives no masks"):
        TrainedSegmenter.from_pretrained(trained / "model")
    loaded = load_decoder(trained / "model")
    with pytest.raises(UsageError, match=r"threshold 2.0: a probability, 0 to 1"):
        TrainedDetector(loaded, tiny_model, threshold=2.0)
    with pytest.raises(UsageError, match=r"were trained with the texts of"):
        TrainedDetector(replace(loaded, texts="another"), tiny_model)


# ---- what it is good for afterwards ----------------------------------------------------------


@pytest.fixture
def segment(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """launch/segment.py with the heads: exit status and what was said."""

    def run(*flags: object) -> tuple[int, str]:
        words = ["segment.py", "--model", str(trained / "model"), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            runpy.run_path(str(ROOT / "launch" / "segment.py"), run_name="__main__")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, "".join(capsys.readouterr())

    return run


def test_heads_are_reported_as_a_model_is(
    segment: Callable[..., tuple[int, str]], small_scenes: Path
) -> None:
    code, said = segment("--root", small_scenes / "heldout_captions", "--patch-sizes", 48, 40)
    assert code == 0, said
    assert "AP50" in said
    assert "mIoU" not in said.split("In per cent")[0]
    assert [line.split()[0] for line in said.splitlines() if line.split()[:1] in (["48"], ["40"])]


@pytest.mark.parametrize("shorter_side", [None, 480])
def test_boxes_of_own_pictures_are_framed_and_listed(
    shorter_side: int | None, segment: Callable[..., tuple[int, str]], small_scenes: Path,
    trained: Path, tmp_path: Path,
) -> None:  # fmt: skip
    picture = small_scenes / "heldout_style/images/000000.png"
    names = ["a red bicycle", "smile"]
    larger = [] if shorter_side is None else ["--shorter-side", shorter_side]
    code, said = segment(
        "--pictures", picture, "--class-names", *names, "--out", tmp_path / "out", *larger
    )
    assert code == 0, said
    found = json.loads((tmp_path / "out/patch_40/boxes/000000.json").read_text())["boxes"]
    detector = TrainedDetector.from_pretrained(trained / "model", names)
    assert detector.threshold == 0.1
    (expected,) = detector.predict(picture, shorter_side=shorter_side)
    assert [one["name"] for one in found] == [names[box.label - 1] for box in expected]
    assert [one["score"] for one in found] == pytest.approx([box.score for box in expected])


def test_a_frame_is_where_its_box_is() -> None:
    white = Image.new("RGB", (300, 200), "white")
    boxes = [ScoredBox((100, 60, 150, 100), 300, 0.5)]  # more names than the palette has colours
    changed = np.asarray(framed(white, boxes, [f"thing {n}" for n in range(300)])) != 255
    rows, columns = np.flatnonzero(changed.any((1, 2))), np.flatnonzero(changed.any((0, 2)))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (60, 160, 100, 250)
    assert not changed[120:150, 110:240].any()
    assert np.array_equal(framed(white, [], []), white)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--root", "ROOT", "--background", "0.1"], "--background is of cosines"),
        (["--root", "ROOT", "--windows", "3"], "--windows is of cosines"),
        (["--root", "ROOT", "--patch-sizes", "47"], "47"),
    ],
)
def test_what_heads_of_boxes_cannot_do_is_one_sentence(
    flags: list[str], says: str, segment: Callable[..., tuple[int, str]], small_scenes: Path
) -> None:
    code, said = segment(*(flag.replace("ROOT", str(small_scenes / "train")) for flag in flags))
    assert code == 2
    assert says in said
