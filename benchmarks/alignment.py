"""What brings words nearer to a locked tower's images: one row per change, several seeds.

    python benchmarks/alignment.py                        # rows with a frozen text tower
    python benchmarks/alignment.py --rows trained         # and those that train it: hours

The demo's recipe on the default drawings. Every expression of features is a choice of columns of
one joined cache, filled once in runs/alignment. A sixth of the trained groups of concepts is kept
for validation, by which rows are to be chosen; the held-out captions and style of the demo, and
photographs (`python -m data.photographs`), are the test. Rows that are done are read from
runs/alignment/rows, so that it may be stopped at any time.
"""

import argparse
import dataclasses
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.nn.functional import normalize

from contrastive import LitModel, VisionTower, distributed, load_vision_tower
from contrastive.image_features import fill_cache
from contrastive.recipes import default_data, demo
from contrastive.run.config_file import Config
from contrastive.text_features import text_vectors
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.feature_terms import OWN
from contrastive.vision.select_features import select_features
from data.cache.checksums import IntactFiles
from data.cache.features import FeatureCache
from data.class_names import CLASS_NAMES_FILE, TEMPLATES_FILE
from data.config import DataConfig
from data.emoji.build import build_emoji
from data.photographs.build import build_photographs
from data.pipeline.reader import ShardReader
from data.shards.names import shard_name
from data.shards.tar import add_member
from data.token_ids import TokenIds
from lib.harness import finish
from retrieval import ZeroShotClassifier, load_dataset

OUT = Path("runs/alignment")
TOWER = "dinov2s-flexi"
TERMS = ("cls@9", "cls@10", "cls@11", "cls", "mean@10", "mean@11", "mean")
TESTS = ("validation", "heldout_captions", "heldout_style", "photographs")
FROZEN = {"text.frozen": True, "text.dropout": 0.0, "text.head": "mlp", "optim.lr": 1e-3}
BLOCKS = "cls@9+cls@10+cls@11"

# Row -> changes of the demo's recipe. `frozen` ones train in a minute or two, on cached text
# vectors; `trained` ones train the text tower.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "frozen": {
        "cls": {},
        "mean@10": {"vision.features": "mean@10"},
        "cls@11": {"vision.features": "cls@11"},
        "cls+mean": {"vision.features": "cls+mean"},
        BLOCKS: {"vision.features": BLOCKS},
        f"{BLOCKS}, width 768": {"vision.features": BLOCKS, "embed_dim": 768},
        "all seven": {"vision.features": "+".join(TERMS)},
        f"{BLOCKS}, no text head": {"vision.features": BLOCKS, "text.head": "none"},
        f"{BLOCKS}, linear image head": {"vision.features": BLOCKS, "vision.head": "linear"},
        f"{BLOCKS}, mlp image head": {"vision.features": BLOCKS, "vision.head": "mlp"},
        f"{BLOCKS}, 4 captions": {"vision.features": BLOCKS, "data.captions_per_image": 4},
        f"{BLOCKS}, sigmoid": {
            "vision.features": BLOCKS,
            "loss.kind": "sigmoid",
            "loss.temperature_init": 10.0,
            "loss.bias_init": -10.0,
        },
    },
    "trained": {
        "trained: cls": {},
        f"trained: {BLOCKS}": {"vision.features": BLOCKS},
        f"trained: {BLOCKS}, last two blocks": {
            "vision.features": BLOCKS,
            "text.trainable": (r"layer\.[45]\.",),
        },
        f"trained: {BLOCKS}, near the start": {
            "vision.features": BLOCKS,
            "text.decay_to_start": 0.3,
        },
    },
}


