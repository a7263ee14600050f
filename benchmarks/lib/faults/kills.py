"""SIGKILL at random moments, again and again, until a program gets through: then nothing may
differ from an undisturbed run."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lib.faults import readers
from lib.faults.processes import LAUNCH, Running, program, run
from lib.faults.tally import Tally
from lib.faults.world import World, must

STEPS = 30  # of the training


def kill_programs(world: World, kills: int, seed: int) -> Iterator[Tally]:
    """Embedding, index, its changes and its compaction, album."""
    draw = random.Random(seed)
    root = world.root / "kills"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()

    embed = world.embed(root / "embeddings")
    yield _until_done("kills: embed.py", embed, lambda: readers.embeddings, draw, kills)

    index = root / "index"
    build = ("index", "--embeddings", world.embeddings, "--out", index, "--device", "cpu")
    yield _until_done("kills: index.py", build, lambda: readers.answers, draw, kills)
    ids = _some_ids(world)
    for what, change in (("--delete", ("--delete", *ids)), ("--compact", ("--compact",))):
        before = must(run(readers.answers, index)).value
        command = ("index", "--out", index, *change, "--device", "cpu")
        yield _changes(f"kills: index.py {what}", index, command, before, draw, kills)

    photos, album = world.root / "photos", root / "album"
    yield _until_done(
        "kills: index.py --images", world.index_photos(album), lambda: readers.answers, draw, kills
    )
    for number, photo in enumerate(sorted(photos.glob("*.png"))):  # a day later
        if number % 5 == 0:
            photo.unlink()
        elif number % 5 == 1:
            shutil.copy(photo, photo.with_name(f"new_{photo.name}"))
    before = must(run(readers.answers, album)).value
    yield _changes(
        "kills: index.py --images, changed", album, world.index_photos(album), before, draw, kills
    )


def _some_ids(world: World) -> list[int]:
    import pyarrow.parquet as pq

    file = next(iter(sorted(world.embeddings.rglob("*.parquet"))))
    return [int(id_) for id_ in pq.read_table(file)["id"].to_pylist()[:20]]


def _until_done(
    what: str,
    command: tuple[object, ...],
    reader: Callable[[], Callable[[Path], Any]],
    draw: random.Random,
    kills: int,
) -> Tally:
    """Kill a program that makes a folder, ask for it again, and compare with an undisturbed one."""
    tally = Tally(what)
    place = command.index("--out") + 1
    out = Path(str(command[place]))
    calm = out.with_name(f"{out.name}_calm")
    started = time.monotonic()
    must(run(program, *command[:place], calm, *command[place + 1 :]))
    lasts = time.monotonic() - started
    right = must(run(reader(), calm)).value
    while tally.tried < kills:
        shutil.rmtree(out, ignore_errors=True)
        for left in out.parent.glob(f"{out.name}.*"):
            shutil.rmtree(left)
        broken = ""
        in_a_row = 0
        for _ in range(min(4, kills - tally.tried)):  # of one work
            ended = Running(program, *command).kill_at(draw.uniform(0.1, 1.05) * lasts)
            in_a_row += 1
            if ended.how != "killed":
                if ended.how not in ("done", "told"):  # told: the one before had finished
                    broken = f"{ended.how}: {ended.said[-300:]}"
                break
            if out.exists():  # whole, or of an album those photos that are done
                seen = run(reader(), out)
                if seen.how == "done" and seen.value != right and not _is_part(seen.value, right):
                    broken = "what a kill left answers otherwise"
                if seen.how not in ("done", "told"):
                    broken = f"{seen.how}: {seen.said[-300:]}"
        ended = run(program, *command)
        if ended.how not in ("done", "told"):  # told: index.py makes nothing anew that is finished
            broken = f"not resumed, {ended.how}: {ended.said[-300:]}"
        elif not broken and run(reader(), out).value != right:
            broken = "another result after the kills"
        for number in range(in_a_row):
            tally.add("lost" if broken and not number else "harmless", broken)
    return tally


def _is_part(found: Any, right: Any) -> bool:
    """Whether an index's answers (`readers.answers`) are those of some of its images."""
    return isinstance(found, list) and all(
        {*own} <= {*whole} for own, whole in zip(found[1:], right[1:], strict=True)
    )


