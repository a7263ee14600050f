"""The default drawings as a classification task: which of Unicode's subgroups is drawn?"""

import json
import tarfile
from pathlib import Path

from data.emoji.build import CAPTIONS_PACKAGE, build_emoji
from data.emoji.concepts import load_concepts
from data.emoji.drawings import load_drawings, render
from data.emoji.npm import fetch_package
from data.shards.tar import add_member
from lib.tars import read_tar

SCRATCH = Path("runs/benchmarks")


def subgroup_shards(size: int) -> tuple[Path, int]:
    """(folder with train/*.tar and heldout_style/*.tar, number of classes), built when missing.

    Images of `size` pixels a side, KEY.png and KEY.cls. train: every concept by three artists;
    heldout_style: the same concepts by a fourth.
    """
    out = SCRATCH / f"subgroups-{size}"
    facts = out / "classes.json"
    if not facts.exists():
        drawings = build_emoji(SCRATCH / f"emoji-{size}", size)
        found: dict[str, list[tuple[str, bytes, str]]] = {}
        for tar in sorted(drawings.glob("*/*.tar")):
            part = "heldout_style" if tar.parent.name == "heldout_style" else "train"
            found.setdefault(f"{part}/{tar.stem}", []).extend(read_drawings(tar))
        drawn = {key for samples in found.values() for key, _, _ in samples}
        found["heldout_style/emojione-rest"] = _rest_of_emojione(drawn, size)
        classes = sorted({name for samples in found.values() for _, _, name in samples})
        for shard, samples in found.items():
            (out / shard).parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(out / f"{shard}.tar", "w") as tar_file:
                for key, png, name in samples:
                    add_member(tar_file, f"{key}.png", png)
                    add_member(tar_file, f"{key}.cls", str(classes.index(name)).encode())
        facts.write_text(json.dumps(classes) + "\n")
    return out, len(json.loads(facts.read_text()))


def _rest_of_emojione(drawn: set[str], size: int) -> list[tuple[str, bytes, str]]:
    """The concepts whose captions are held out; the default data leave out their drawings."""
    concepts = load_concepts(fetch_package(*CAPTIONS_PACKAGE))
    kept = [c for c in concepts if f"noto-{c.code}" in drawn]
    drawings = load_drawings("emojione", kept)
    return [
        (f"emojione-{c.code}", render(drawings[c.code], size), c.subgroup)
        for c in kept
        if c.code in drawings and f"emojione-{c.code}" not in drawn
    ]


def read_drawings(file: Path) -> list[tuple[str, bytes, str]]:
    """(key, PNG, subgroup) of each sample."""
    members = read_tar(file)
    keys = [name.removesuffix(".png") for name in members if name.endswith(".png")]
    return [
        (key, members[f"{key}.png"], json.loads(members[f"{key}.json"])["subgroup"]) for key in keys
    ]