class Drawings:
    """Labelled shards, their joined features at every patch size, and caches made of columns."""

    def __init__(self, folders: Mapping[str, Path], sizes: tuple[int, ...]) -> None:
        base = load_vision_tower(TOWER, dtype=distributed.resolve_dtype(demo().vision.dtype))
        self.sizes, self.width = sizes, base.embed_dim
        self.base, self.joint = base, select_features(base, "+".join(TERMS))
        self.shards = {n: sorted(map(str, f.glob("*.tar"))) for n, f in folders.items()}
        self.caches = {name: self._fill(name) for name in folders}
        self.folders = folders

    def _fill(self, name: str) -> FeatureCache:
        cfg = DataConfig(shards=tuple(self.shards[name]), features=str(OUT / "joined" / name))
        return fill_cache(self.joint, cfg, self.sizes)

    def columns(self, name: str, expression: str, shard: int, size: int) -> np.ndarray:
        """Features of all images of a shard."""
        chosen = ["cls"] if expression == OWN else expression.split("+")
        keys = self._keys(name, shard)
        rows = np.arange(len(keys))
        found, valid = self.caches[name].lookup(np.full(len(rows), shard), rows, size)
        assert valid.all()
        w = self.width
        parts = [TERMS.index(term) for term in chosen]
        return np.concatenate([found[:, i * w : (i + 1) * w] for i in parts], axis=1)

    def _keys(self, name: str, shard: int) -> list[str]:
        reader = ShardReader([self.shards[name][shard]], None, batch_size=10_000, num_workers=0)
        return [key for batch in reader for key in batch.keys]

    def cache(self, name: str, expression: str) -> str:
        """The folder of a cache of one expression, for training."""
        tower: VisionTower = self.base
        if expression != OWN:
            tower = select_features(self.base, expression)
        folder = OUT / "caches" / name / expression
        cache = FeatureCache(
            folder,
            tower.fingerprint,
            self.shards[name],
            self.sizes,
            made_of=tower.made_of,
            max_pixels=DataConfig().max_pixels,
        )
        cache.claim(tower.embed_dim)
        for shard, _ in cache.missing():
            for size in self.sizes:
                features = self.columns(name, expression, shard, size)
                cache.write(shard, size, 0, self._keys(name, shard), features)
        self._share_texts(name, folder)
        return str(folder)

    def _class_embeds(
        self, name: str, model: LitModel, names: Sequence[str], templates: Sequence[str]
    ) -> np.ndarray:
        """As `embed_classes` has them; what a frozen tower makes of prompts is kept."""
        tower = model.text.encoder.tower
        kept = OUT / "prompts" / f"{name}.{tower.fingerprint}.npy"
        if kept.exists():
            vectors = np.load(kept)
        else:
            prompts = [t.replace("{c}", c) for c in names for t in templates]
            vectors = text_vectors(tower, TokenIds.of(tower.tokenizer(prompts)))
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.save(kept, vectors)
        embeds = normalize(model.text.encoder.project(torch.from_numpy(vectors)).float(), dim=-1)
        means = embeds.unflatten(0, (len(names), len(templates))).mean(dim=1)
        return normalize(means, dim=-1).numpy()

    def _share_texts(self, name: str, folder: Path) -> None:
        """Captions and their vectors are the same for all expressions: copied, where they are."""
        for shard in self.shards[name]:
            files = IntactFiles(folder, shard)
            for kind in ("texts", "vectors"):
                for made in folder.parent.glob(f"*/{shard_name(shard)}.{kind}.*"):
                    if not (folder / made.name).exists():
                        files.write(made.name, partial(_write_bytes, made))

    @torch.no_grad()
    def hits(self, name: str, expression: str, model: LitModel) -> dict[int, np.ndarray]:
        """Patch size -> (n, 2): whether each image's class is the first, and among five."""
        dataset = load_dataset("shards", str(self.folders[name]))
        names, templates = dataset.class_names, dataset.templates
        embeds = self._class_embeds(name, model, names, templates)
        classifier = ZeroShotClassifier(model, names, templates, embeds)
        reader = ShardReader(self.shards[name], None, batch_size=10_000, num_workers=0)
        labels = np.concatenate([batch.labels.numpy() for batch in reader])[:, None]
        found = {}
        for size in self.sizes:
            features = [
                self.columns(name, expression, shard, size)
                for shard in range(len(self.shards[name]))
            ]
            embeds = model.embed_features(torch.from_numpy(np.concatenate(features))).numpy()
            hits = classifier.classify_embeddings(embeds)[0] == labels
            found[size] = np.stack([hits[:, 0], hits.any(1)], axis=1)
        return found


