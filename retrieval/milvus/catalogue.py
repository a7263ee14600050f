"""The collection NAME: what an index in Milvus is, what state it is in, and who is changing it.

Its properties never change: format, columns, fingerprints, the model. Its rows are texts: row 0 is
the manifest, replaced by every change; every other one a writer, with the time until which it
counts. `NAME_patch_SIZE`, a collection per patch size, holds the images, complete with their
metadata, and repeats the fingerprints.
"""

import json
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from data.errors import UsageError
from retrieval.detail import coarse_first
from retrieval.index.manifest import IndexManifest
from retrieval.index_interface import IndexUnavailable
from retrieval.milvus.address import MilvusAddress
from retrieval.milvus.client import SEARCH_S, VECTOR, WRITE_S, MilvusConnection
from retrieval.milvus.fields import Columns

FORMAT = "1"
TEXT = "text"
_NO_VECTOR = [0.0, 1.0]  # Milvus has no collection without
LEASE_S = 300.0  # a writer that has said nothing for so long is gone
RENEW_S = 30.0
_PREFIX = "flexilit."  # of properties


class Catalogue:
    """The collection NAME of an address. Make one with `open` or `create`."""

    def __init__(
        self, connection: MilvusConnection, address: MilvusAddress, columns: Columns, model: str
    ) -> None:
        self.connection, self.address, self.columns, self.model = (
            connection, address, columns, model,
        )  # fmt: skip

    @classmethod
    def open(cls, connection: MilvusConnection, address: MilvusAddress) -> "Catalogue":
        """Raises `UsageError` where there is no index."""
        found = connection.describe(address.name)
        if found is None:
            raise UsageError(f"{address} is not there; launch/index.py --out makes it")
        known = properties_of(found)
        if known.get("format") != FORMAT or not is_catalogue(found):
            raise UsageError(f"{address}: a collection of that name is no index of format {FORMAT}")
        try:
            columns = Columns.from_property(known["columns"])
        except (ValueError, OSError) as error:
            raise UsageError(f"{address}: its properties are damaged; build it again") from error
        connection.load(address.name)
        return cls(connection, address, columns, known.get("model", ""))

    @classmethod
    def create(
        cls,
        connection: MilvusConnection,
        address: MilvusAddress,
        columns: Columns,
        model: str,
        manifest: IndexManifest,
    ) -> "Catalogue":
        """Of an index to be built: nobody sees it before its manifest is written."""
        made = properties(manifest, model) | {f"{_PREFIX}columns": columns.to_property()}
        flat = {"index_type": "FLAT", "params": {}}
        connection.create(address.name, {TEXT: "VARCHAR"}, len(_NO_VECTOR), flat, made)
        connection.load(address.name)
        return cls(connection, address, columns, model)

    def read(self, strong: bool = False) -> IndexManifest:
        """The present state. Raises `UsageError` for a damaged one."""
        rows = self.connection.get(self.address.name, [0], [TEXT], strong)
        if not rows:
            raise UsageError(f"{self.address} is not complete: it is being built, or was to be")
        try:
            return IndexManifest.from_json(json.loads(rows[0][TEXT]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"{self.address}: its manifest is damaged; build it again") from error

    def is_complete(self) -> bool:
        """Whether its build has ended."""
        return bool(self.connection.get(self.address.name, [0], [TEXT], strong=True))

    def collections(self, manifest: IndexManifest) -> list[str]:
        """Of the images; the finest, written and deleted from last, comes last."""
        return [self.address.collection(size) for size in coarse_first(manifest.patch_sizes)]

    def load(self) -> IndexManifest:
        """The present state, its collections checked, and ready in Milvus Lite too, which forgets
        at its restart that it is to search them."""
        manifest = self.read()
        self.check_collections(manifest)
        for collection in self.collections(manifest):
            self.connection.load(collection)
        return manifest

    def check_collections(self, manifest: IndexManifest) -> None:
        """Raises `UsageError` where a collection of images is missing, or of another schema."""
        for size in manifest.patch_sizes:
            name = self.address.collection(size)
            found = self.connection.describe(name)
            if found is None:
                raise UsageError(f"{self.address}: collection {name} is missing; build it again")
            fields, of = found["fields"], properties_of(found)
            missing = [field for field in self.columns.scalars if field not in fields]
            if missing or fields.get(VECTOR) != manifest.width:
                what = f"field {missing[0]!r}" if missing else f"vectors of width {manifest.width}"
                raise UsageError(f"{self.address}: collection {name} has no {what}; build it again")
            if of.get("image_fingerprint") != manifest.image_fingerprint:
                raise UsageError(f"{self.address}: collection {name} is of another index")

    def _put(self, id: int, text: str) -> None:
        row = {"id": id, VECTOR: _NO_VECTOR, TEXT: text}
        self.connection.write(self.address.name, [row])

    # ---- one writer ------------------------------------------------------------------------

    @contextmanager
    def only_writer(self) -> Iterator["Lease"]:
        """One writer at a time. Raises `UsageError` while there is another.

        Each writes a row of its own and then looks for others', so of two at once at least one
        sees the other. Clocks of machines that write must agree to a minute.
        """
        lease = Lease(self)
        try:
            now = time.time()
            for row in [r for b in self.connection.iterate(
                self.address.name, "id > 0", [TEXT], strong=True
            ) for r in b]:  # fmt: skip
                if row["id"] == lease.id:
                    continue
                if float(row[TEXT]) > now:
                    raise UsageError(
                        f"another program is changing {self.address}; try again later, after a "
                        f"crash in {LEASE_S / 60:.0f} minutes"
                    )
                self.connection.delete(self.address.name, [row["id"]])
            yield lease
        finally:
            lease.end()


class Lease:
    """That a program may change an index; a thread renews it until its end."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.id = random.SystemRandom().randrange(1, 1 << 62)
        self._catalogue = catalogue
        self._renew()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Before each write. Raises `UsageError` where another program may have begun."""
        if self._is_over():
            raise self._lost()

    def commit(self, manifest: IndexManifest) -> None:
        """Make this the index's state. Raises `UsageError` where another program may have begun."""
        catalogue = self._catalogue
        held = catalogue.connection.get(catalogue.address.name, [self.id], [], strong=True)
        if self._is_over() or not held:
            raise self._lost()
        catalogue._put(0, json.dumps(manifest.to_json()))

    def end(self) -> None:
        self._ended.set()
        self._thread.join(SEARCH_S)
        with suppress(IndexUnavailable):  # it ends by itself
            self._catalogue.connection.delete(self._catalogue.address.name, [self.id])

    def _renew(self) -> None:
        until = time.time() + LEASE_S
        self._catalogue._put(self.id, repr(until))
        self._until = until

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S) and not self._is_over():
            with suppress(IndexUnavailable):  # perhaps the next time
                self._renew()

    def _is_over(self) -> bool:
        """Whether what is written from now on may arrive when another program has begun."""
        return time.time() > self._until - WRITE_S

    def _lost(self) -> UsageError:
        return UsageError(
            f"{self._catalogue.address}: Milvus was out of reach for so long that another program "
            "may have begun to change it; try again"
        )


def is_catalogue(found: Mapping[str, Any]) -> bool:
    """Whether a collection, as described, says what an index is, rather than holding its images."""
    return "columns" in properties_of(found)


def properties(manifest: IndexManifest, model: str) -> dict[str, str]:
    """What each collection says of itself."""
    known = {
        "format": FORMAT,
        "image_fingerprint": manifest.image_fingerprint,
        "text_fingerprint": manifest.text_fingerprint,
        "model": model,
    }
    return {_PREFIX + name: value for name, value in known.items()}


def properties_of(found: Mapping[str, Any]) -> dict[str, str]:
    """The same, of a collection."""
    return {
        name.removeprefix(_PREFIX): str(value)
        for name, value in found["properties"].items()
        if name.startswith(_PREFIX)
    }
