"""Tensors of image files hold Pillow's pixels, and what Pillow refuses is refused for the same
reason, whoever decodes."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from shard_maker import encode

from data import pixels
from data.errors import UsageError
from data.images import Augment, decode_image
from data.pixels import as_pixels, decode_pixels
from data.problems import BadSample
from data.transform import ImageTransform

LIMIT = 100_000


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something smooth with something rough in it, RGB."""
    rough = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ramp = np.add.outer(np.arange(height), np.arange(width)) * 255 // (width + height)
    smooth = np.stack([ramp, ramp[::-1], 255 - ramp], -1).astype(np.uint8)
    smooth[: height // 3, : width // 2] = rough[: height // 3, : width // 2]
    return Image.fromarray(smooth)


OPTIONS = [
    {},
    {"subsampling": 0},
    {"subsampling": 1},
    {"progressive": True},
    {"restart_marker_blocks": 2},
    {"progressive": True, "restart_marker_rows": 1},
    {"quality": 20, "optimize": True},
]


def jpegs() -> list[bytes]:
    return [
        encode(scene(*size).convert(mode), "JPEG", **options)
        for size in ((61, 47), (64, 48), (1, 9))
        for mode in ("RGB", "L", "CMYK")
        for options in OPTIONS
        if mode != "L" or "subsampling" not in options
    ]


def outcome(decode, data: bytes) -> "torch.Tensor | str":
    """The pixels, or what is wrong."""
    try:
        found = decode(data, LIMIT)
    except BadSample as bad:
        return str(bad)
    return as_pixels(found) if isinstance(found, Image.Image) else found


def assert_same(data: bytes) -> bool:
    """Both give the same; returns whether that is an image."""
    wanted, found = outcome(decode_image, data), outcome(decode_pixels, data)
    if isinstance(wanted, str) or isinstance(found, str):
        assert found == wanted
        return False
    assert torch.equal(found, wanted)
    return True


@pytest.mark.parametrize("number", range(len(jpegs())))
def test_jpegs_have_pillows_pixels(number: int) -> None:
    assert assert_same(jpegs()[number])


@pytest.mark.parametrize("orientation", range(10))
def test_jpegs_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert assert_same(encode(scene(40, 30), "JPEG", exif=exif))


def test_the_first_image_of_several_and_other_formats_are_pillows() -> None:
    out = io.BytesIO()
    scene(40, 30).save(out, "MPO", save_all=True, append_images=[scene(40, 30, 1)])
    assert assert_same(out.getvalue())
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        assert assert_same(encode(scene(40, 30), kind))
    assert assert_same(encode(scene(40, 30).convert("RGBA"), "PNG"))


def test_damaged_jpegs_come_to_the_same() -> None:
    draw = random.Random(0)
    good = 0
    for data in jpegs():
        scan = data.index(b"\xff\xda")
        for _ in range(12):
            good += assert_same(data[: draw.randrange(len(data))])
            for first, last in ((2, scan + 12), (scan + 12, len(data))):
                changed = bytearray(data)
                changed[draw.randrange(first, last)] = draw.randrange(256)
                good += assert_same(bytes(changed))
        assert_same(data[:-2])
        good += assert_same(data + draw.randbytes(20))
    assert good > 500  # many of them are images still


def test_damage_says_nothing_on_the_terminal(capfd: pytest.CaptureFixture) -> None:
    data = encode(scene(61, 47), "JPEG")
    for at in range(data.index(b"\xff\xda") + 12, len(data), 7):
        outcome(decode_pixels, data[:at] + b"\x55" + data[at + 1 :])
    assert capfd.readouterr() == ("", "")


def test_large_images_are_refused_by_their_header() -> None:
    with pytest.raises(BadSample, match=r"image_too_large: 400 x 300 pixels, the limit is 100000"):
        decode_pixels(encode(Image.new("RGB", (400, 300)), "JPEG"), LIMIT)


def test_pillow_decodes_only_what_libjpeg_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pixels.simplejpeg is not None
    data = encode(scene(61, 47), "JPEG")
    wanted = as_pixels(decode_image(data, LIMIT))
    with monkeypatch.context() as changed:
        changed.setattr(pixels, "decode_image", pytest.fail)
        assert torch.equal(decode_pixels(data, LIMIT), wanted)
    monkeypatch.setattr(pixels, "simplejpeg", None)  # as where it is not installed
    assert torch.equal(decode_pixels(data, LIMIT), wanted)


# ---- transform -------------------------------------------------------------------------------

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PILLOW, TORCH = (ImageTransform(32, MEAN, STD, version) for version in (1, 2))


@pytest.mark.parametrize(
    "size", [(40, 30), (30, 41), (57, 57), (224, 32), (31, 33), (32, 32), (9, 7), (300, 201)]
)
def test_versions_differ_by_a_level(size: tuple[int, int]) -> None:
    image = scene(*size)
    by_pillow, by_torch = PILLOW.square(image), TORCH.square(image)
    assert by_torch.shape == (3, 32, 32)
    assert by_torch.dtype == torch.uint8
    assert by_torch.is_contiguous()
    assert (by_pillow.int() - by_torch.int()).abs().max() <= 1
    for transform, square in ((PILLOW, by_pillow), (TORCH, by_torch)):
        assert torch.equal(transform.read(encode(image, "PNG"), LIMIT), square)
        assert torch.equal(transform.square(as_pixels(image)), square)
        assert torch.equal(transform(image), transform.normalise(square))


def test_aspect_keeps_the_whole_picture() -> None:
    picture = Image.new("RGB", (90, 30), "white")
    picture.paste("red", (0, 0, 30, 30))
    picture.paste("blue", (60, 0, 90, 30))
    for version in (1, 2):
        crop, squash, aspect = (
            ImageTransform(32, MEAN, STD, version, fit) for fit in ("crop", "squash", "aspect")
        )
        seen = aspect.at(picture, 16, 48)
        assert seen.shape == (3, 16, 48)
        assert seen.is_contiguous()
        assert seen[:, :, 2].T.tolist() == [[255, 0, 0]] * 16
        assert seen[:, :, -2].T.tolist() == [[0, 0, 255]] * 16
        assert (crop.at(picture, 32, 32).float().mean((1, 2)) > 250).all()  # the middle
        for transform in (crop, squash):
            assert torch.equal(transform.at(picture, 32, 32), transform.square(picture))
            assert transform.at(picture, 20, 20).shape == (3, 20, 20)
            with pytest.raises(ValueError, match="gives squares, not 16 x 48 px"):
                transform.at(picture, 16, 48)
        assert torch.equal(aspect.at(picture, 20, 20), squash.at(picture, 20, 20))
        assert aspect.at(Image.new("L", (1, 60_000)), 64, 8).shape == (3, 64, 8)
        assert len({t.fingerprint() for t in (crop, squash, aspect)}) == 3
        with pytest.raises(UsageError, match=r"fit aspect .* allowed here: crop, squash"):
            aspect(picture)


def test_pixels_are_normalised_alone_as_in_a_batch() -> None:
    squares = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    wanted = (squares.float() / 255 - mean) / std
    assert torch.equal(TORCH.normalise(squares), wanted)
    assert torch.equal(TORCH.normalise(squares[1]), wanted[1])


def test_strips_do_not_explode() -> None:
    for size in ((1, 60_000), (60_000, 1), (1, 1)):
        assert TORCH(Image.new("RGB", size, "red")).shape == (3, 32, 32)


def test_views_of_tensors_are_those_of_images() -> None:
    augment, image = Augment(crop=0.3, flip=True), scene(61, 47)
    pixels = as_pixels(image)
    views = [augment(pixels, key, view) for key in "abcd" for view in range(4)]
    for view, (key, number) in zip(views, ((k, n) for k in "abcd" for n in range(4)), strict=True):
        seen = augment(image, key, number)
        assert torch.equal(view, as_pixels(seen))
        assert torch.equal(TORCH.square(view), TORCH.square(seen))
    assert len({view.shape for view in views}) > 4


def test_fingerprint_tells_the_versions_apart() -> None:
    assert PILLOW.fingerprint() == ImageTransform(32, MEAN, STD).fingerprint()
    assert PILLOW.fingerprint() != TORCH.fingerprint()
