"""clip-retrieval's own server (`clip-retrieval back`, 2.45.0) over the same FAISS index.

It runs as published: Flask behind Werkzeug's threaded server, the only one that its command offers.
Of its documented options we take those that answer fastest here: metadata as Arrow, only the
columns that are asked for, the index in memory rather than mapped, no M-CLIP, no aesthetic
embeddings.
"""

import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import open_clip
import pyarrow as pa
import torch

from retrieval.index.create import ivf_of
from retrieval.index.snapshot import Snapshot

HERE = Path(__file__).resolve().parent.parent
ENVIRONMENT = HERE.parent / ".venv-bench" / "clip-retrieval-server"
REQUIREMENTS = HERE / "clip-retrieval-server.txt"
ARCHITECTURE = "ViT-S-32-alt"  # it loads some CLIP at the start; queries by vector do not use it
START_S = 120


def install() -> Path:
    """Its environment's Python."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / REQUIREMENTS.name
    if not stamp.is_file() or stamp.read_text() != REQUIREMENTS.read_text():
        venv.create(ENVIRONMENT, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(REQUIREMENTS)]
        subprocess.run(pip, check=True)
        shutil.copy(REQUIREMENTS, stamp)
    return python


def export(index: Path, patch_size: int, out: Path) -> None:
    """Export a one-segment index in clip-retrieval's layout: image.index, metadata/, a CLIP
    checkpoint."""
    snapshot = Snapshot.open(index)
    (segment,) = snapshot.segments
    inner = segment.indexes[patch_size]
    tuning = segment.tuning(patch_size)
    (out / "metadata").mkdir(parents=True)
    faiss.write_index(inner, str(out / "image.index"))
    inner = faiss.read_index(str(out / "image.index"))  # what a search looks into, in the file
    if (ivf := ivf_of(inner)) is not None:
        ivf.nprobe = tuning.nprobe
    elif isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = tuning.ef
    faiss.write_index(inner, str(out / "image.index"))
    table = segment.table.select(["key", "caption"])
    file = out / "metadata" / "0.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    torch.save(open_clip.create_model(ARCHITECTURE).state_dict(), out / "clip.pt")
    (out / "indices.json").write_text(json.dumps({"bench": str(out)}))


@contextmanager
def running(folder: Path) -> Iterator[int]:
    """Its server over an exported index; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours = sysconfig.get_path("purelib")
    program = "import sys; sys.path.append(sys.argv.pop(1)); from clip_retrieval import cli; "
    options = {
        "port": port, "indices_paths": folder / "indices.json", "use_arrow": True,
        "clip_model": f"open_clip:{ARCHITECTURE}/{folder / 'clip.pt'}", "use_jit": False,
        "columns_to_return": '["key", "caption"]', "enable_mclip_option": False,
        "provide_aesthetic_embeddings": False,
    }  # fmt: skip
    command = [str(install()), "-c", program + "cli.main()", ours, "back"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        _wait(port, server, folder / "log.txt")
        yield port
    finally:
        server.kill()
        server.wait()


def _wait(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(START_S):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/indices-list", timeout=5).read()
            return
        except OSError:
            time.sleep(1)
    sys.exit(f"clip-retrieval's server did not start:\n{log.read_text()[-2000:]}")
