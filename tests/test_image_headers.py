"""What an image costs is bounded by its pixels and bytes, whatever it claims; nothing good is
refused for that."""

import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile_images as hostile
import numpy as np
import pytest
from PIL import Image

from data import decode_apart
from data.image_headers import format_of, has_image_suffix, is_ordinary, names_image, what_it_is
from data.images import decode_image
from data.problems import BadSample, Problem
from retrieval.photos.summary import PhotosReport

LIMIT = 50_000_000


def refused(data: bytes) -> BadSample:
    with pytest.raises(BadSample) as caught:
        decode_image(data, LIMIT)
    return caught.value


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_apart, "BASE_S", 0.1)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    "data",
    [
        hostile.many_scans(),
        hostile.many_segments(),
        hostile.large_tile(),
        hostile.with_chunk(b"iCCP", hostile.packed_text(1 << 20), 5000),
        hostile.with_chunk(b"IDAT", b"", 1_000_000),
    ],
    ids=["scans", "segments", "tile", "profiles", "chunks"],
)
def test_small_files_that_would_take_minutes_or_gigabytes_are_one_problem(data: bytes) -> None:
    assert refused(data).kind == "image_too_costly"
    assert decode_image(hostile.red("TIFF"), LIMIT).getpixel((9, 9)) == (200, 30, 10)


def test_they_do_not_hold_the_threads_of_others() -> None:
    """Nor does a picture suffer because its decoder's process was ended by others."""
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: decode_image(hostile.red("TIFF"), LIMIT), range(8)))
    assert {image.size for image in images} == {(64, 64)}
    for process in decode_apart._idle[os.getpid()]:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert decode_image(hostile.red("TIFF"), LIMIT).size == (64, 64)


@pytest.mark.parametrize(
    "data",
    [
        hostile.with_chunk(b"zTXt", hostile.packed_text(5 << 20)),
        hostile.with_chunk(b"zTXt", hostile.packed_text(5 << 20), behind=True),
        hostile.with_chunk(b"iCCP", hostile.packed_text(5 << 20)),
        hostile.with_chunk(b"zTXt", hostile.packed_text(1 << 20), 70),
        hostile.red("JPEG", quality=100, comment=b"x" * 60_000)[:2]
        + b"\xff" * 40
        + hostile.red("JPEG", quality=100)[2:],
        hostile.red("AVIF", quality=100),
        hostile.red("BMP"),
        hostile.red("TIFF", compression="tiff_lzw"),
    ],
    ids=["text", "text behind", "profile", "texts", "fill bytes", "avif", "bmp", "tiff"],
)
def test_odd_files_are_read_all_the_same(data: bytes) -> None:
    image = decode_image(data, LIMIT)
    assert image.mode == "RGB"
    np.testing.assert_allclose(image.getpixel((9, 9)), (200, 30, 10), atol=3)


def test_what_is_decoded_apart_is_what_is_decoded_here() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    half = Image.new("RGBA", (40, 30), (9, 90, 200, 128))
    ramp = Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40))
    for image, kind in ((ramp, "JPEG"), (half, "PNG"), (half, "WEBP"), (ramp, "GIF")):
        data = hostile.encode(image, kind, **({} if kind == "GIF" else {"exif": exif}))
        assert is_ordinary(data, kind)
        apart = decode_apart.decode_apart(data, LIMIT)
        assert np.array_equal(apart, decode_image(data, LIMIT))
    with pytest.raises(BadSample, match=r"image_too_large: 40 x 30 pixels, the limit is 100"):
        decode_apart.decode_apart(data, 100)


def test_floats_keep_their_brightness_across_bands() -> None:
    image = np.asarray(decode_image(hostile.floats(1500), LIMIT))
    wanted = np.round(np.linspace(0, 1, 1500, dtype=np.float32).astype(np.float64) * 255)
    assert np.array_equal(image[:, 700, 1], wanted)


def test_ordinary_files_are_decoded_without_another_process() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    for kind, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(60_000)}),
        ("PNG", {"icc_profile": bytes(3000)}), ("WEBP", {}), ("GIF", {"comment": b"x" * 900}),
        ("BMP", {}),
    ):  # fmt: skip
        assert is_ordinary(hostile.encode(noise, kind, **options), kind)
    two = io.BytesIO()
    noise.save(two, "MPO", save_all=True, append_images=[noise])
    assert is_ordinary(two.getvalue(), "JPEG")


def test_no_header_that_is_cut_or_changed_raises() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = hostile.red(kind, 16)
        for end in range(len(data)):
            is_ordinary(data[:end], kind)
        for _ in range(100):
            changed = bytearray(data)
            changed[rng.integers(len(data))] = rng.integers(256)
            is_ordinary(bytes(changed), kind)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><title>404", "an HTML page, 26 bytes"),
        (b'<?xml version="1.0"?><svg/>', "an XML document"),
        (b'{"error": 1}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"\0\0\0\x18ftypisom....isommp42", "a video"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (bytes(900), "zeros, 900 bytes"),
        ("größe\nfür alle".encode(), "text that begins 'größe"),
        (b"\x93\x01\xfe\xed\xfa\xce\0\0\0", "9 bytes that begin 93 01 fe ed fa ce 00 00"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG that has a damaged header, 58 bytes"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, what: str) -> None:
    bad = refused(data)
    assert bad.kind == "not_an_image"
    assert bad.cause.startswith(what)
    if format_of(data) is None:
        assert what_it_is(data) == bad.cause


def test_photos_in_heic_are_read_where_its_reader_is(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    photo = Image.fromarray(np.full((60, 90, 3), [200, 30, 10], np.uint8))
    heif.from_pillow(photo).save(tmp_path / "a.heic", quality=90)
    decoded = decode_image((tmp_path / "a.heic").read_bytes(), LIMIT)
    assert decoded.size == (90, 60)
    assert np.abs(np.asarray(decoded, int) - [200, 30, 10]).max() < 20


def test_photos_in_heic_say_what_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pillow_heif.py").write_text("raise ImportError")  # as if it were not there
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(decode_apart, "_idle", {})  # a process that has not looked yet
        bad = refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
        decode_apart._close_idle()
    assert bad.kind == "heic"
    assert "pip install pillow-heif" in bad.cause
    report = PhotosReport()
    report.skip(Problem(bad.kind, "IMG_1.HEIC", bad.cause))
    assert "pip install pillow-heif" in "\n".join(report.lines("photos"))


def test_suffixes_of_images() -> None:
    for name in ("a.jfif", "b/c.JPE", "x.jif", "x.avif", "x.heic", "v1.5.png", "a.TIFF"):
        assert has_image_suffix(name)
    for name in ("jpg", "a.txt", "a.jpg.txt", "a.", "photos.d/x"):
        assert not has_image_suffix(name)


def test_a_long_text_is_no_file() -> None:
    """Names of files have at most 255 bytes, paths 4,096."""
    for words in ("one cat and " * 30 + "w/o flash", "a cat in a tree " * 300 + "beside a.jpg"):
        assert not names_image(words)
