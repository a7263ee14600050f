"""Photographs for evaluation: what a Debian package holds becomes shards with classes."""

import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import data.photographs.build as photographs
from data.errors import UsageError
from data.files import cache_folder
from retrieval import load_dataset


def debian_package(path: Path, files: dict[str, bytes]) -> None:
    """An `ar` archive as dpkg-deb writes it (deb(5))."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/tuxpaint/stamps/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",  # padded to an even length
        "data.tar.xz": lzma.compress(packed.getvalue()),
    }
    path.parent.mkdir(parents=True)
    with path.open("wb") as deb:
        deb.write(b"!<arch>\n")
        for name, content in members.items():
            deb.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            deb.write(content + b"\n" * (len(content) % 2))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXILIT_CACHE", str(tmp_path / "cache"))
    png = io.BytesIO()
    Image.new("RGBA", (40, 30), (200, 10, 10, 128)).save(png, "PNG")
    files: dict[str, bytes] = {"animals/unlisted.png": b"never read"}
    for name in photographs.read_stamps():
        files[name] = png.getvalue()
        files[name.replace(".png", ".txt")] = b"A caption.\nfr.utf8=Une phrase.\n"
    path = cache_folder("apt") / f"{photographs.PACKAGE}_{photographs.VERSION}_all.deb"
    debian_package(path, files)
    return path


def test_every_listed_photograph_has_a_class() -> None:
    stamps = photographs.read_stamps()
    assert len(stamps) == 305
    assert all(
        path.endswith(".png") and name == name.strip().lower() for path, name in stamps.items()
    )
    assert len(set(stamps.values())) > 200


def test_shards_hold_picture_sentence_and_class(package: Path, tmp_path: Path) -> None:
    out = photographs.build_photographs(tmp_path / "photographs")
    assert photographs.build_photographs(out) == out  # at once
    dataset = load_dataset("shards", str(out))
    with tarfile.open(out / "0.tar") as tar:
        names = tar.getnames()
        picture = tar.extractfile("animals-mammals-cats-lion.png")
        assert picture
        square = Image.open(io.BytesIO(picture.read()))
        assert (square.mode, square.size) == ("RGB", (40, 40))
        assert square.getpixel((0, 4)) == (255, 255, 255)
        assert square.getpixel((0, 20)) == pytest.approx((227, 132, 132), abs=1)  # red, by half
        cls = tar.extractfile("animals-mammals-cats-lion.cls")
        about = tar.extractfile("animals-mammals-cats-lion.json")
        assert cls
        assert about
        assert dataset.class_names[int(cls.read())] == "lion"
        assert json.load(about) == {"captions": ["A caption."], "label": "lion"}
    assert len(names) == 4 * 305
    assert not any("unlisted" in name for name in names)


def test_nothing_is_written_over_and_nothing_half(package: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("work")
    with pytest.raises(UsageError, match="holds something else"):
        photographs.build_photographs(mine)
    package.write_bytes(package.read_bytes()[:-500])
    with pytest.raises(UsageError, match="is damaged: delete it"):
        photographs.build_photographs(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_apt_a_sentence_says_where_the_package_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXILIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"no apt-get here.*put its \.deb at"):
        photographs.build_photographs(tmp_path / "new")
