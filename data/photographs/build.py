"""Photographs of one thing each, cut out, as shards that `--dataset shards` evaluates.

Taken from Debian's `tuxpaint-stamps-default` (GPL-2, Bill Kendrick and contributors), which is
fetched, never shipped: 305 of its 796 pictures are photographs of a thing with one common name.
`stamps.tsv` lists them with that name, which is ours; the caption is the package's own sentence.
"""

import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from data.class_names import write_class_names
from data.errors import UsageError
from data.files import cache_folder, make_folder
from data.shards.tar import add_member

PACKAGE = "tuxpaint-stamps-default"
VERSION = "2022.06.04-1"
SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
FETCH_TIMEOUT_S = 1200
TEMPLATES = ("{c}", "a photo of a {c}", "a photo of {c}", "a {c} on a white background")
_FOLDER = "./usr/share/tuxpaint/stamps/"


def build_photographs(out: str | Path) -> Path:
    """Write `out/0.tar` with class names and templates, and return `out`; at once where it is.

    Members are `KEY.png` (the whole thing in the middle of a white square), `KEY.txt` (the
    sentence), `KEY.json` and `KEY.cls`. `out` appears whole or not at all. Raises `UsageError`
    where `out` holds something else, or the package can neither be found in the cache nor fetched.
    """
    out = Path(out)
    about = {"package": f"{PACKAGE} {VERSION}", "licence": "GPL-2", "by": "Tux Paint's artists"}
    if out.exists() and any(out.iterdir()):
        try:
            if json.loads((out / "manifest.json").read_text()) == about:
                return out
        except (OSError, ValueError):
            pass
        raise UsageError(f"{out} holds something else: give a new or empty folder")
    stamps = read_stamps()
    files = unpack_stamps(fetch_package(), stamps)
    names = sorted(set(stamps.values()))
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / "new"
        partial.mkdir()
        with tarfile.open(partial / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for path, name in stamps.items():
                key = path.removesuffix(".png").replace("/", "-")
                sentence = files[path.replace(".png", ".txt")].decode().split("\n")[0].strip()
                add_member(tar, f"{key}.png", _square(files[path]))
                add_member(tar, f"{key}.txt", sentence.encode())
                about_one = {"captions": [sentence], "label": name}
                add_member(tar, f"{key}.json", json.dumps(about_one, ensure_ascii=False).encode())
                add_member(tar, f"{key}.cls", str(names.index(name)).encode())
        write_class_names(partial, names, TEMPLATES)
        (partial / "manifest.json").write_text(json.dumps(about, indent=1) + "\n")
        os.rename(partial, out)
    return out


def read_stamps() -> dict[str, str]:
    """Class name of each photograph, by its path within the package's folder of stamps."""
    lines = Path(__file__).with_name("stamps.tsv").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


def fetch_package() -> Path:
    """The cached `.deb` (161 MB), downloaded by apt where it is not there yet.

    Raises `UsageError` where there is no apt, it cannot fetch, or what it fetches is another file.
    """
    target = cache_folder("apt") / f"{PACKAGE}_{VERSION}_all.deb"
    if target.exists():
        return target
    if not (apt := shutil.which("apt-get")):
        raise _cannot_fetch(target, "there is no apt-get here")
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=target.parent) as folder:
        try:
            done = subprocess.run(
                [apt, "download", f"{PACKAGE}={VERSION}"],
                capture_output=True,
                text=True,
                cwd=folder,
                timeout=FETCH_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise _cannot_fetch(target, f"no answer in {FETCH_TIMEOUT_S} s") from None
        fetched = list(Path(folder).glob("*.deb"))
        if done.returncode or len(fetched) != 1:
            why = (done.stderr.strip() or "apt-get wrote nothing").splitlines()[-1]
            raise _cannot_fetch(target, why)
        if hashlib.sha256(fetched[0].read_bytes()).hexdigest() != SHA256:
            raise _cannot_fetch(target, "what came is another file than the one pinned")
        os.replace(fetched[0], target)
    return target


def unpack_stamps(package: Path, stamps: Mapping[str, str]) -> dict[str, bytes]:
    """The listed pictures, PNGs of any shape, and their sentences, by their path within the folder
    of stamps. Raises `UsageError` for a damaged package."""
    wanted = {_FOLDER + path for path in stamps}
    wanted |= {path.replace(".png", ".txt") for path in wanted}
    files = {}
    try:
        with package.open("rb") as deb:
            _seek_data(deb)
            with tarfile.open(fileobj=deb, mode="r|xz") as tar:
                for member in tar:
                    if member.name in wanted and (file := tar.extractfile(member)):
                        files[member.name.removeprefix(_FOLDER)] = file.read()
                        if len(files) == len(wanted):
                            break
    except (tarfile.TarError, EOFError, OSError, ValueError, lzma.LZMAError):
        files = {}
    if len(files) != len(wanted):
        raise UsageError(f"{package} is damaged: delete it, it will be fetched again")
    return files


def _square(png: bytes) -> bytes:
    """A cut-out in the middle of a white square as wide as its longer side, so that no centre crop
    cuts off a head."""
    thing = Image.open(io.BytesIO(png)).convert("RGBA")
    side = max(thing.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(thing, ((side - thing.width) // 2, (side - thing.height) // 2))
    out = io.BytesIO()
    square.convert("RGB").save(out, "PNG")
    return out.getvalue()


def _seek_data(deb: BinaryIO) -> None:
    """Go to the packed files within a Debian package, an `ar` archive (deb(5))."""
    deb.seek(8)  # its magic
    while header := deb.read(60):
        if header.startswith(b"data.tar.xz"):
            return
        size = int(header[48:58])
        deb.seek(size + size % 2, os.SEEK_CUR)
    raise EOFError("no data")


def _cannot_fetch(target: Path, why: str) -> UsageError:
    return UsageError(
        f"cannot fetch {PACKAGE} {VERSION} ({why}): it is a package of Debian and Ubuntu; on "
        f"another system put its .deb at {target}"
    )
