"""Whether a search knows that what is asked for is not there, and keeps what it promises.

    python benchmarks/absent.py

On the demo's model and its index of 5,804 drawings; runs the demo first where that has not been
done. A text is present as it is, and absent once the pictures of its concept are taken out of the
index, with their near twins: its group of variants, or the whole Unicode subgroup (and their
captions out of the background). Scores of both are compared: AUROC, and the share of absent texts
refused where 5% of present ones are. Texts: names of concepts that were trained on, their other
captions, names that were held out; and captions of photographs, in an index of photographs alone,
absent with all pictures of their class.

Then what the product itself does: an index is calibrated on half of its captions, and the other
half is asked. Expected calibration errors are of the held-out sets, with temperatures of 200
images that are held apart. Candidates are promised by some captions, and counted on others.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from contrastive import LitModel
from data.photographs.build import build_photographs
from lib.harness import ROOT, Target, finish, run_demo
from lib.tars import read_tar
from retrieval import embed_shards, evaluate, load_dataset
from retrieval.embed.partitions import open_vectors
from retrieval.index.snapshot import Snapshot
from retrieval.search.background import COMMON, answer_scores, log_probabilities
from retrieval.search.calibrate import places
from retrieval.search.calibration import unit
from retrieval.search.conformal import fewest_candidates, losses, p_values
from retrieval.search.refine import blend

RATE = 0.05  # of present texts that are refused
LOST = 0.01  # of the fine answers
K = 10
SPLITS = 200
SCORE = "score among both"  # the product's
OTHERS = 800  # captions beside the names
VALIDATION = 500  # captions that candidates are promised by
FITTED_ON = 200  # images of a temperature


SUBGROUP_TARGET = "trained names refused without their subgroup"
ACCEPTED = {
    SUBGROUP_TARGET: "pictures of other subgroups are taken for the words: a similarity alone "
    "refuses 0.74"
}


@dataclass(frozen=True)
class Pictures:
    """An index's vectors at one patch size; per picture and per text of the background, which
    pictures are taken out with it."""

    vectors: np.ndarray  # (n, d), unit norm
    kinds: np.ndarray  # (n,)
    background: np.ndarray  # (b, d)
    background_kinds: np.ndarray  # (b,); "" of texts of no picture


def best_scores(
    pictures: Pictures, texts: np.ndarray, without: Sequence[str] | None, scale: float
) -> dict[str, np.ndarray]:
    """Candidates of a score, per text, of its best picture; without: per text, the kind of pictures
    and texts that are taken out."""
    similarities = texts @ pictures.vectors.T
    rivals = np.ones((len(texts), len(pictures.background)), bool)
    if without is not None:
        own = np.array(without)[:, None]
        similarities = np.where(pictures.kinds == own, np.nan, similarities)
        rivals = pictures.background_kinds != own
    best = np.nanargmax(similarities, axis=1)
    images, found = pictures.vectors[best], {}
    found["similarity"] = reached = np.einsum("td,td->t", texts, images)
    found["above mean image"] = reached - texts @ pictures.vectors.mean(axis=0)
    found["z over images"] = (reached - np.nanmean(similarities, 1)) / np.nanstd(similarities, 1)
    is_common = pictures.background_kinds == ""
    for name, chosen in (
        ("common", is_common),
        ("captions", ~is_common),
        ("both", np.ones_like(is_common)),
    ):
        others, kept = pictures.background[chosen], rivals[:, chosen]
        at_image = np.where(kept, images @ others.T, np.nan)
        z = (reached - np.nanmean(at_image, 1)) / np.nanstd(at_image, 1)
        found[f"z among {name}"] = z
        asked = texts, images, others, scale
        found[f"log-probability among {name}"] = log_probabilities(*asked, kept)
        found[f"score among {name}"] = answer_scores(*asked, kept)
    return found


def auroc(present: np.ndarray, absent: np.ndarray) -> float:
    ranks = rankdata(np.concatenate([present, absent]))[: len(present)]
    return float((ranks.sum() / len(present) - (len(present) + 1) / 2) / len(absent))


def compare(
    present: Mapping[str, np.ndarray], absent: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Per score."""
    return {
        name: {
            "auroc": auroc(scores, absent[name]),
            "refused": float((absent[name] < np.quantile(scores, RATE)).mean()),
        }
        for name, scores in present.items()
    }


# ---- the drawings --------------------------------------------------------------------------


