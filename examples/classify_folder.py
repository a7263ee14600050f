"""Name the images of a folder, among labels of your own, without any training.

    python examples/classify_folder.py runs/demo/model photos cat dog bicycle

Coarse first: only images whose two best labels lie close together are looked at again at the finest
patch size.
"""

import sys
from pathlib import Path

from contrastive import LitModel
from retrieval import ZeroShotClassifier

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main(model_folder: str, folder: str, *labels: str) -> None:
    model = LitModel.from_pretrained(model_folder)
    classifier = ZeroShotClassifier(model, labels, ["a picture of a {c}", "{c}"])
    coarse, fine = max(model.patch_sizes), min(model.patch_sizes)
    files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES)
    named = classifier.predict_names(files, coarse, refine_patch_size=fine)
    for file, (best, *_) in zip(files, named, strict=True):
        print(f"{file}  {best.name}  {best.similarity:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
