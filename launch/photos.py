"""Search a folder of photos: one command makes or updates its index, and opens a page.

    python launch/photos.py ~/Pictures --model open_clip:ViT-B-32@laion2b_s34b_b79k
    python launch/photos.py ~/Pictures          # from then on

The page opens at once and finds what is indexed so far. Ended and started again, it goes on where
it stopped; with --watch it keeps up with the folder. Your photos are only read.
"""

from dataclasses import dataclass

import tyro

from data.config import Fit
from data.errors import exit_on_usage_error
from retrieval.photo_service import prepare, serve_photos


@dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[str]
    """Folder of photos."""
    model: str = ""
    """open_clip:ARCHITECTURE@TAG or @FILE, transformers:FOLDER, or a model's folder."""
    index: str = ""
    """Folder of the index. Not given: one under ~/.cache/flexilit/photos."""
    patch_sizes: tuple[int, ...] = ()
    """In pixels; the coarsest comes first. Not given: the model's coarsest, and a finer one."""
    fit: Fit | None = None
    """How a new index reads photos: crop a square from the middle, squash the whole into one, or
    aspect, which keeps their shape and cuts nothing away. Not given: the model's own, mostly crop.
    """
    watch: bool = False
    """Look for new, changed and removed photos every ten seconds."""
    port: int | None = None
    """Not given: 1234, or any where that is taken."""
    no_browser: bool = False
    """Open no browser."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    with exit_on_usage_error(Args):
        found = prepare(args.folder, args.index, args.model, args.patch_sizes, args.watch, args.fit)
        serve_photos(found, args.port, not args.no_browser)


if __name__ == "__main__":
    main()