def _changes(
    what: str,
    index: Path,
    command: tuple[object, ...],
    before: Any,
    draw: random.Random,
    kills: int,
) -> Tally:
    """Kill a program that changes an index: it is as before or as after, and the change can be
    asked for again."""
    tally = Tally(what)
    kept = index.with_name(f"{index.name}_before")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(index, kept)
    started = time.monotonic()
    must(run(program, *command))
    lasts = time.monotonic() - started
    after = must(run(readers.answers, index)).value
    for _ in range(kills):
        shutil.rmtree(index)
        shutil.copytree(kept, index)
        Running(program, *command).kill_at(draw.uniform(0.1, 1.0) * lasts)
        seen = run(readers.answers, index)
        if seen.how != "done" or seen.value not in (before, after):
            tally.add("lost", f"neither before nor after, {seen.how}: {seen.said[-300:]}")
            continue
        again = run(program, *command)
        seen = run(readers.answers, index)
        if again.how not in ("done", "told") or seen.value != after:
            tally.add("lost", f"asked again, {again.how}: {again.said[-300:]}")
            continue
        tally.add("harmless")
    return tally


# ---- training ------------------------------------------------------------------------------


def train_calmly(world: World, out: Path) -> None:
    """A run from start to end under the deepspeed launcher."""
    done = _launch(world.train(out, STEPS), out)
    code = done.wait(300)
    if code:
        log = (out / "log.txt").read_text()[-2000:]
        raise RuntimeError(f"an undisturbed training ended with {code}:\n{log}")


def kill_training(world: World, calm: Path, kills: int, seed: int) -> Tally:
    """Kill ranks and launcher, or the launcher alone, and resume until the run is through."""
    tally, draw = Tally("kills: lit.py, caches and checkpoints"), random.Random(seed)
    right = (readers.model(calm / "run/model"), readers.history(calm / "run"))
    out = world.root / "killed_training"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    broken, in_a_row = "", 0
    while True:
        begun = (out / "run/config.json").exists()
        arguments = ["--resume", str(out / "run")] if begun else world.train(out, STEPS)
        process = _launch(arguments, out)
        if in_a_row < kills:
            _kill_in_time(process, out, draw)
            in_a_row += 1
            process.wait(60)
            continue
        code = process.wait(300)
        if code:
            broken = f"not resumed: {(out / 'log.txt').read_text()[-500:]}"
        elif (readers.model(out / "run/model"), readers.history(out / "run")) != right:
            broken = "other weights or losses than the undisturbed run"
        break
    for number in range(in_a_row):
        tally.add("lost" if broken and not number else "harmless", broken)
    return tally


def _launch(arguments: list[str], out: Path) -> "subprocess.Popen[bytes]":
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    command = [deepspeed, "--num_accelerators", "1", "--master_port", str(port)]
    with open(out / "log.txt", "wb") as log:
        return subprocess.Popen(
            [*command, str(LAUNCH / "lit.py"), *arguments],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def _kill_in_time(process: "subprocess.Popen[bytes]", out: Path, draw: random.Random) -> None:
    """SIGKILL to all its processes at a random moment once it reads or writes its folders."""
    marks = [out / "run", out / "features"]
    newest = max((_newest(mark) for mark in marks), default=0.0)
    while process.poll() is None and max(_newest(mark) for mark in marks) <= newest:
        time.sleep(0.05)
    time.sleep(draw.uniform(0, 2.5))
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    for member in [*family, psutil.Process(process.pid)]:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)


def _newest(folder: Path) -> float:
    times = []
    for file in [folder, *folder.rglob("*")]:
        try:
            times.append(file.stat().st_mtime)
        except OSError:  # absent, or just replaced
            continue
    return max(times, default=0.0)
