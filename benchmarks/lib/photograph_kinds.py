"""The photographs again, with few and plain classes: birds, mammals, fruit and so on."""

import tarfile
from collections import Counter
from pathlib import Path

from data.class_names import write_class_names
from data.files import replaced_folder
from data.photographs.build import TEMPLATES, read_stamps
from data.shards.tar import add_member
from lib.validation_split import samples_of

FEWEST = 10


def build_kinds(photographs: Path, out: Path) -> Path:
    """A shard of those of a kind with at least ten, a kind being the innermost folder that Tux
    Paint keeps a stamp in."""
    if out.is_dir():
        return out
    kinds = {
        path.removesuffix(".png").replace("/", "-"): Path(path).parent.name
        for path in read_stamps()
    }
    counts = Counter(kinds.values())
    names = sorted(name for name, count in counts.items() if count >= FEWEST)
    with replaced_folder(out) as part:
        with tarfile.open(part / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, sample in samples_of(photographs / "0.tar").items():
                if kinds[key] in names:
                    sample = sample | {"cls": str(names.index(kinds[key])).encode()}
                    for suffix, content in sample.items():
                        add_member(tar, f"{key}.{suffix}", content)
        write_class_names(part, names, TEMPLATES)
    return out
