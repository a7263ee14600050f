"""WebDataset shards in CLIP_benchmark's layout."""

from pathlib import Path

from data.class_names import CLASS_NAMES_FILE, TEMPLATES_FILE, read_class_names, read_templates
from data.errors import UsageError
from data.shards.names import expand_shards
from retrieval.evaluation.datasets.eval_dataset import EvalDataset


def open_shards(kind: str, root: Path, name: str) -> EvalDataset:
    """*.tar in ROOT or ROOT/test: KEY.cls with classnames.txt and
    zeroshot_classification_templates.txt beside, or, where dataset_type.txt says `retrieval`,
    KEY.txt with a caption on each line.
    """
    shards = _find_tars(root)
    type_file = root / "dataset_type.txt"
    what = (
        type_file.read_text("utf-8", "replace").strip() if type_file.is_file() else "classification"
    )
    if what == "retrieval":
        return EvalDataset(name, shards=shards, captioned=True)
    if what != "classification":
        raise UsageError(f"{type_file} says {what!r}; allowed: classification, retrieval")
    for file in (CLASS_NAMES_FILE, TEMPLATES_FILE):
        if not (root / file).is_file():
            raise UsageError(
                f"{root} has no {file}; expected {CLASS_NAMES_FILE}, {TEMPLATES_FILE} and *.tar"
            )
    return EvalDataset(
        name,
        read_class_names(root / CLASS_NAMES_FILE),
        read_templates(root / TEMPLATES_FILE),
        shards=shards,
    )


def _find_tars(root: Path) -> list[str]:
    for folder in (root, root / "test"):
        tars = sorted(folder.glob("*.tar"), key=lambda tar: (len(tar.stem), tar.stem))
        count = folder / "nshards.txt"
        says = count.read_text("utf-8", "replace").strip() if count.is_file() else str(len(tars))
        if says != str(len(tars)):
            raise UsageError(f"{folder} has {len(tars)} tars; {count} says {says!r}")
        if tars:
            return expand_shards([str(tar) for tar in tars])
    raise UsageError(f"{root} has no *.tar; expected them there or in {root / 'test'}")
