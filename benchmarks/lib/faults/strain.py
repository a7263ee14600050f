"""A disk that takes no more, a folder that cannot be written, and two programs at once."""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lib.faults import readers
from lib.faults.processes import Ended, Running, program, run
from lib.faults.tally import Tally
from lib.faults.world import World, must

# Loader processes hand over pixels in memory files, which the limit would meet too.
NO_WORKERS = {"embed.py": ("--num-workers", 0), "index.py": (), "index.py --images": ()}
LIMITS = (0, 100, 2_000, 20_000, 200_000)  # bytes that a file may have


def _works(world: World, root: Path) -> Iterator[tuple[str, Path, tuple[object, ...], Any]]:
    """(what, its folder, command, how the result is read)."""
    embeddings, index, album = (root / name for name in ("embeddings", "index", "album"))
    yield "embed.py", embeddings, world.embed(embeddings), readers.embeddings
    build = ("index", "--embeddings", world.embeddings, "--out", index, "--device", "cpu")
    yield "index.py", index, build, readers.answers
    yield "index.py --images", album, world.index_photos(album), readers.answers


def fill_disks(world: World, seed: int) -> Iterator[Tally]:
    """Files stop growing at a limit, as on a full disk; afterwards the same command succeeds."""
    draw = random.Random(seed)
    for what, out, command, reader in _works(world, _fresh(world, "full")):
        tally = Tally(f"full disk: {what}")
        right = _undisturbed(out, command, reader)
        for limit in LIMITS:
            _clear(out)
            bytes_ = draw.randrange(limit // 2, limit + 1)
            ended = run(program, *command, *NO_WORKERS[what], file_bytes=bytes_)
            again = run(program, *command)
            if ended.how not in ("told", "done"):
                tally.add("lost", f"limit {bytes_}, {ended.how}: {ended.said[-400:]}")
            elif again.how not in ("done", "told") or run(reader, out).value != right:
                tally.add("lost", f"limit {bytes_}, then {again.how}: {again.said[-400:]}")
            else:
                tally.add("noticed" if ended.how == "told" else "harmless")
        yield tally


def write_twice(world: World, times: int, seed: int) -> Iterator[Tally]:
    """Two programs write into one folder: each ends well or with a sentence, and it is whole."""
    draw = random.Random(seed)
    for what, out, command, reader in _works(world, _fresh(world, "twice")):
        tally = Tally(f"two writers: {what}")
        right = _undisturbed(out, command, reader)
        for _ in range(times):
            _clear(out)
            one = Running(program, *command)
            time.sleep(draw.uniform(0, 1))
            two = Running(program, *command)
            ends = [one.wait(), two.wait()]
            again = run(program, *command)
            tally.add(*_verdict(ends, again, run(reader, out), right))
        yield tally


def _verdict(ends: list[Ended], again: Ended, seen: Ended, right: Any) -> tuple[str, str]:
    for ended in ends:
        if ended.how not in ("done", "told"):
            return "lost", f"{ended.how}: {ended.said[-400:]}"
    if again.how not in ("done", "told"):  # told: what is finished is not made again
        return "lost", f"then {again.how}: {again.said[-400:]}"
    if seen.value != right:
        return "lost", f"another result, {seen.how}: {seen.said[-300:]}"
    return ("noticed" if any(ended.how == "told" for ended in ends) else "harmless"), ""


def _fresh(world: World, name: str) -> Path:
    root = world.root / name
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    return root


def _undisturbed(out: Path, command: tuple[object, ...], reader: Callable[[Path], Any]) -> Any:
    must(run(program, *command))
    return must(run(reader, out)).value


def _clear(out: Path) -> None:
    for path in [out, *out.parent.glob(f"{out.name}.*"), *out.parent.glob(f".{out.name}*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
