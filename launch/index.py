"""Build a searchable index from embeddings.

python launch/index.py --embeddings embeddings --out index [--kind auto] [--device auto]
"""

from dataclasses import dataclass

import tyro

from data.errors import exit_on_usage_error
from retrieval.index import Device, IndexKind, build_index


@dataclass(frozen=True)
class Args:
    embeddings: str
    """Folder written by launch/embed.py."""
    out: str
    """Folder of the index; must not exist."""
    model: str = ""
    """Folder of the model; the one that the embeddings name when not given."""
    kind: IndexKind = "auto"
    """flat is exact, ivf approximate; auto picks by size and says why."""
    device: Device = "auto"
    """Where FAISS trains the index."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    with exit_on_usage_error():
        reason = build_index(args.embeddings, args.out, args.model, args.kind, args.device)
        print(f"{args.out}: {reason}")


if __name__ == "__main__":
    main()