def split_train(data: Path) -> dict[str, Path]:
    """The trained drawings in two: `fit`, and `validation`, a sixth of the groups of concepts."""
    out = OUT / "data"
    if not (out / "validation" / TEMPLATES_FILE).exists():
        names: set[str] = set()
        members: dict[str, list[tuple[str, dict[str, bytes]]]] = {"fit": [], "validation": []}
        for shard in sorted((data / "train").glob("*.tar")):
            for key, sample in _samples(shard).items():
                about = json.loads(sample["json"])
                kept = blake2b(about["group"].encode(), digest_size=1).digest()[0] % 6 == 0
                members["validation" if kept else "fit"].append((key, sample))
                names |= {about["label"]} if kept else set()
        classes = sorted(names)
        for name, samples in members.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            with tarfile.open(out / name / "0.tar", "w") as tar:
                for key, sample in samples:
                    if name == "validation":
                        label = json.loads(sample["json"])["label"]
                        sample = sample | {"cls": str(classes.index(label)).encode()}
                    for suffix, content in sample.items():
                        add_member(tar, f"{key}.{suffix}", content)
        (out / "validation" / CLASS_NAMES_FILE).write_text("".join(f"{n}\n" for n in classes))
        templates = (data / "heldout_captions" / TEMPLATES_FILE).read_text()
        (out / "validation" / TEMPLATES_FILE).write_text(templates)
    return {name: out / name for name in ("fit", "validation")}


def _samples(shard: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[suffix] = file.read()
    return samples


def _write_bytes(source: Path, out: BinaryIO) -> None:
    out.write(source.read_bytes())


def changed(recipe: Config, changes: Mapping[str, Any]) -> Any:
    """A recipe with dotted fields replaced."""
    for path, value in changes.items():
        group, _, name = path.rpartition(".")
        if group:
            part = dataclasses.replace(getattr(recipe, group), **{name: value})
            recipe = dataclasses.replace(recipe, **{group: part})
        else:
            recipe = dataclasses.replace(recipe, **{name: value})
    return recipe


def run_row(
    name: str, changes: Mapping[str, Any], seed: int, drawings: Drawings, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Test -> patch size -> top-1 and top-5; read where it was measured before."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    file = OUT / "rows" / f"{slug}.{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    expression = changes.get("vision.features", OWN)
    cfg: TrainConfig = changed(
        demo(),
        {
            **changes,
            "name": f"{slug}.{seed}",
            "out": str(OUT / "runs"),
            "data.shards": tuple(drawings.shards["fit"]),
            "data.features": drawings.cache("fit", expression),
            "data.num_workers": 1,
            "vision.patch_sizes": drawings.sizes,
            "steps": steps,
            "seed": seed,
            "checkpoint_every": 0,
            "keep_checkpoints": 1,
        },
    )
    shutil.rmtree(cfg.folder, ignore_errors=True)
    train(cfg)
    model = LitModel.from_pretrained(cfg.folder / "model")
    found: dict[str, dict[str, list[float]]] = {}
    for test in TESTS:
        hits = drawings.hits(test, expression, model)
        found[test] = {str(size): x.mean(0).round(4).tolist() for size, x in hits.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    shutil.rmtree(cfg.folder)
    return found


def summary(seeds: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of top-1 and top-5."""
    out: dict[str, Any] = {}
    for test in TESTS:
        out[test] = {}
        for size in seeds[0][test]:
            values = np.array([found[test][size] for found in seeds])
            spread = values.std(0, ddof=1) if len(values) > 1 else np.full(2, np.nan)
            out[test][size] = {
                f"top{k}": [round(float(values[:, i].mean()), 4), round(float(spread[i]), 4)]
                for i, k in enumerate((1, 5))
            }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["frozen"])
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of 128 images each")
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=[56, 28])
    args = parser.parse_args()
    distributed.ensure_group()
    data = Path(build_emoji(default_data()))
    folders = split_train(data) | {n: data / n for n in ("heldout_captions", "heldout_style")}
    folders["photographs"] = build_photographs("runs/data/photographs")
    drawings = Drawings(folders, tuple(args.patch_sizes))
    found: dict[str, list[dict]] = {}
    for seed in range(args.seeds):
        for kind in args.rows:
            for name, changes in ROWS[kind].items():
                if args.only and args.only not in name:
                    continue
                more = FROZEN if kind == "frozen" else {}
                row = run_row(name, {**more, **changes}, seed, drawings, args.steps)
                found.setdefault(name, []).append(row)
                numbers = "; ".join(
                    f"{test} " + " ".join(f"{100 * v[0]:.1f}/{100 * v[1]:.1f}" for v in s.values())
                    for test, s in row.items()
                )
                print(f"seed {seed}, {name}: {numbers}", flush=True)
    table = {name: {"seeds": len(rows), **summary(rows)} for name, rows in found.items()}
    finish(
        "alignment",
        {"patch_sizes": args.patch_sizes, "steps": args.steps, "rows": table},
        [],
        packages=("torch", "timm", "transformers", "deepspeed"),
    )


if __name__ == "__main__":
    main()