class Drawings:
    """The demo's index, with what is known of its drawings."""

    def __init__(self, index: Path, data: Path, model: LitModel) -> None:
        self.snapshot, self.model = Snapshot.open(index), model
        self.sizes = [size for size in self.snapshot.patch_sizes if isinstance(size, int)]
        about: dict[str, dict[str, Any]] = {}
        for tar in sorted(data.glob("*/*.tar")):
            about |= read_about(tar)
        self.ids = self.snapshot.ids()
        rows = self.snapshot.rows(self.ids)
        self.about = [about[row["key"]] for row in rows]
        self.of = {one["label"]: one for one in self.about}  # a concept, by its name
        trained = {one["label"] for one in self.about if one["part"] == "train"}
        self.names = sorted(self.of)
        self.trained = sorted(trained)
        self.held_out = sorted({*self.names} - trained)
        rng = np.random.default_rng(0)
        others = {(c, n) for n in trained for c in self.of[n]["captions"][1:4] if c not in self.of}
        self.others = [sorted(others)[i] for i in rng.permutation(len(others))[:OTHERS]]
        texts = [*self.names, *(caption for caption, _ in self.others)]
        self.rows = dict(zip(texts, model.encode_text(texts).float().numpy(), strict=True))
        self.common = model.encode_text(list(COMMON)).float().numpy()

    def texts(self, names: Sequence[str]) -> np.ndarray:
        return np.stack([self.rows[name] for name in names])

    def pictures(self, size: int, kind: str) -> Pictures:
        vectors = self.snapshot.vectors(self.ids.tolist(), size)
        background = np.concatenate([self.texts(self.names), self.common])
        kinds = [self.of[name][kind] for name in self.names] + [""] * len(self.common)
        own = np.array([one[kind] for one in self.about])
        return Pictures(unit(vectors), own, background, np.array(kinds))


def read_about(tar: Path) -> dict[str, dict[str, Any]]:
    """Key -> its JSON, and the folder that it is of."""
    return {
        name[:-5]: {**json.loads(content), "part": tar.parent.name}
        for name, content in read_tar(tar).items()
        if name.endswith(".json")
    }


def absences(drawings: Drawings) -> dict[str, Any]:
    """By texts, patch size and what is taken out: every score."""
    asked = {
        "trained names": [(name, name) for name in drawings.trained],
        "other captions of trained names": drawings.others,
        "held-out names": [(name, name) for name in drawings.held_out],
    }
    scale = drawings.model.text.scale().item()
    found: dict[str, Any] = {}
    for title, pairs in asked.items():
        texts = drawings.texts([text for text, _ in pairs])
        for size in drawings.sizes:
            present = best_scores(drawings.pictures(size, "group"), texts, None, scale)
            for kind in ("group", "subgroup"):
                pictures = drawings.pictures(size, kind)
                own = [drawings.of[name][kind] for _, name in pairs]
                absent = best_scores(pictures, texts, own, scale)
                found.setdefault(title, {"texts": len(pairs)}).setdefault(str(size), {})[kind] = (
                    compare(present, absent)
                )
    return found


def by_photographs(model: LitModel, sizes: Sequence[int], folder: Path, name: str) -> Any:
    """An index of photographs, asked by their captions."""
    root = build_photographs(folder / "photographs")
    about = read_about(root / "0.tar")
    embed_shards(model, [str(root / "0.tar")], sizes, folder / "emb_photographs", model_dir=name)
    captions = [one["captions"][0] for one in about.values()]
    labels = np.array([one["label"] for one in about.values()])
    texts = model.encode_text(captions).float().numpy()
    common = model.encode_text(list(COMMON)).float().numpy()
    found: dict[str, Any] = {"texts": len(captions)}
    for size in sizes:
        vectors = unit(np.asarray(open_vectors(folder / "emb_photographs", size, 0), np.float32))
        kinds = np.concatenate([labels, [""] * len(common)])
        pictures = Pictures(vectors, labels, np.concatenate([texts, common]), kinds)
        scale = model.text.scale().item()
        present = best_scores(pictures, texts, None, scale)
        absent = best_scores(pictures, texts, labels.tolist(), scale)
        found[str(size)] = {"class": compare(present, absent)}
    return found


def refusals(drawings: Drawings) -> dict[str, Any]:
    """What a calibration by half of the captions refuses of the other half, over splits."""
    scale = drawings.model.text.scale().item()
    texts, found = drawings.texts(drawings.names), {}
    for size in drawings.sizes:
        present = best_scores(drawings.pictures(size, "group"), texts, None, scale)[SCORE]
        refused = []
        for seed in range(SPLITS):
            drawn = np.random.default_rng(seed).permutation(len(present))
            half = len(drawn) // 2
            said = p_values(present[drawn[half:]], present[drawn[:half]])
            refused.append(float((said <= RATE).mean()))
        found[str(size)] = {
            "mean": float(np.mean(refused)), "standard_deviation": float(np.std(refused))
        }  # fmt: skip
    return {"splits": SPLITS, "texts": len(texts), "refused_of_present": found}


