"""One command for a folder of photos: seconds until something is found, the first time and later.

    python benchmarks/photos.py --pictures FOLDER             # of PNGs, such as Tux Paint's stamps
    python benchmarks/photos.py --pictures FOLDER --count 100 --rounds 1     # a smoke test

The album holds the pictures, then JPEGs made of them: rotated, in other sizes and shapes. The model
is open_clip's ViT-B-32 with random weights from a file. `launch/photos.py` is a process of its own
with a cache folder of its own; a client asks for its page and searches until there are hits. The
first start is observed for `--observed-s`, then ended; later starts go on with the rest of the
album behind their searches.
"""

import argparse
import http.client
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lib.harness import Target, finish
from retrieval.machine_load import OthersLoad

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = "ViT-B-32"
PAGE_S, SEARCH_S, FIRST_S = 3, 10, 60


def make_album(pictures: Path, album: Path, count: int) -> None:
    """Pictures as they are, then variants of them as photos have them, until there are `count`."""
    files = sorted(pictures.rglob("*.png"))[:count]
    if not files:
        raise SystemExit(f"no PNG below {pictures}")
    draw = random.Random(0)
    for number in range(count):
        source = files[number % len(files)]
        folder = album / source.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        if number < len(files):
            (folder / f"{number:05d}.png").write_bytes(source.read_bytes())
            continue
        image = Image.open(source).convert("RGB").rotate(draw.uniform(-20, 20), fillcolor="white")
        width = draw.randint(800, 1600)
        image = image.resize((width, round(width * draw.choice([0.67, 0.75, 1, 1.33, 1.5]))))
        image.save(folder / f"{number:05d}.jpg", quality=85)


def make_model(file: Path) -> None:
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    save_file({name: w.contiguous() for name, w in model.state_dict().items()}, file)


class Program:
    """`launch/photos.py` on the album, from its start."""

    def __init__(self, folder: Path) -> None:
        self.started = time.perf_counter()
        model = f"open_clip:{ARCHITECTURE}@{folder / 'model.safetensors'}"
        command = [sys.executable, str(ROOT / "launch/photos.py"), str(folder / "album")]
        self.process = subprocess.Popen(
            [*command, "--model", model, "--port", "0", "--no-browser"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "FLEXILIT_CACHE": str(folder / "cache")},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.port = int(line.partition("http://127.0.0.1:")[2].split()[0])

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def ask(self, path: str, body: Any = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{path}: status {answer.status}")
        data = answer.read()
        connection.close()
        return data

    def until(self, found: Callable[[], object], most_s: float = 3600) -> float:
        """Seconds since the start, once `found` is true."""
        while not found() and self.seconds < most_s:
            time.sleep(0.05)
        return self.seconds

    def page(self) -> bool:
        return b"<html" in self.ask("/")

    def hits(self) -> list[Any]:
        found: list[Any] = json.loads(self.ask("/v1/search", {"text": "a dog", "k": 10}))["hits"]
        return found

    @property
    def index(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("/v1/indices"))["indices"][0]
        return found

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate()


def first(folder: Path, count: int, observed_s: float) -> dict[str, Any]:
    """A folder that was never seen: until the page, until a search finds something."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    program = Program(folder)
    page_s = program.until(program.page)
    results_s = program.until(program.hits)
    before, start = program.index["count"], program.seconds
    print(f"page after {page_s:.1f} s, results after {results_s:.1f} s", flush=True)
    program.until(lambda: program.index["count"] == count, observed_s)
    found, seconds = program.index["count"], program.seconds
    program.end()
    return {
        "page_s": page_s, "first_results_s": results_s, "observed_s": seconds,
        "photos_found_then": found, "photos_per_s": (found - before) / (seconds - start),
    }  # fmt: skip


def later(folder: Path, rounds: int) -> dict[str, Any]:
    """An album that is known: until the page, until a search finds something."""
    page_s, search_s, found = [], [], []
    for _ in range(rounds):
        program = Program(folder)
        page_s.append(program.until(program.page))
        search_s.append(program.until(program.hits))
        found.append(program.index["count"])
        program.end()
        print(f"page after {page_s[-1]:.1f} s, search after {search_s[-1]:.1f} s", flush=True)
    return {"page_s": page_s, "first_search_s": search_s, "photos_found": found}


def beside_others(run: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """What `run` gives, and the share of the processors that neither it nor its programs took."""
    load, start, own_s = OthersLoad(), time.perf_counter(), children_s()
    found = run()
    share = load.share()
    taken = (children_s() - own_s) / (time.perf_counter() - start) / (os.cpu_count() or 1)
    return found, round(max(0.0, share - taken), 3)


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="kept for another run")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--observed-s", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.gettempdir()) / f"flexilit-photos-{args.count}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.safetensors").exists():
        make_album(args.pictures, folder / "album", args.count)
        make_model(folder / "model.safetensors")
    started, first_share = beside_others(lambda: first(folder, args.count, args.observed_s))
    known, later_share = beside_others(lambda: later(folder, args.rounds))
    figures = {
        "photos": args.count,
        "first": {**started, "processors_taken_by_others": first_share},
        "later": {**known, "processors_taken_by_others": later_share},
    }
    page_s, search_s = (float(np.median(known[name])) for name in ("page_s", "first_search_s"))
    targets = [
        Target("seconds, first start, until results", f"<= {FIRST_S}", started["first_results_s"]),
        Target("seconds, second start, until the page", f"<= {PAGE_S}", page_s),
        Target("seconds, second start, until a search is answered", f"<= {SEARCH_S}", search_s),
    ]
    finish("photos", figures, targets, packages=("torch", "open_clip_torch"), where="cpu")


if __name__ == "__main__":
    main()
