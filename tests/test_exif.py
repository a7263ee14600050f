"""What EXIF says of a photo, and that no block of bytes does any harm."""

import io
import random
import struct

import pytest
from exif_maker import ASCII, LONG, RATIONAL, SHORT, block, rationals, text, with_exif
from PIL import ExifTags, Image

from retrieval.photos.exif import UNKNOWN, Exif, read_exif

PARIS = {
    1: text("N"), 2: rationals((48, 1), (51, 1), (3024, 100)),
    3: text("E"), 4: rationals((2, 1), (17, 1), (4000, 100)),
}  # fmt: skip


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("place", [(48.858393, 2.294444), (-33.856667, -151.2153)])
def test_what_pillow_writes_is_read_from_every_format(format: str, place: tuple[float, float]):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "FUJIFILM"
    exif[ExifTags.Base.Model] = "X-T3"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2019:07:14 12:30:05"
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    for tag, value, sides in ((1, place[0], "NS"), (3, place[1], "EW")):
        minutes, degrees = abs(value) % 1 * 60, float(int(abs(value)))
        gps[tag] = sides[value < 0]
        gps[tag + 1] = (degrees, float(int(minutes)), minutes % 1 * 60)
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, format, exif=exif)
    found = read_exif(file.getvalue())
    assert (found.taken, found.camera) == ("2019-07-14T12:30:05", "FUJIFILM X-T3")
    assert (found.latitude, found.longitude) == pytest.approx(place, abs=1e-5)


def test_the_item_of_a_heif_file_is_found() -> None:
    item = b"\0\0\0\x06Exif\0\0" + block({0x110: text("iPhone 12")}, order=">")
    assert read_exif(b"\0\0\0\x18ftypheic" + bytes(400) + item).camera == "iPhone 12"


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_are_read(order: str) -> None:
    gps = {
        1: text("S"), 2: rationals((48, 1), (30, 1), (0, 1), order=order),
        3: text("W"), 4: rationals((2, 1), (15, 1), (0, 1), order=order),
    }  # fmt: skip
    data = block({0x110: text("Pixel 7")}, {0x9003: text("2023:01:02 03:04:05")}, gps, order)
    assert read_exif(b"\xff\xd8" + data) == Exif("2023-01-02T03:04:05", -48.5, -2.25, "Pixel 7")


@pytest.mark.parametrize(
    ("main", "exif", "taken"),
    [
        ({0x132: text("2001:02:03 04:05:06")}, {}, "2001-02-03T04:05:06"),
        (
            {0x132: text("2001:02:03 04:05:06")},
            {0x9003: text("0000:00:00 00:00:00"), 0x9004: text("2000:01:01 00:00:00")},
            "2000-01-01T00:00:00",
        ),
        ({}, {0x9003: text("    :  :     :  :  ")}, None),
        ({}, {0x9003: text("2001:02:30 04:05:06")}, None),
        ({}, {0x9003: text("2001-02-03T04:05:06+02:00")}, "2001-02-03T04:05:06"),
        ({}, {0x9003: text("2001:02:03")}, "2001-02-03T00:00:00"),
        ({}, {0x9003: (SHORT, 1, b"\1\0")}, None),
    ],
)
def test_the_first_date_that_is_one_counts(main: dict, exif: dict, taken: str | None) -> None:
    assert read_exif(block(main, exif)).taken == taken


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("Canon", "Canon EOS 5D", "Canon EOS 5D"),
        ("NIKON CORPORATION", "NIKON D90", "NIKON D90"),
        ("  SONY ", "DSC-W1\0rest", "SONY DSC-W1"),
        ("", "\x1b[31mred\n", "[31mred"),
        ("Apple", "", "Apple"),
        ("", "  ", None),
        ("x" * 90, "y" * 90, "x" * 90 + " " + "y" * 9),
    ],
)
def test_a_camera_has_one_name(make: str, model: str, camera: str | None) -> None:
    assert read_exif(block({0x10F: text(make), 0x110: text(model)})).camera == camera


@pytest.mark.parametrize(
    "changed",
    [
        {2: rationals((91, 1), (0, 1), (0, 1))},
        {2: rationals((48, 0), (0, 0), (0, 0))},
        {4: rationals((200, 1), (0, 1), (0, 1))},
        {2: (LONG, 1, struct.pack("<I", 48)), 1: (SHORT, 1, b"N\0")},
        {2: rationals(*[(1, 1)] * 4)},
        {2: rationals((0, 1), (0, 1), (0, 1)), 4: rationals((0, 1), (0, 1), (0, 1))},
    ],
)
def test_a_place_that_is_none_is_not_known(changed: dict) -> None:
    assert read_exif(block({}, {}, PARIS)).latitude == pytest.approx(48.858400)
    found = read_exif(block({0x110: text("Pixel")}, {}, {**PARIS, **changed}))
    assert found == Exif(camera="Pixel")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"II*\0\x08\0\0\0",
        b"II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0",
        b"MM\0*\0\0\0\x08" + b"\xff" * 70_000,
        block({0x110: (ASCII, 0xFFFFFFFF, b"\0\0\0\0")}),
        block({0x110: (99, 1, b"abcd")}),
        block({0x8769: (RATIONAL, 1, b"\1\0\0\0\0\0\0\0")}),
        block({0x8769: (LONG, 1, struct.pack("<I", 8))}),  # a directory within itself
        b"\xff\xd8\xff" + bytes(1000),
    ],
)
def test_a_hostile_block_says_nothing(data: bytes) -> None:
    assert read_exif(data) == UNKNOWN


def test_no_damage_raises() -> None:
    good = block({0x10F: text("A"), 0x110: text("B")}, {0x9003: text("2001:02:03 04:05:06")}, PARIS)
    rng = random.Random(0)
    for _ in range(3000):
        data = bytearray(with_exif(b"\xff\xd8\xff\xd9", good))
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        found = read_exif(bytes(data[: rng.randint(0, len(data))]))
        assert found.latitude is None or -90 <= found.latitude <= 90