# ---- promised candidates -------------------------------------------------------------------


def promises(drawings: Drawings) -> dict[str, Any]:
    """Candidates by some captions, losses of others, over splits."""
    texts = drawings.texts(drawings.names)
    coarse, fine = max(drawings.snapshot.patch_sizes), min(drawings.snapshot.patch_sizes)
    vectors = {
        size: unit(drawings.snapshot.vectors(drawings.ids.tolist(), size))
        for size in (coarse, fine)
    }
    rough = texts @ vectors[coarse].T
    both = blend(texts @ vectors[fine].T, rough)
    answers = np.argsort(-both, axis=1, kind="stable")[:, :K]
    order = np.argsort(-rough, axis=1, kind="stable")
    ranks = np.stack([places(a, o) for a, o in zip(answers, order, strict=True)])
    counts, lost, errors = [], [], []
    for seed in range(SPLITS):
        drawn = np.random.default_rng(seed).permutation(len(ranks))
        validation, test = ranks[drawn[:VALIDATION]], ranks[drawn[VALIDATION:]]
        count = fewest_candidates(validation, LOST)
        assert count is not None
        of_each = losses(test, np.array([count]))[:, 0]
        counts.append(count)
        lost.append(float(of_each.mean()))
        errors.append(float(of_each.std() / np.sqrt(len(of_each))))
    within = np.array(lost) <= LOST + 2 * np.array(errors)
    return {
        "coarse": coarse, "fine": fine, "k": K, "validation": VALIDATION, "splits": SPLITS,
        "test": len(ranks) - VALIDATION, "images": len(drawings.ids),
        "candidates": [float(v) for v in np.percentile(counts, (0, 50, 100))],
        "lost": float(np.mean(lost)), "standard_error_of_a_test": float(np.mean(errors)),
        "splits_within_two_standard_errors": float(within.mean()),
        "lost_with_200": float(losses(ranks, np.array([200])).mean()),
    }  # fmt: skip


# ---- probabilities -------------------------------------------------------------------------


def errors(model: LitModel, data: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """By held-out set and patch size."""
    found: dict[str, Any] = {}
    for name in ("heldout_captions", "heldout_style"):
        result = evaluate(model, load_dataset("shards", data / name), sizes, examples=FITTED_ON)
        found[name] = {str(size): vars(error) for size, error in result.calibration.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "runs" / "demo" / "model"))
    parser.add_argument("--index", default=str(ROOT / "runs" / "index"))
    parser.add_argument("--data", default=str(ROOT / "runs" / "data" / "emoji"))
    parser.add_argument("--folder", default=str(ROOT / "runs" / "absent"))
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="*",
        help="of the calibration errors; none: these are not measured",
    )
    args = parser.parse_args()
    if not Path(args.index).is_dir():
        run_demo()
    model = LitModel.from_pretrained(args.model)
    drawings = Drawings(Path(args.index), Path(args.data), model)
    sizes = model.patch_sizes if args.sizes is None else args.sizes
    held = drawings.sizes
    figures: dict[str, Any] = {
        "model": str(Path(args.model).name), "images": len(drawings.ids), "rate": RATE,
        "absence": absences(drawings),
        "photographs": by_photographs(model, held, Path(args.folder), args.model),
        "calibrated": refusals(drawings),
        "promise": promises(drawings),
    }  # fmt: skip
    for title, found in figures["absence"].items():
        print(title, json.dumps(found, indent=1))
    figures["calibration_errors"] = errors(model, Path(args.data), sizes) if sizes else {}
    own = figures["absence"]["trained names"][str(min(held))]
    promise = figures["promise"]
    targets = [
        Target(
            "trained names refused without their group", ">= 0.65", own["group"][SCORE]["refused"]
        ),
        Target(
            SUBGROUP_TARGET, ">= 0.85",
            own["subgroup"][SCORE]["refused"],
        ),
        Target(
            "answers lost with promised candidates, over splits", f"<= {LOST}", promise["lost"]
        ),
        *(
            Target(f"ECE of {name} at patch {size}", "<= 0.04", error["ece_at_temperature"])
            for name, by_size in figures["calibration_errors"].items()
            for size, error in by_size.items()
        ),
    ]  # fmt: skip
    finish("absent", figures, targets, accepted=ACCEPTED)


if __name__ == "__main__":
    main()
