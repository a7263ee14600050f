"""Files of the program's own: whole or not at all, and one root for what is cached."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.files import cache_folder, file_digest, is_intact, sealed, write_atomically


def test_one_root_holds_all_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FLEXILIT_CACHE", raising=False)
    assert cache_folder("index") == tmp_path / ".cache" / "flexilit" / "index"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("index") == tmp_path / "xdg" / "flexilit" / "index"
    monkeypatch.setenv("FLEXILIT_CACHE", "~/own")
    assert cache_folder("index") == tmp_path / "own" / "index"


def test_a_file_that_is_not_finished_does_not_appear(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    write_atomically(file, lambda out: out.write(b"whole"))

    def fail(out: object) -> None:
        out.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, fail)
    assert os.listdir(file.parent) == ["file"]
    assert file.read_bytes() == b"whole"


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    """Not what another one is writing."""
    begin = (
        "import os, sys, time; from pathlib import Path; from data.files import write_atomically\n"
        "def write(file):\n"
        "    file.write(b'half'), file.flush(), print(os.getpid(), flush=True), time.sleep(60)\n"
        "write_atomically(Path(sys.argv[1]), write)"
    )
    command = [sys.executable, "-c", begin, str(tmp_path / "file")]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.stdout.close()
    writers[0].kill()
    writers[0].wait()
    (tmp_path / ".mine").write_text("")
    for left in tmp_path.glob(".file.*"):
        os.utime(left, (1, 1))
    write_atomically(tmp_path / "other", lambda out: out.write(b"whole"))
    (left,) = tmp_path.glob(".file.*")
    assert f".{writers[1].pid}-" in left.name
    assert {file.name for file in tmp_path.iterdir()} == {left.name, ".mine", "other"}
    writers[1].kill()
    writers[1].wait()


def test_digests_tell_contents_apart(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    one.write_bytes(b"x" * (1 << 20) + b"a")
    two.write_bytes(one.read_bytes())
    three.write_bytes(b"x" * (1 << 20) + b"b")
    assert file_digest(one) == file_digest(two) != file_digest(three)


def test_what_was_sealed_is_intact_when_it_is_read() -> None:
    by_size = {16: 1.0, 8: (0.5, 0.25), 112: None}  # as texts in another order than as numbers
    read = json.loads(json.dumps(sealed({"sizes": by_size, "format": 1})))
    assert is_intact(read)
    read["sizes"]["8"] = [0.5, 0.26]
    assert not is_intact(read)
