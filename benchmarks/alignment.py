"""What brings words nearer to a locked tower's images: one row per change, several seeds.

    python benchmarks/alignment.py                       # rows, judged on validation alone
    python benchmarks/alignment.py --rows final          # recipes, on the tests: looked at once
    python benchmarks/alignment.py --only own mean@10    # some rows; the others stay in the result
    python benchmarks/alignment.py --measured            # the result of rows that are done

The demo's recipe on the default drawings. Every expression of features is a choice of columns of
one joined cache, filled once in runs/alignment. A sixth of the trained groups of concepts is kept
for validation, by which rows are chosen; `final` rows train on all trained drawings. Their tests
are the demo's held-out captions and style, and photographs (`python -m data.photographs`), by their
names and, those of the commonest kinds, by kind, with paired bootstrap intervals of what they gain
over today's recipe. Rows that are done are read from runs/alignment/rows, so that it may be stopped
at any time.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from contrastive import LitModel, distributed
from contrastive.recipes import default_data, demo
from contrastive.run.config_file import Config
from contrastive.text_features import text_vectors
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.feature_terms import OWN
from data.class_names import CLASS_NAMES_FILE
from data.emoji.build import build_emoji
from data.photographs.build import build_photographs
from data.pipeline.reader import ShardReader
from data.token_ids import TokenIds
from lib.alignment_rows import BEST, KINDS, ROWS, TERMS, TESTS, TOWER, Row
from lib.harness import RESULTS, Target, finish
from lib.icons import build_named_icons
from lib.joined_features import JoinedFeatures, keys_of
from lib.paired import mean_interval
from lib.photograph_kinds import build_kinds
from lib.validation_split import split_train
from retrieval import ZeroShotClassifier, load_dataset

OUT = Path("runs/alignment")
TEST_SIZES = (56, 32, 28, 16, 14)
ACCEPTED = "no row that was tried reaches it"
Hits = dict[str, np.ndarray]
"""`TEST@SIZE` -> (n, 2): whether each image's class is the first, and among five; and
`photographs, recall@10@SIZE` -> (n, 1): whether each sentence finds its photograph."""


class Bench:
    """Shards by name, their joined features, and what models get right."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = folders
        self.shards = {n: sorted(map(str, f.glob("*.tar"))) for n, f in folders.items()}
        self.features = JoinedFeatures(OUT, TOWER, TERMS)
        self.labels: dict[str, np.ndarray] = {}
        for test in ("validation", *TESTS):
            reader = ShardReader(
                self.shards[test], None, batch_size=10_000, num_workers=0, need_captions=True
            )
            batches = list(reader)
            self.labels[test] = np.concatenate([batch.labels.numpy() for batch in batches])
        self.sentences = [captions[0] for batch in batches for captions in batch.captions]

    def training(self, row: Row) -> dict[str, Any]:
        """The recipe's fields that say on what it trains."""
        for source in ("train", "icons") if row.icons else ("train",):
            self.features.add(source, self.shards[source], row.sizes)
        drawings = ["fit"] if row.on == "fit" else ["fit", "validation"]
        counts = {source: len(keys_of(self.shards[source])) for source in drawings}
        shares = {s: (1 - row.icons) * n / sum(counts.values()) for s, n in counts.items()}
        if row.icons:
            shares["icons"] = row.icons
        shards = [shard for source in shares for shard in self.shards[source]]
        expression = row.changes.get("vision.features", OWN)
        folder = self.features.cache("+".join(shares), shards, expression, row.sizes)
        return {
            "data.shards": tuple(f"{self.folders[source]}/*.tar" for source in shares),
            "data.weights": tuple(shares.values()) if row.icons else (),
            "data.features": folder,
            "vision.patch_sizes": row.sizes,
        }

    @torch.no_grad()
    def hits(self, name: str, expression: str, model: LitModel, sizes: Sequence[int]) -> Hits:
        dataset = load_dataset("shards", str(self.folders[name]))
        names, templates = dataset.class_names, dataset.templates
        prompts = [t.replace("{c}", c) for c in names for t in templates]
        embeds = _encode(model, name, prompts).unflatten(0, (len(names), len(templates)))
        classes = normalize(embeds.mean(dim=1), dim=-1).numpy()
        classifier = ZeroShotClassifier(model, names, templates, classes)
        labels = self.labels[name]
        source = {"validation": "train", KINDS: "photographs"}.get(name, name)
        self.features.add(source, self.shards[source], sizes)
        keys, found = keys_of(self.shards[name]), {}
        for size in sizes:
            features = self.features.columns(keys, expression, size)
            images = model.embed_features(torch.from_numpy(features))
            hits = classifier.classify_embeddings(images.numpy())[0] == labels[:, None]
            found[f"{name}@{size}"] = np.stack([hits[:, 0], hits.any(1)], axis=1)
            if name == "photographs":
                texts = _encode(model, "sentences", self.sentences)
                own = (texts @ images.T).topk(10).indices == torch.arange(len(texts))[:, None]
                found[f"{name}, recall@10@{size}"] = own.any(1, keepdim=True).numpy()
        return found


