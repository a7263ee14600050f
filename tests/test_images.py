"""Decoding strangers' files, and the transform of the towers."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from shard_maker import encode, png
from torchvision import transforms

from data.images import decode_image
from data.problems import BadSample
from data.transform import ImageTransform

LIMIT = 1_000_000


def picture(width: int = 40, height: int = 30) -> Image.Image:
    ramp = np.add.outer(np.arange(height), np.arange(width)) * 255 // (width + height)
    return Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], -1).astype(np.uint8))


def png_bomb(width: int, height: int) -> bytes:
    """A few bytes that claim to be width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_common_formats_decode_to_rgb(kind: str) -> None:
    image = decode_image(encode(picture(), kind), LIMIT)
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image, int) - np.asarray(picture(), int))
    assert difference.mean() < 8


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "not_an_image"),
        (b"<html>404</html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (encode(picture(200, 200), "JPEG")[:800], "truncated_image"),
        (png(0, (64, 64))[:3000], "truncated_image"),
        (png_bomb(1001, 1000), "image_too_large"),
        (png_bomb(60_000, 60_000), "image_too_large"),
    ],
)
def test_bad_images_are_named_by_kind(data: bytes, kind: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_image(data, LIMIT)
    assert caught.value.kind == kind


def test_random_damage_never_escapes_as_another_error() -> None:
    rng = np.random.default_rng(0)
    files = [encode(picture(), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]
    for trial in range(300):
        data = bytearray(files[trial % len(files)])
        for place in rng.integers(0, len(data), 8):
            data[place] = rng.integers(0, 256)
        with contextlib.suppress(BadSample):
            assert decode_image(bytes(data), LIMIT).mode == "RGB"


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encode(clear, "PNG"), LIMIT).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("LA", (4, 4), (0, 128))
    assert decode_image(encode(half, "PNG"), LIMIT).getpixel((0, 0)) == pytest.approx((127,) * 3)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 0, 0, 0])
    assert decode_image(encode(palette, "PNG"), LIMIT).getpixel((0, 0)) == (10, 20, 30)
    data = encode(palette, "PNG", transparency=0)
    assert decode_image(data, LIMIT).getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_keep_their_brightness() -> None:
    grey16 = Image.fromarray(np.full((4, 4), 200 * 256, np.uint16))
    assert decode_image(encode(grey16, "PNG"), LIMIT).getpixel((1, 1)) == (200, 200, 200)
    real = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
    assert decode_image(encode(real, "TIFF"), LIMIT).getpixel((3, 3)) == (255, 255, 255)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode_image(encode(cmyk, "JPEG", quality=95), LIMIT).getpixel((4, 4))
    assert red[0] > 200
    assert max(red[1:]) < 60
    one_bit = Image.new("1", (4, 4), 1)
    assert decode_image(encode(one_bit, "PNG"), LIMIT).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encode(picture(40, 30), "JPEG", exif=exif)
    assert decode_image(data, LIMIT).size == (30, 40)


def test_first_frame_of_an_animation() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encode(red, "GIF", save_all=True, append_images=[blue])
    assert decode_image(data, LIMIT).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (57, 57), (224, 32), (31, 33), (32, 32)])
def test_transform_equals_torchvisions_resize_and_centre_crop(size: tuple[int, int]) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    reference = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    image = picture(*size)
    ours = ImageTransform(32, mean, std)(image)
    assert ours.dtype == torch.float32
    assert ours.shape == (3, 32, 32)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, reference(image), rtol=0, atol=1e-6)


def test_extreme_strips_do_not_explode() -> None:
    transform = ImageTransform(32, (0.0,) * 3, (1.0,) * 3)
    for size in ((1, 60_000), (60_000, 1), (1, 1)):
        assert transform(Image.new("RGB", size, "red")).shape == (3, 32, 32)


def test_fingerprint_tells_what_changes_pixels() -> None:
    one = ImageTransform(32, (0.5,) * 3, (0.5,) * 3)
    assert one.fingerprint() == ImageTransform(32, (0.5,) * 3, (0.5,) * 3).fingerprint()
    others = [
        ImageTransform(33, (0.5,) * 3, (0.5,) * 3),
        ImageTransform(32, (0.5, 0.5, 0.4), (0.5,) * 3),
        ImageTransform(32, (0.5,) * 3, (0.5, 0.5, 0.4)),
    ]
    assert len({t.fingerprint() for t in [one, *others]}) == 4
