"""Zero-shot segmentation: masks at a picture's own resolution, and how they are counted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_TOWER
from PIL import ExifTags, Image

from contrastive import LitModel, load_vision_tower
from contrastive.model.text_side import TextSide
from contrastive.vision.select_features import select_features
from data.errors import DataError, UsageError
from retrieval import ZeroShotSegmenter, evaluate_dense, load_dense
from retrieval.dense import segment
from retrieval.dense.miou import IoUCounter

NAMES = ["red", "green", "blue"]
PIXELS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [128, 128, 128]]], np.uint8)


@pytest.fixture(scope="module")
def model(tiny_model: LitModel) -> LitModel:
    """By the value path of its one block, a patch's vector is a function of its own pixels."""
    tower = select_features(load_vision_tower(TINY_TOWER), "mean@1")
    return LitModel(tower, TextSide(tiny_model.text.encoder, tiny_model.text.loss)).eval()


@pytest.fixture(scope="module")
def segmenter(model: LitModel) -> ZeroShotSegmenter:
    """Its classes are what the model makes of pictures of one colour."""
    colours = [Image.new("RGB", (240, 240), colour) for colour in NAMES]
    maps = model.encode_patches(colours, 40, value_path=True)
    means = torch.nn.functional.normalize(maps.mean((1, 2)), dim=-1).numpy()
    return ZeroShotSegmenter(model, NAMES, value_path=True, class_embeds=means)


def picture(height: int, width: int) -> Image.Image:
    """Red and green over blue and grey."""
    return Image.fromarray(PIXELS).resize((width, height), Image.Resampling.NEAREST)


@pytest.mark.parametrize("shape", [(240, 240), (120, 360), (700, 501), (7, 5)])
def test_a_mask_has_the_pictures_resolution_and_says_where_each_class_is(segmenter, shape):
    height, width = shape
    mask = segmenter.predict(picture(*shape), 40)[0]
    assert mask.shape == shape
    assert mask.dtype == np.uint8
    corners = mask[height // 6, width // 6], mask[height // 6, -1], mask[-1, width // 6]
    assert corners == (1, 2, 3)


@pytest.mark.parametrize("shorter_side", [240, 480, 560])
def test_windows_see_what_the_whole_picture_shows(segmenter, shorter_side):
    shape = (300, 450)
    found = segmenter.similarities(picture(*shape), 40, shorter_side=shorter_side)[0]
    rows, columns = shorter_side // 40, round(shorter_side * 1.5 / 40)
    assert found.shape == (rows, columns, 3)
    mask = segmenter.predict(picture(*shape), 40, shorter_side=shorter_side)[0]
    quarter = (mask[:140, :210], mask[:140, 240:], mask[160:, :210])
    for label, part in enumerate(quarter, 1):
        assert (part == label).mean() > 0.9


def test_windows_cover_everything_and_end_at_the_end():
    for length in range(1, 40):
        for window in range(1, length + 1):
            starts = segment._starts(length, window)
            covered = {i for start in starts for i in range(start, start + window)}
            assert covered == set(range(length))
            steps = np.diff(starts)
            assert (steps > 0).all()
            assert (steps <= max(1, window // 2)).all()


def test_a_picture_of_one_window_is_read_as_encode_patches_reads_it(segmenter, model):
    square = picture(240, 240)
    found = segmenter.similarities(square, 40)[0]
    patches = model.encode_patches(square, 40, value_path=True)[0]
    expected = patches @ segmenter.class_embeds.T
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    normalised = model.transform(square)
    for given in (normalised, [normalised], normalised[None]):
        np.testing.assert_allclose(segmenter.similarities(given, 40)[0], found, atol=1e-5)


def test_what_is_like_no_class_is_background(model, segmenter):
    most = segmenter.similarities(picture(240, 240), 40)[0].max(-1)
    grey, others = most[4:, 4:].max(), most[:2].min()
    assert grey < others
    vectors = segmenter.class_embeds.numpy()
    strict = ZeroShotSegmenter(
        model,
        NAMES,
        background=float(grey + others) / 2,
        value_path=True,
        class_embeds=vectors,
    )
    mask = strict.predict(picture(240, 240), 40)[0]
    assert (mask[10, 10], mask[10, -10], mask[-10, 10], mask[-10, -10]) == (1, 2, 3, 0)
    assert 0 not in segmenter.predict(picture(240, 240), 40)[0]


def test_class_embeddings_are_those_of_the_names(model):
    found = ZeroShotSegmenter(model, NAMES, "a {c} thing").class_embeds
    texts = model.encode_text([f"a {name} thing" for name in NAMES])
    torch.testing.assert_close(found, texts)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"class_names": []}, "at least one of each"),
        ({"class_names": ["x"] * 255}, "at most 254"),
        ({"class_names": NAMES, "background": 2.0}, "a cosine"),
        ({"class_names": NAMES, "templates": "no place"}, "has no {c}"),
    ],
)
def test_impossible_values_are_refused(values, says, model):
    with pytest.raises(UsageError, match=says):
        ZeroShotSegmenter(model, **values)