def _encode(model: LitModel, name: str, texts: Sequence[str]) -> torch.Tensor:
    """As `encode_text` has them; what a frozen tower makes of them is kept."""
    tower = model.text.encoder.tower
    kept = OUT / "texts" / f"{name}.{tower.fingerprint}.npy"
    if kept.exists():
        vectors = np.load(kept)
    else:
        vectors = text_vectors(tower, TokenIds.of(tower.tokenizer(texts)))
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, vectors)
    return normalize(model.text.encoder.project(torch.from_numpy(vectors)).float(), dim=-1)


def changed(recipe: Config, changes: Mapping[str, Any]) -> Any:
    """A recipe with dotted fields replaced, those of a group together."""
    groups: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        group, _, name = path.rpartition(".")
        groups.setdefault(group, {})[name] = value
    own = groups.pop("", {})
    for group, values in groups.items():
        own[group] = dataclasses.replace(getattr(recipe, group), **values)
    return dataclasses.replace(recipe, **own)


def row_file(name: str, seed: int) -> Path:
    """Where a row's hits are kept."""
    return OUT / "rows" / f"{''.join(c if c.isalnum() else '-' for c in name)}.{seed}.npz"


def run_row(name: str, row: Row, seed: int, bench: Bench, test_sizes: Sequence[int]) -> Hits:
    """What it gets right, read where it was measured before."""
    file = row_file(name, seed)
    found: Hits = dict(np.load(file)) if file.exists() else {}
    run = {"name": file.stem, "out": str(OUT / "runs"), "seed": seed, "steps": row.steps}
    given = "" if seed else row.model
    folder = Path(given or f"{run['out']}/{run['name']}")
    if not found and not given:
        quiet = {"checkpoint_every": 0, "keep_checkpoints": 1, "data.num_workers": 1}
        cfg: TrainConfig = changed(demo(), {**row.changes, **bench.training(row), **run, **quiet})
        shutil.rmtree(folder, ignore_errors=True)
        train(cfg)
    for test in row.judged_on:
        sizes = test_sizes if row.on == "train" else row.sizes
        if missing := [size for size in sizes if f"{test}@{size}" not in found]:
            model = LitModel.from_pretrained(folder / "model")
            expression = row.changes.get("vision.features", OWN)
            found |= bench.hits(test, expression, model, missing)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, allow_pickle=False, **found)
    if row.on == "fit":
        shutil.rmtree(folder, ignore_errors=True)
    return found


def summary(seeds: Sequence[Hits]) -> dict[str, list[list[float]]]:
    """Of top-1 and top-5, or of recall: the mean, and the standard deviation of several seeds."""
    out = {}
    for name in seeds[0]:
        values = np.array([found[name].mean(0) for found in seeds])
        columns = [values.mean(0)] + ([values.std(0, ddof=1)] if len(values) > 1 else [])
        out[name] = np.stack(columns, axis=1).round(4).tolist()
    return out


