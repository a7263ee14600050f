"""What a server is told at its start: folders, address, limits. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from data.errors import UsageError
from retrieval.index.config import Device
from retrieval.search.config import MAX_K, REFUSE, check_share


@dataclass(frozen=True)
class Limits:
    """Upper bounds on one request, and on how many may wait."""

    max_body_mib: float = 16.0
    """Size of a request's body."""
    max_pixels: int = 50_000_000
    """Pixels of a query image, read from its header."""
    max_k: int = MAX_K
    """Hits of one search, those of earlier pages included."""
    max_text: int = 1000
    """Characters of a text."""
    max_labels: int = 200
    """Labels of one classification."""
    max_candidates: int = 500
    """Images re-encoded for one search."""
    max_queue: int = 256
    """Requests that may wait for a forward or a search; further ones are answered with 429."""
    timeout_s: float = 30.0
    """Seconds from a request's first byte to its answer."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UsageError(f"limits.{name} {value:g}: must be above 0")
        if self.max_k > MAX_K:
            raise UsageError(f"limits.max_k {self.max_k}: at most {MAX_K}")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mib * 2**20)


@dataclass(frozen=True)
class ServeConfig:
    """One server."""

    index: tuple[str, ...]
    """Folders of indexes, or milvus:URI/NAME, each named after its last part; the first is the
    default."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 1234
    """0: any free port."""
    model: str | None = None
    """A model with the indexes' image tower, instead of those kept in them."""
    classes: tuple[str, ...] = ()
    """Class sets for /v1/classify: files of one name per line, or saved `ZeroShotClassifier`s.
    Each is named after its file."""
    token_file: str = ""
    """File with the bearer token that requests must bring."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may read answers, such as http://localhost:8080."""
    refuse: float = REFUSE
    """Say "nothing like this here" to so large a share of texts that have an answer, and so to many
    that have none, where an index is calibrated (index.py --calibrate). 0: never."""
    image_urls: bool = False
    """Fetch the image_url of requests, from public addresses only."""
    device: Device = "auto"
    """Where to search and encode."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_share("refuse", self.refuse)

    def index_names(self) -> list[str]:
        """The name of each index: its folder's. Raises `UsageError` for none, or for equal ones."""
        names = [Path(folder).resolve().name for folder in self.index]
        if not names:
            raise UsageError("index: at least one folder of an index is needed")
        if len(set(names)) < len(names):
            raise UsageError(f"index: two folders of one name ({', '.join(names)}); rename one")
        return names
