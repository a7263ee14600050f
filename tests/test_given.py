"""What people pass: one image or many, as files, pictures, arrays or tensors, all to one result."""

from pathlib import Path
from typing import Any

import hostile_images as hostile
import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.model.lit import LitModel
from data import given
from data.errors import UsageError
from data.images import decode_image
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.search.searcher import Searcher


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture that EXIF turns, one of a palette with a transparent colour, one RGB likewise."""
    folder = tmp_path_factory.mktemp("turned")
    ramp = np.add.outer(np.arange(60), 3 * np.arange(90)).astype(np.uint8)
    pixels = np.stack([ramp, ramp // 2, 255 - ramp], -1)
    exif = Image.Exif()
    exif[0x0112] = 6
    half = pixels.copy()
    half[:, :45] = (1, 2, 3)
    palette = Image.fromarray(ramp % 4 * 60).convert("P")
    files = {name: folder / f"{name}.png" for name in ("palette", "rgb")}
    palette.save(files["palette"], transparency=palette.getpixel((0, 0)))
    Image.fromarray(half).save(files["rgb"], transparency=(1, 2, 3))
    files["exif"] = folder / "exif.jfif"
    files["exif"].write_bytes(hostile.encode(Image.fromarray(pixels), "JPEG", exif=exif))
    return files


@pytest.mark.parametrize("kind", ["exif", "palette", "rgb"])
def test_a_picture_opened_by_its_caller_is_the_picture_of_its_file(
    kind: str, turned: dict[str, Path], tiny_model: LitModel
) -> None:
    file = turned[kind]
    decoded = decode_image(file.read_bytes(), 10_000)
    wanted = tiny_model.encode_image(tiny_model.transform(decoded)[None], 48)
    with Image.open(file) as opened:
        size = opened.size
        plain = tiny_model.encode_image(np.asarray(opened.convert("RGB")), 48)
        assert (wanted - plain).abs().max() > 1e-4  # it matters
        for images in (opened, [opened], str(file), file, [file], np.asarray(decoded)):
            embeds = tiny_model.encode_image(images, 48)
            torch.testing.assert_close(embeds, wanted, rtol=0, atol=1e-6)
        assert opened.size == size  # as it was
        classifier = ZeroShotClassifier(tiny_model, ["cat", "dog"])
        expected = classifier.predict([decoded], 48)[1]
        for images in (opened, [file]):
            np.testing.assert_allclose(classifier.predict(images, 48)[1], expected, atol=1e-6)


def test_arrays_and_tensors_of_pixels_are_normalised(tiny_model: LitModel) -> None:
    side = tiny_model.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    wanted = tiny_model.encode_image([Image.fromarray(one) for one in pixels], 48)
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    normalised = torch.stack([tiny_model.transform(Image.fromarray(one)) for one in pixels])
    for images in (
        pixels, list(pixels), channels_first, list(channels_first), normalised, list(normalised),
    ):  # fmt: skip
        torch.testing.assert_close(tiny_model.encode_image(images, 48), wanted, rtol=0, atol=1e-6)
    for image in (pixels[0], channels_first[0], normalised[0]):
        row = tiny_model.encode_image(image, 48)
        torch.testing.assert_close(row, wanted[:1], rtol=0, atol=1e-6)
    grey = tiny_model.encode_image(pixels[0, :, :, 0], 48)
    assert torch.equal(grey, tiny_model.encode_image(Image.fromarray(pixels[0, :, :, 0]), 48))


def test_long_lists_take_several_forwards(
    tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def forward(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
        sizes.append(len(pixels))
        return torch.ones(len(pixels), tiny_model.vision.embed_dim)

    monkeypatch.setattr(tiny_model.vision, "forward", forward)
    assert tiny_model.encode_image([Image.new("RGB", (9, 9))] * 130, 48).shape[0] == 130
    assert sizes == [64, 64, 2]
    sizes.clear()
    pixels = torch.zeros(1, 3, 240, 240).expand(300, -1, -1, -1)
    assert tiny_model.encode_image(pixels, 48).shape[0] == 300
    assert sizes == [256, 44]
    assert tiny_model.encode_image([], 48).shape == tiny_model.encode_text([]).shape
    texts = tiny_model.encode_text(["a cat"] * 257 + ["two dogs"])
    torch.testing.assert_close(texts[-1:], tiny_model.encode_text("two dogs"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), "ndarray of float32, (8, 8, 3), is no image"),
        (np.zeros((8, 8, 2), np.uint8), "is no image"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "(8, 8, 3), is no image; allowed: paths"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "torch.int64"),
        ([None], "NoneType is no image"),
        ("missing.png", "missing.png cannot be read"),
        ([Path(__file__)], "text that begins"),
    ],
)
def test_what_is_no_image_is_said(images: object, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        [given.as_rgb(image) for image in given.list_images(images)]
    assert words in str(caught.value)
    with pytest.raises(UsageError, match="int is no image"):
        given.list_images(3)


def test_queries_are_texts_images_or_both(
    emoji_index: Path, tiny_model: LitModel, turned: dict[str, Path]
) -> None:
    searcher = Searcher.load(emoji_index, tiny_model, device="cpu")
    file = turned["exif"]  # .jfif

    def ids(queries: Any, **options: Any) -> list[list[int]]:
        return [[hit.id for hit in hits] for hits in searcher.search(queries, 9, **options)]

    by_image, by_text = ids([decode_image(file.read_bytes(), 10_000)]), ids(["a cat"])
    assert by_image != by_text
    with Image.open(file) as opened:
        for query in (str(file), file, [str(file)], opened):
            assert ids(query) == by_image
    assert ids("a cat") == by_text
    mixed = ids(["a cat", str(file), "a cat"], refine_patch_size=24)
    assert mixed[0] == mixed[2] == ids("a cat", refine_patch_size=24)[0]
    assert mixed[1] == ids(file, refine_patch_size=24)[0]
    with pytest.raises(UsageError, match="there is no such image"):
        searcher.search(["nowhere.avif"])
    with pytest.raises(UsageError, match=r"'caf\\udce9' is not valid Unicode"):
        searcher.search(["caf\udce9"])


def test_names_come_with_predictions_and_one_text_is_no_list_of_classes(
    tiny_model: LitModel,
) -> None:
    classifier = ZeroShotClassifier(tiny_model, ["cat", "red fox"], "a photo of a {c}")
    images = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    labels, scores = classifier.predict(images, 48)
    named = classifier.predict_names(images, 48, refine_patch_size=40, margin=0.0)
    assert [[one.name for one in line] for line in named] == [
        [classifier.class_names[n] for n in line] for line in labels
    ]
    np.testing.assert_allclose([[one.similarity for one in line] for line in named], scores)
    with pytest.raises(UsageError, match="class_names 'cat' is one text; a list is needed"):
        ZeroShotClassifier(tiny_model, "cat")


def test_objects_print_in_a_line(emoji_index: Path, tiny_model: LitModel) -> None:
    searcher = Searcher.load(emoji_index, tiny_model, device="cpu")
    printed = repr(searcher)
    assert f"{len(searcher):,} images at patch 48, 40" in printed
    assert "240 px, patch sizes 48, 40" in repr(tiny_model)
    classifier = ZeroShotClassifier(tiny_model, ["cat", "dog", "owl", "ox"])
    assert repr(classifier) == "ZeroShotClassifier(4 classes (cat, dog, owl, ...), 4 templates)"
    (hit,) = searcher.search("a cat", 1)[0]
    assert repr(hit).startswith(f"Hit({hit.similarity:.3f}, ")
    for one in (printed, repr(tiny_model), repr(hit), repr(searcher.model)):
        assert len(one) < 200
        assert "\n" not in one


def test_texts_and_images_are_encoded_in_one_call(
    tiny_model: LitModel, turned: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = turned["rgb"]
    array = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    with Image.open(file) as opened:
        mixed = ["a cat", str(file), opened, array, "two dogs", file]
        rows = tiny_model.encode(mixed, 48, batch_size=2)
    assert isinstance(rows, np.ndarray)
    assert (rows.shape, rows.dtype) == ((6, tiny_model.embed_dim), np.float32)
    texts = tiny_model.encode_text(["a cat", "two dogs"]).numpy()
    images = tiny_model.encode_image([file, array], 48).numpy()
    wanted = np.stack([texts[0], images[0], images[0], images[1], texts[1], images[0]])
    np.testing.assert_allclose(rows, wanted, atol=1e-6)
    for one, row in (("a cat", 0), (str(file), 1), (array, 3)):  # one, and no list of one
        np.testing.assert_allclose(tiny_model.encode(one, 48), wanted[row], atol=1e-6)
    tensor = tiny_model.encode(["a cat"], convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.shape == (1, tiny_model.embed_dim)
    assert tiny_model.encode([]).shape == (0, tiny_model.embed_dim)
    with pytest.raises(UsageError, match="there is no such image"):
        tiny_model.encode(["nowhere.jpg"])
    for wrong in (-1, 0, 65):
        with pytest.raises(UsageError, match=f"batch_size {wrong}: allowed are 1 to 64"):
            tiny_model.encode(["a cat"], batch_size=wrong)
