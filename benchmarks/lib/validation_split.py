"""A part of the default drawings' concepts, kept for validation."""

import json
import tarfile
from hashlib import blake2b
from pathlib import Path

from data.class_names import CLASS_NAMES_FILE, TEMPLATES_FILE
from data.shards.tar import add_member
from lib.tars import read_tar


def split_train(data: Path, out: Path) -> dict[str, Path]:
    """The trained drawings in two folders of `out`: `fit`, and `validation`, a sixth of the groups
    of concepts, with class names and templates."""
    if not (out / "validation" / TEMPLATES_FILE).exists():
        names: set[str] = set()
        members: dict[str, list[tuple[str, dict[str, bytes]]]] = {"fit": [], "validation": []}
        for shard in sorted((data / "train").glob("*.tar")):
            for key, sample in samples_of(shard).items():
                about = json.loads(sample["json"])
                kept = blake2b(about["group"].encode(), digest_size=1).digest()[0] % 6 == 0
                members["validation" if kept else "fit"].append((key, sample))
                names |= {about["label"]} if kept else set()
        classes = sorted(names)
        for name, samples in members.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            with tarfile.open(out / name / f"{name}.tar", "w") as tar:
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


def samples_of(shard: Path) -> dict[str, dict[str, bytes]]:
    """A tar's samples, by key, members by suffix."""
    samples: dict[str, dict[str, bytes]] = {}
    for name, content in read_tar(shard).items():
        key, _, suffix = name.partition(".")
        samples.setdefault(key, {})[suffix] = content
    return samples
