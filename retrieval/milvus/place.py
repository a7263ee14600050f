"""An index in Milvus as `IndexPlace`."""

import hashlib
import shutil
import time
from pathlib import Path

from data.errors import UsageError
from data.files import cache_folder
from retrieval.index.config import Device
from retrieval.index.manifest import IndexManifest
from retrieval.milvus.address import MilvusAddress
from retrieval.milvus.catalogue import Catalogue
from retrieval.milvus.client import MilvusConnection
from retrieval.milvus.state import MilvusState

LOOK_S = 5.0  # between looks for a change


class MilvusPlace:
    """An index in Milvus. Asked for nothing before it is used."""

    is_remote = True

    def __init__(self, address: MilvusAddress) -> None:
        """Raises `UsageError` where pymilvus is not installed."""
        self.address, self.connection = address, MilvusConnection(address)

    def __str__(self) -> str:
        return str(self.address)

    def manifest(self) -> IndexManifest:
        return Catalogue.open(self.connection, self.address).load()

    def model(self, manifest: IndexManifest) -> str:
        """What the embeddings named. Raises `UsageError` where it is not on this machine."""
        named = Catalogue.open(self.connection, self.address).model
        if Path(named).is_absolute() and not Path(named).is_dir():
            raise UsageError(
                f"model: {self.address} was built with {named}, which is not on this machine; "
                "give a model"
            )
        return named

    def open(self, device: Device) -> MilvusState:
        catalogue = Catalogue.open(self.connection, self.address)
        manifest = catalogue.load()
        return MilvusState(catalogue, manifest, self._kept(str(manifest.unknown.get("build", 0))))

    def _kept(self, build: str) -> Path:
        """A folder of this build of the index. Those of earlier ones are removed: the same ids were
        other images."""
        digest = hashlib.blake2b(str(self.address).encode(), digest_size=8).hexdigest()
        kept = cache_folder("milvus") / digest / build
        for other in {*kept.parent.glob("*")} - {kept}:
            shutil.rmtree(other, ignore_errors=True)
        kept.mkdir(parents=True, exist_ok=True)
        return kept

    def check(self, manifest: IndexManifest, intact: set[str] | None = None) -> None:
        """Whether its collections are there; Milvus checks its files itself."""
        Catalogue.open(self.connection, self.address).check_collections(manifest)

    def stamp(self) -> tuple[int, ...]:
        return (int(time.monotonic() / LOOK_S),)
