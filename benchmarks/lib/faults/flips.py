"""One flipped bit in each file that the project writes: the reader says so, or reads the same."""

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lib.faults import readers
from lib.faults.processes import Ended, program, run
from lib.faults.tally import Tally
from lib.faults.world import World, must

Reader = Callable[[Path], Ended]
UNPROMISED = {"index, search.py"}  # of `subjects`: notices flips with --check only


def subjects(world: World, trained: Path) -> Iterator[tuple[str, Path, list[Path], Reader]]:
    """(what, folder, its files, how it is read whole). trained: the folder of a finished run."""

    def by(job: Callable[..., Any], *more: Any) -> Reader:
        return lambda folder: run(job, folder, *more)

    def data_of(folder: Path) -> Ended:
        shards, features = f"{folder}/data/train/*.tar", str(folder / "features")
        return run(readers.training_data, shards, features, world.tower, world.text)

    training = world.root / "training"  # shards with their indexes, and a cache
    if not training.exists():
        shutil.copytree(world.data, training / "data", copy_function=shutil.copy2)
        for left in training.rglob("*.index.parquet"):
            left.unlink()
        must(data_of(training))
    yield "shard indexes", training, sorted(training.rglob("*.index.parquet")), data_of
    cache = sorted(f for f in (training / "features").rglob("*") if f.is_file())
    yield "feature and caption cache", training, cache, data_of
    yield "model", world.model, files(world.model), by(readers.model)
    yield "embeddings", world.embeddings, files(world.embeddings), _index_of
    index = world.root / "index"
    yield "index, search.py --check", index, files(index), _check
    yield "index, compaction", index, files(index), by(readers.compacted)
    yield "index, search.py", index, files(index), by(readers.answers)
    album = world.root / "album"
    yield "album, search.py --check", album, files(album), _check
    run_ = trained / "run"
    yield "run's configuration", run_, [run_ / "config.json"], by(readers.run_config)
    yield "checkpoint", run_, files(run_ / "checkpoints"), by(readers.checkpoint)


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _index_of(folder: Path) -> Ended:
    with tempfile.TemporaryDirectory() as out:
        return run(readers.built, folder, Path(out) / "index")


def _check(folder: Path) -> Ended:
    """`search.py --check`, then the answers."""
    checked = run(program, "search", "--index", folder, "a cat", "--check", "--device", "cpu")
    return checked if checked.how != "done" else run(readers.answers, folder)


def flip_bits(world: World, trained: Path, per_file: int, seed: int) -> Iterator[Tally]:
    """Flip so many bits of every file, each in a copy of its own."""
    draw = random.Random(seed)
    for what, folder, own, read in subjects(world, trained):
        tally, promised = Tally(f"bit flips: {what}"), what not in UNPROMISED
        right = must(read(_copy(folder, world.root / "copy"))).value
        for file in own:
            for _ in range(per_file):
                copy = _copy(folder, world.root / "copy")
                place = _flip(copy / file.relative_to(folder), draw)
                if place is None:
                    continue
                _judge(tally, read(copy), right, f"{file.relative_to(folder)} {place}", promised)
        yield tally
    shutil.rmtree(world.root / "copy", ignore_errors=True)


def _judge(tally: Tally, ended: Ended, right: Any, where: str, promised: bool) -> None:
    if ended.how == "told":
        tally.add("noticed")
    elif ended.how == "done" and ended.value == right:
        tally.add("harmless")
    elif not promised:
        tally.add("unpromised", "changed answers" if ended.how == "done" else ended.how)
    else:
        said = "another result" if ended.how == "done" else f"{ended.how}: {ended.said[-300:]}"
        tally.add("lost", f"{where}: {said}")


def _copy(folder: Path, to: Path) -> Path:
    """A copy that shares what is not changed; nothing here writes into a file that exists."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, copy_function=os.link)
    return to


def _flip(file: Path, draw: random.Random) -> str | None:
    """Flip one bit, as a disk does: size and times stay."""
    status, content = file.stat(), bytearray(file.read_bytes())
    if not content:
        return None
    byte, bit = draw.randrange(len(content)), draw.randrange(8)
    content[byte] ^= 1 << bit
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return f"byte {byte} bit {bit}"
