"""The only module that talks to Milvus: every call has a time limit, and every failure is one
sentence."""

import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from data.errors import UsageError
from retrieval.index_interface import IndexUnavailable
from retrieval.milvus.address import MilvusAddress

SEARCH_S = 10.0  # one search or look-up, a server's answer included
WRITE_S = 120.0  # a batch of rows, or a collection made
LOAD_S = 600.0  # a collection read into memory
IDS_AT_ONCE = 1000  # of a look-up or a deletion, 20 KB of expression
ROWS_AT_ONCE = 8192  # of an iteration; Milvus gives 16,384 at most
MAX_TEXT_BYTES = 65_535  # of a VARCHAR
VECTOR = "vector"  # the field
NOT_CONNECTED = 2  # pymilvus's code
RECONNECT_MS = 2000  # between attempts, else up to two minutes


class MilvusConnection:
    """One Milvus, connected when first asked. Safe for threads."""

    def __init__(self, address: MilvusAddress) -> None:
        """Raises `UsageError` where pymilvus, or for a file Milvus Lite, is not installed."""
        try:
            import pymilvus
        except ImportError as error:
            raise UsageError(
                f"{address}: pymilvus is not installed; pip install 'flexilit[milvus]'"
            ) from error
        if address.uri.endswith(".db") and importlib.util.find_spec("milvus_lite") is None:
            raise UsageError(
                f"{address}: a file is opened by Milvus Lite; pip install --no-deps milvus-lite "
                "(without, pip would overwrite faiss-gpu)"
            )
        self._pymilvus, self._address = pymilvus, address
        self._client: Any = None
        self._lock = threading.Lock()
        for name in ("pymilvus", "milvus_lite"):  # which log a traceback for each refusal
            logging.getLogger(name).setLevel(logging.CRITICAL)

    @contextmanager
    def _asking(self, timeout_s: float) -> Iterator[Any]:
        """The client, its failures turned into `IndexUnavailable`."""
        import grpc

        try:
            with self._lock:
                if self._client is None:
                    self._client = self._pymilvus.MilvusClient(
                        uri=self._address.uri,
                        token=os.environ.get("MILVUS_TOKEN", ""),
                        timeout=SEARCH_S,
                        grpc_options={"grpc.max_reconnect_backoff_ms": RECONNECT_MS},
                    )
            yield self._client
        except (self._pymilvus.MilvusException, grpc.RpcError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            code = getattr(error, "code", None)
            code = code() if callable(code) else code
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                why = f"has not answered within {timeout_s:g} s"
            elif code in (grpc.StatusCode.UNAVAILABLE, NOT_CONNECTED):
                why = "does not answer; is it running?"
            else:
                said = getattr(error, "message", "") or str(error)
                why = f"refuses: {' '.join(str(said).split())[:200]}"
            raise IndexUnavailable(f"{self._address}: Milvus {why}") from error

    # ---- collections -----------------------------------------------------------------------

    def describe(self, collection: str) -> dict[str, Any] | None:
        """{"fields": {name: width, 0 of scalars}, "properties": {key: value}}, None where there is
        no such collection."""
        with self._asking(SEARCH_S) as client:
            if not client.has_collection(collection, timeout=SEARCH_S):
                return None
            found = client.describe_collection(collection, timeout=SEARCH_S)
        fields = {f["name"]: int(f.get("params", {}).get("dim", 0)) for f in found["fields"]}
        return {"fields": fields, "properties": dict(found.get("properties") or {})}

    def create(
        self,
        collection: str,
        scalars: Mapping[str, str],
        width: int,
        index: Mapping[str, Any],
        properties: Mapping[str, str],
    ) -> None:
        """A collection of int64 `id`, `vector` and scalars, which may be null.

        scalars: field -> VARCHAR, INT64, DOUBLE or BOOL. index: of the vectors, as Milvus spells
        it.
        """
        types = self._pymilvus.DataType
        with self._asking(WRITE_S) as client:
            schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("id", types.INT64, is_primary=True)
            schema.add_field(VECTOR, types.FLOAT_VECTOR, dim=width)
            for name, type_ in scalars.items():
                bound = {"max_length": MAX_TEXT_BYTES} if type_ == "VARCHAR" else {}
                schema.add_field(name, types[type_], nullable=True, **bound)
            params = client.prepare_index_params()
            params.add_index(VECTOR, metric_type="IP", **index)
            client.create_collection(
                collection, schema=schema, index_params=params, properties=dict(properties),
                consistency_level="Bounded", timeout=WRITE_S,
            )  # fmt: skip

    def drop(self, collection: str) -> None:
        with self._asking(WRITE_S) as client:
            client.drop_collection(collection, timeout=WRITE_S)

    def load(self, collection: str) -> None:
        """Into the memory of who searches it; at once where it is there already."""
        with self._asking(LOAD_S) as client:
            client.load_collection(collection, timeout=LOAD_S)

    def flush(self, collection: str) -> None:
        """What was written becomes segments with an index."""
        with self._asking(LOAD_S) as client:
            client.flush(collection, timeout=LOAD_S)

    # ---- rows ------------------------------------------------------------------------------

    def write(self, collection: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows, in place of those of the same ids."""
        with self._asking(WRITE_S) as client:
            client.upsert(collection, list(rows), timeout=WRITE_S)

    def delete(self, collection: str, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), IDS_AT_ONCE):
            with self._asking(WRITE_S) as client:
                part = list(ids[start : start + IDS_AT_ONCE])
                client.delete(collection, ids=part, timeout=WRITE_S)

    def get(
        self, collection: str, ids: Sequence[int], fields: Sequence[str], strong: bool = False
    ) -> list[dict[str, Any]]:
        """The rows of ids, in no order, without the unknown. strong: as of now, which waits for
        what others have just written."""
        found: list[dict[str, Any]] = []
        for start in range(0, len(ids), IDS_AT_ONCE):
            part = [int(id) for id in ids[start : start + IDS_AT_ONCE]]
            with self._asking(SEARCH_S) as client:
                found += client.query(
                    collection, filter=f"id in {part}", output_fields=["id", *fields],
                    timeout=SEARCH_S, **_level(strong),
                )  # fmt: skip
        return [dict(row) for row in found]

    def count(self, collection: str, where: str = "", strong: bool = False) -> int:
        with self._asking(SEARCH_S) as client:
            (row,) = client.query(
                collection, filter=where, output_fields=["count(*)"], timeout=SEARCH_S,
                **_level(strong),
            )  # fmt: skip
        return int(row["count(*)"])

    def iterate(
        self,
        collection: str,
        where: str,
        fields: Sequence[str],
        most: int | None = None,
        strong: bool = False,
    ) -> Iterator[list[dict[str, Any]]]:
        """Rows that an expression lets through, by ascending id, in batches."""
        size = ROWS_AT_ONCE if most is None else max(1, min(most, ROWS_AT_ONCE))
        with self._asking(SEARCH_S) as client:
            cursor = client.query_iterator(
                collection, batch_size=size, limit=-1 if most is None else most, filter=where,
                output_fields=["id", *fields], timeout=SEARCH_S, **_level(strong),
            )  # fmt: skip
        try:
            while True:
                with self._asking(SEARCH_S):
                    batch = cursor.next()
                if not batch:
                    return
                yield [dict(row) for row in batch]
        finally:
            cursor.close()

    def search(
        self,
        collection: str,
        queries: Float[np.ndarray, "q d"],
        k: int,
        where: str,
        fields: Sequence[str],
        params: Mapping[str, int],
    ) -> list[list[tuple[float, dict[str, Any]]]]:
        """Per query, (inner product, row), best first."""
        with self._asking(SEARCH_S) as client:
            found = client.search(
                collection, data=list(queries), anns_field=VECTOR, limit=k, filter=where,
                output_fields=["id", *fields],
                search_params={"metric_type": "IP", "params": dict(params)}, timeout=SEARCH_S,
            )  # fmt: skip
        return [
            [(float(hit["distance"]), {**hit["entity"], "id": hit["id"]}) for hit in hits]
            for hits in found
        ]


def _level(strong: bool) -> dict[str, str]:
    return {"consistency_level": "Strong"} if strong else {}


def as_ids(rows: Sequence[Mapping[str, Any]]) -> Int[np.ndarray, " n"]:
    """The ids of rows."""
    return np.array([row["id"] for row in rows], np.int64)
