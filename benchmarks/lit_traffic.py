"""Bytes between ranks per training step, by what they carry; open_clip's modes beside it.

    python benchmarks/lit_traffic.py

Two ranks under the deepspeed launcher (gloo, CPU), MiniLM-L6, image features of width 384 ready in
memory. Every collective of a step is counted where torch hands it to the backend. `handed_in` is
the size of the tensors that a rank gives to the collective; `sent` is what must leave a rank (an
all-gather: its tensor to each other rank; an all-reduce: 2 (W - 1) / W of it). Bytes do not depend
on the length of texts, so these are short.

The kernel's count of the loopback interface, which includes TCP's headers, shows whether a
collective was missed. Beside MiniLM's gradients a missed one would not show, so the same is counted
with a small BERT whose embeddings are frozen.

open_clip trains the same towers under plain DDP; its image tower is locked too.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss, SigLipLoss

from contrastive import VisionTower, distributed
from contrastive.run.config import ZeroConfig
from data.token_ids import TokenIds
from lib.collectives import Collective, CountCollectives, loopback_bytes
from lib.harness import Target, finish
from lib.lit_setup import (
    CPU,
    LOSSES,
    Loss,
    Size,
    adamw,
    build_model,
    build_open_clip,
    build_ours,
    build_step,
    build_tower,
    launch,
    ready_batch,
    text_folder,
)

RANKS, STEPS = 2, 3
OURS: dict[str, dict[str, Any]] = {
    "": {},
    "chunks of 32": {"micro_batch_size": 32},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2},
    "ZeRO 3": {"stage": 3},
}
THEIRS: dict[tuple[Loss, str], dict[str, Any]] = {
    ("sigmoid", impl): {"dist_impl": impl} for impl in ("bidir", "shift", "reduce", "gather")
} | {
    ("softmax", " ".join(flags) or "no flags"): dict.fromkeys(flags, True)
    for flags in ((), ("gather_with_grad",), ("local_loss",), ("local_loss", "gather_with_grad"))
}
SMALL = Size("", 0, text_layers=2, text_width=64, batch_size=0, precisions=())


@dataclass(frozen=True)
class Text:
    """A text tower, and the batches to count it at."""

    name: str
    folder: str
    batch_sizes: Sequence[int]
    freeze_embeddings: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 512], help="pairs")
    parser.add_argument("--text", help="folder of the one text tower to count; else two, as above")
    args = parser.parse_args()
    sizes = args.batch_sizes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = (
            [Text("given", args.text, sizes)]
            if args.text
            else [
                Text("MiniLM-L6", text_folder(CPU, folder / "minilm"), sizes),
                Text(
                    "small",
                    text_folder(SMALL, folder / "small"),
                    sizes[-1:],
                    freeze_embeddings=True,
                ),
            ]
        )
        (folder / "job.json").write_text(json.dumps([asdict(text) for text in texts]))
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks need not have a GPU each
        launch(RANKS, Path(__file__), folder / "job.json")
        rows = json.loads((folder / "rows.json").read_text())
    packages = ("torch", "deepspeed", "open_clip_torch")
    figures = {"ranks": RANKS, "width": rows[0]["width"], "rows": rows}
    finish("lit_traffic", figures, targets(rows), draw(rows), packages, where="cpu")


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """Bounds that follow from the method, against what was counted."""
    ours = [row for row in rows if row["who"] == "FlexiLiT"]
    plain = [row for row in ours if row["zero_stage"] == 0]

    def handed_in(row: dict[str, Any], kind: str) -> float:
        """By all ranks."""
        return RANKS * row["kinds"].get(kind, {"handed_in": 0})["handed_in"]

    def deviation(row: dict[str, Any], kind: str, expected: float) -> float:
        return abs(handed_in(row, kind) / expected - 1)

    features = max(deviation(r, "features", 4 * r["pairs"] * r["width"]) for r in ours)
    backward = max(handed_in(row, "feature gradients") for row in ours)
    gradients = max(
        deviation(r, "parameter gradients", 4 * RANKS * r["trainable_parameters"]) for r in plain
    )
    # valid: 1 byte, concepts: 8; softmax: each rank its B partial logsumexps, 4 bytes each
    scalars = max(
        handed_in(r, "scalars") / (r["pairs"] * (9 + 4 * RANKS * (r["loss"] == "softmax")))
        for r in ours
    )
    wire = [row["loopback_over_counted"] for row in rows if "loopback_over_counted" in row]
    found = [
        Target("image features gathered / 4 B d, largest difference from 1", "<= 0", features),
        Target("bytes of features' gradients", "<= 0", backward),
        Target("O(B) bytes, all ranks / (9 B sigmoid, 9 B + 4 B W softmax)", "<= 1", scalars),
        Target("gradients / 4 bytes per parameter, difference from 1, ZeRO 0", "<= 0", gradients),
    ]
    if wire:
        what = "bytes of the loopback interface / bytes counted, largest difference from 1"
        found.append(Target(what, "<= 0.03", max(abs(ratio - 1) for ratio in wire)))
    return found


# ---- ranks -----------------------------------------------------------------------------------


def run_ranks(job_file: Path) -> None:
    """What each process under the launcher does."""
    distributed.init_from_launcher()
    tower = build_tower(CPU, torch.float32)
    rows = []
    for text in [Text(**entry) for entry in json.loads(job_file.read_text())]:
        for pairs in text.batch_sizes:
            variants = OURS if pairs == text.batch_sizes[0] else {"": {}}
            for loss, (name, zero) in product(LOSSES, variants.items()):
                row = {"who": "FlexiLiT", "loss": loss, "mode": name, "text": text.name}
                rows.append(row | count_ours(tower, text, loss, ZeroConfig(**zero), pairs))
                gc.collect()
            for (loss, name), flags in THEIRS.items():
                row = {"who": "open_clip", "loss": loss, "mode": name, "text": text.name}
                rows.append(row | count_open_clip(tower, text, loss, flags, pairs))
                gc.collect()
    if distributed.is_main():
        (job_file.parent / "rows.json").write_text(json.dumps(rows))
    distributed.shutdown()


def count_ours(
    tower: VisionTower, text: Text, loss: Loss, zero: ZeroConfig, pairs: int
) -> dict[str, Any]:
    model = build_model(tower, text.folder, loss)
    for parameter in model.text.encoder.tower.embedding_parameters():
        parameter.requires_grad_(not text.freeze_embeddings)
    parameters = _trainable(model.text)
    step = build_step(model, zero, pairs)
    ids = TokenIds.of(model.text.encoder.tower.tokenizer(["a cat"] * (pairs // RANKS)))
    batch, features = ready_batch(None, ids), torch.randn(len(ids), tower.embed_dim)
    counts = count(lambda: step(batch, features, batch.valid))
    step.engine.destroy()
    facts = {"pairs": pairs, "width": tower.embed_dim, "zero_stage": zero.stage}
    return facts | {"trainable_parameters": parameters} | counts


def count_open_clip(
    tower: VisionTower, text: Text, loss: Loss, flags: dict[str, Any], pairs: int
) -> dict[str, Any]:
    world_size = distributed.world_size()
    like = build_ours(tower, text.folder, loss=loss, batch_size=pairs)
    like.engine.destroy()
    model = build_open_clip(tower, text.folder, like)
    text_net: Any = model.text
    text_net.transformer.embeddings.requires_grad_(not text.freeze_embeddings)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    loss_class = SigLipLoss if loss == "sigmoid" else ClipLoss
    contrast = loss_class(rank=distributed.rank(), world_size=world_size, **flags)
    optimizer = adamw(list(model.parameters()))
    tokens = torch.tensor(
        like.model.text.encoder.tower.tokenizer(["a cat"] * (pairs // world_size))
    )
    features = torch.randn(len(tokens), tower.embed_dim)
    features = torch.nn.functional.normalize(features, dim=-1)

    def step() -> None:
        out = parallel(text=tokens)
        optimizer.zero_grad()
        contrast(**out | {"image_features": features}).backward()
        optimizer.step()

    facts = {"pairs": pairs, "width": tower.embed_dim}
    return facts | {"trainable_parameters": _trainable(model)} | count(step)


def _trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count(step: Callable[[], object]) -> dict[str, Any]:
    """Bytes per step and rank, the mean of a few steps and of all ranks."""
    step()
    distributed.barrier()
    before = loopback_bytes()
    with CountCollectives() as counted:
        for _ in range(STEPS):
            step()
    distributed.barrier()
    after = loopback_bytes()
    calls = [call for own in distributed.gather_objects(counted.calls) for call in own]
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for call in calls:
        sums[kind_of(call)].update(calls=1, handed_in=call.payload_bytes, sent=call.sent_bytes)
    kinds = {
        kind: {name: total / (STEPS * RANKS) for name, total in counts.items()}
        for kind, counts in sums.items()
    }
    found = {"kinds": kinds, "sent": sum(row["sent"] for row in kinds.values())}
    if before is not None and after is not None:
        found["loopback_over_counted"] = (after - before) / sum(call.gloo_bytes for call in calls)
    return found


def kind_of(call: Collective) -> str:
    """What a collective carries, by who called it."""
    for file, function in call.places:
        if file.endswith(("contrastive/train/step.py", "contrastive/train/global_batch.py")):
            if call.in_backward:
                return "feature gradients"
            return "features" if function == "__init__" and call.floating else "scalars"
        if file.endswith(("open_clip/loss.py", "torch/distributed/nn/functional.py")):
            return "feature gradients" if call.in_backward else "features"
        if "/deepspeed/runtime/" in file:
            if "gather" in call.op or call.op == "broadcast_":
                return "parameters"
            return "parameter gradients" if call.floating and call.numel > 1 else "other"
    return "parameter gradients" if call.in_backward else "other"  # DDP's reducer has no frame


# ---- plot ------------------------------------------------------------------------------------


def draw(rows: Sequence[dict[str, Any]]) -> Callable[[Path], None]:
    """Bars of what crosses besides the parameters' gradients, at the largest batch."""

    def plot(file: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        most = max(row["pairs"] for row in rows)
        first = rows[0]["text"]
        shown = [row for row in rows if row["pairs"] == most and row["text"] == first][::-1]
        names = [" ".join(filter(None, (r["who"], r["loss"], r["mode"]))) for r in shown]
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
        left = [0.0] * len(shown)
        for kind, colour in (
            ("features", "#4477aa"),
            ("feature gradients", "#ee6677"),
            ("scalars", "#228833"),
            ("other", "#bbbbbb"),
        ):
            sent = [row["kinds"].get(kind, {"sent": 0})["sent"] / 1e3 for row in shown]
            axes.barh(names, sent, left=left, label=kind, color=colour)
            left = [a + b for a, b in zip(left, sent, strict=True)]
        axes.set_xlabel("kB that leave a rank per step, without the parameters' gradients")
        axes.set_title(f"{RANKS} ranks, {most} pairs, width {rows[0]['width']}")
        axes.legend()
        figure.savefig(file, dpi=120)
        plt.close(figure)

    return plot


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_ranks(Path(sys.argv[-1]))
    else:
        main()