def test_impossible_pictures_are_refused(segmenter, model):
    square = picture(240, 240)
    for values, says in (
        ({"patch_size": 7}, "does not divide"),
        ({"patch_size": 40, "shorter_side": 10}, "at least a patch"),
        ({"patch_size": 8, "shorter_side": 40_000}, "at most 65,536"),
        ({"patch_size": 48, "shorter_side": 12_000}, "12,000 x 12,000 pixels: at most 100,000,000"),
    ):
        with pytest.raises(UsageError, match=says):
            segmenter.predict(square, **values)
    with pytest.raises(UsageError, match="already normalised"):
        segmenter.predict(model.transform(square), 40, shorter_side=480)
    with pytest.raises(UsageError, match="cannot be read"):
        segmenter.predict("no-such-file.png", 40)


# ---- metrics -----------------------------------------------------------------------------------


def test_iou_is_what_sets_of_pixels_say():
    rng = np.random.default_rng(0)
    counter, pairs = IoUCounter(4), []
    for _ in range(3):  # the third class is nowhere
        true, predicted = (rng.choice([0, 1, 2, 4], (6, 7)) for _ in range(2))
        true[rng.random((6, 7)) < 0.2] = 255
        counter.add(true, predicted)
        pairs += [(t, p) for t, p in zip(true.ravel(), predicted.ravel(), strict=True) if t != 255]
    result = counter.result()
    for label in range(5):
        both = sum(t == p == label for t, p in pairs)
        either = sum(label in pair for pair in pairs)
        wanted = both / either if either else np.nan
        np.testing.assert_equal(result.per_class[label], wanted)
    assert result.mean == np.nanmean(result.per_class)
    assert result.pixel_accuracy == sum(t == p for t, p in pairs) / len(pairs)
    assert counter.result([1, 3]).mean == result.per_class[1]
    assert np.isnan(IoUCounter(2).result().mean)


def test_iou_is_torchmetrics():
    """MulticlassJaccardIndex(7, ignore_index=255) of torchmetrics 1.9.0, fed in the same parts."""
    rng = np.random.default_rng(2)
    counter = IoUCounter(6)
    for _ in range(4):
        true, predicted = rng.integers(0, 7, (2, 31, 17))
        predicted = np.where(rng.random(true.shape) < 0.5, true, predicted)
        true[rng.random(true.shape) < 0.1] = 255
        counter.add(true, predicted)
    result = counter.result()
    assert result.mean == pytest.approx(0.4084707, abs=1e-6)
    assert result.per_class == pytest.approx(
        [0.3909574, 0.4140436, 0.396648, 0.4661836, 0.4043584, 0.3971831, 0.3899204], abs=1e-6
    )


def test_counts_of_parts_add_up():
    rng = np.random.default_rng(1)
    masks = rng.integers(0, 4, (2, 5, 8, 8))
    whole, parts = IoUCounter(3), [IoUCounter(3), IoUCounter(3)]
    for number, (true, predicted) in enumerate(masks.swapaxes(0, 1)):
        whole.add(true, predicted)
        parts[number % 2].add(true, predicted)
    assert np.array_equal(whole.counts, sum(part.counts for part in parts))
    assert whole.counts.sum() == 5 * 64


@pytest.mark.parametrize(
    ("true", "predicted", "says"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), "one size"),
        (np.full((2, 2), 4), np.zeros((2, 2)), "true label 4: allowed are 0 to 3, and 255"),
        (np.zeros((2, 2)), np.full((2, 2), 255), "predicted label 255"),
        (np.zeros((2, 2)), np.full((2, 2), -1), "predicted label -1"),
    ],
)
def test_labels_outside_the_list_are_never_guessed(true, predicted, says):
    counter = IoUCounter(3)
    with pytest.raises(UsageError, match=says):
        counter.add(true.astype(np.int64), predicted.astype(np.int64))
    assert not counter.counts.any()
    with pytest.raises(UsageError, match="label of a class"):
        IoUCounter(3, ignored=2)


# ---- folders -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good pictures."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classnames.txt").write_text("red\ngreen\nblue\n")
    mask = np.array([[1, 2], [3, 255]], np.uint8)
    for number in range(2):
        picture(80, 120).save(tmp_path / f"images/{number}.png")
        big = Image.fromarray(mask).resize((120, 80), Image.Resampling.NEAREST)
        big.save(tmp_path / f"masks/{number}.png")
    return tmp_path