def gains(
    before: Sequence[Hits], after: Sequence[Hits], labels: Mapping[str, np.ndarray]
) -> dict[str, list[list[float]]]:
    """What each figure gains, with the 95% interval of a paired bootstrap over whole classes.

    labels: test -> class of each image.
    """
    out: dict[str, list[list[float]]] = {}
    for name in sorted(set(before[0]) & set(after[0])):
        means = [np.mean([found[name] for found in seeds], axis=0) for seeds in (before, after)]
        classes = labels[name.split("@")[0].split(",")[0]]
        out[name] = [
            [round(float(x), 4) for x in (column.mean(), *mean_interval(column, classes, 2000))]
            for column in (means[1] - means[0]).T
        ]
    return out


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """What the best recipe was to reach, where it was measured."""
    row = figures.get("final", {}).get(BEST)
    if not row:
        return []

    def best(test: str, which: int) -> float:
        return max(x[which][0] for name, x in row.items() if name.startswith(f"{test}@"))

    found = [
        Target(f"{test}, top-{(1, 5)[which]}", f">= {wanted}", best(test, which))
        for test, which, wanted in (
            ("heldout_captions", 0, 0.28),
            ("heldout_captions", 1, 0.5),
            ("heldout_style", 0, 0.52),
            ("heldout_style", 1, 0.72),
            ("photographs", 0, 0.58),
            ("photographs, recall@10", 0, 0.32),
        )
    ]
    for test, wanted in (("heldout_captions", 0.05), ("heldout_style", 0.07)):
        lost = round(best(test, 0) - row[f"{test}@56"][0][0], 4)
        found.append(Target(f"{test}, top-1 that patch 56 loses", f"<= {wanted}", lost))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["single", "combined"])
    parser.add_argument("--only", nargs="+", help="names of rows; else all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-sizes", type=int, nargs="+", default=TEST_SIZES)
    parser.add_argument("--measured", action="store_true", help="train nothing: what is there")
    args = parser.parse_args()
    distributed.ensure_group()
    data = Path(build_emoji(default_data()))
    folders = split_train(data, OUT / "data") | {n: data / n for n in ("train", *TESTS[:2])}
    folders["photographs"] = build_photographs("runs/data/photographs")
    folders[KINDS] = build_kinds(folders["photographs"], OUT / "data/kinds")
    unlike = [folders[n] / CLASS_NAMES_FILE for n in ("heldout_captions", "validation")]
    names = [name for file in unlike for name in file.read_text().splitlines()]
    folders["icons"] = build_named_icons(OUT / "data/icons", names)
    bench = Bench(folders)
    chosen = [(kind, n, row) for kind in args.rows for n, row in ROWS[kind].items()]
    chosen = [item for item in chosen if not args.only or item[1] in args.only]
    file = RESULTS / "alignment.json"
    figures = json.loads(file.read_text())["figures"] if file.exists() else {}
    found: dict[str, list[Hits]] = {}
    for seed in range(args.seeds):
        for kind, name, row in chosen:
            if args.measured and not row_file(name, seed).exists():
                continue
            found.setdefault(name, []).append(run_row(name, row, seed, bench, args.test_sizes))
            hits = found[name][-1]
            numbers = " ".join(f"{n} {100 * v.mean(0)[0]:.1f}" for n, v in hits.items())
            print(f"seed {seed}, {name}: {numbers}", flush=True)
            rows = figures.setdefault(kind, {})
            rows[name] = {"seeds": len(found[name]), "steps": row.steps, **summary(found[name])}
    if "today" in found:
        figures.setdefault("gains over today", {}).update(
            (name, gains(found["today"], found[name], bench.labels))
            for kind, name, _ in chosen
            if kind == "final" and name in found and name != "today"
        )
    packages = ("torch", "timm", "transformers", "deepspeed")
    wanted = targets(figures)
    accepted = {target.what: ACCEPTED for target in wanted}
    finish("alignment", figures, wanted, packages=packages, accepted=accepted)


if __name__ == "__main__":
    main()