def test_a_folder_is_judged_by_its_masks(folder, segmenter):
    result = evaluate_dense(segmenter, load_dense(folder), [40])
    assert (result.num_images, result.errors) == (2, {})
    assert result.dense[40].miou > 0.8
    exact = segmenter.predict(picture(80, 120), 40)[0]
    Image.fromarray(exact).save(folder / "masks/0.png")
    (folder / "images/1.png").unlink()
    assert evaluate_dense(segmenter, load_dense(folder), [40]).dense[40].miou == 1


def test_what_is_wrong_with_a_picture_is_counted(folder, segmenter):
    def add(name: str, mask: Image.Image | None) -> None:
        picture(80, 120).save(folder / f"images/{name}.png")
        if mask is not None:
            mask.save(folder / f"masks/{name}.png")

    add("a", None)
    add("b", Image.new("L", (80, 120)))
    add("c", Image.new("L", (120, 80), 4))
    add("d", Image.new("RGB", (120, 80)))
    (folder / "images/e.png").write_bytes(b"no picture")
    Image.new("L", (120, 80)).save(folder / "masks/e.png")
    result = evaluate_dense(segmenter, load_dense(folder), [40])
    assert result.num_images == 2
    wanted = {"no_mask": 1, "mask_size": 1, "mask_labels": 1, "unreadable": 2}
    assert result.errors == wanted
    with pytest.raises(DataError, match=r"images/a\.png: no .*masks/a\.png \(no_mask\)"):
        evaluate_dense(segmenter, load_dense(folder), [40], on_error="raise")


def test_a_mask_is_of_the_picture_as_its_exif_turns_it(folder):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # shown by a quarter turn
    for name, mask in (("as shown", (80, 120)), ("as stored", (120, 80))):
        picture(80, 120).save(folder / f"images/{name}.jpg", exif=turned)
        Image.new("L", mask).save(folder / f"masks/{name}.png")
    masks = load_dense(folder)
    assert (120, 80) in [one.mask.shape for one in masks]
    assert masks.skipped == {"mask_size": 1}


def test_folders_that_cannot_be_judged_are_refused(folder, segmenter, model):
    other = ZeroShotSegmenter(model, ["red"])
    with pytest.raises(UsageError, match="are not those of"):
        evaluate_dense(other, load_dense(folder), [40])
    for mask in folder.glob("masks/*"):
        mask.unlink()
    with pytest.raises(UsageError, match="no picture could be used"):
        evaluate_dense(segmenter, load_dense(folder), [40])
    for image in folder.glob("images/*"):
        image.unlink()
    with pytest.raises(UsageError, match="has no pictures"):
        load_dense(folder)


def test_windows_are_whole_pictures_that_say_where_things_are(model):
    """Any model can: here one whose vector is the mean of its patches' colours."""
    colours = [Image.new("RGB", (240, 240), colour) for colour in NAMES]
    embeds = model.encode_image(colours, 40).numpy()
    segmenter = ZeroShotSegmenter(model, NAMES, windows=(1, 3, 5), class_embeds=embeds)
    shape = (300, 450)
    mask = segmenter.predict(picture(*shape), 40)[0]
    assert mask.shape == shape
    assert [mask[20, 20], mask[20, -20], mask[-20, 20]] == [1, 2, 3]
    (map_,) = segmenter.similarities(picture(*shape), 40)
    whole = ZeroShotSegmenter(model, NAMES, windows=(1,), class_embeds=embeds)
    (one,) = whole.similarities(picture(240, 240), 40)
    assert map_.shape == one.shape == (32, 32, 3)
    expected = model.encode_image(picture(240, 240), 40).numpy() @ embeds.T
    np.testing.assert_allclose(one, np.broadcast_to(expected, one.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"windows": (0,)}, r"windows \(0,\): how many a side"),
        ({"windows": (17,)}, "at most 256 in all, not 289"),
        ({"windows": (3,), "value_path": True}, "value_path is of patches"),
    ],
)
def test_windows_that_cannot_be_are_refused(model, changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        ZeroShotSegmenter(model, NAMES, **changes)


def test_windows_are_cut_from_pictures(model):
    segmenter = ZeroShotSegmenter(model, NAMES, windows=(2,))
    with pytest.raises(UsageError, match="already normalised cannot be cut"):
        segmenter.predict(torch.zeros(1, 3, 240, 240), 40)
    with pytest.raises(UsageError, match="shorter_side is of patches"):
        segmenter.predict(picture(240, 240), 40, shorter_side=480)
