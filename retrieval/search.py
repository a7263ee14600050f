"""Search an index by words or by pictures, at any patch size that it holds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from contrastive.lit import LitModel
from data.errors import UsageError
from data.images import decode_image
from data.shards import open_shard
from retrieval.index import Device, to_device, use_cuda

MAX_K = 2048  # what FAISS searches on a GPU


@dataclass(frozen=True)
class Hit:
    """One image found: its place in a shard, and its cosine similarity to the query."""

    id: int
    similarity: float
    key: str
    caption: str
    shard: str
    offset: int
    size: int

    def image_bytes(self) -> bytes:
        """The image's file as it lies in its shard. Raises OSError where the shard is gone,
        `UsageError` where it came from a program (webdataset's pipe:)."""
        with open_shard(self.shard) as file:
            file.seek(self.offset)
            return file.read(self.size)

    def image(self, max_pixels: int = 100_000_000) -> Image.Image:
        """The picture, RGB."""
        return decode_image(self.image_bytes(), max_pixels)


class Metadata:
    """Rows by id from the memory-mapped Arrow files of an index. Reading costs no RAM ahead."""

    def __init__(self, folder: Path) -> None:
        self._batches: list[pa.RecordBatch] = []
        for file in sorted(folder.glob("metadata_*.arrow")):
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            self._batches += [batch for batch in batches if len(batch)]
        self._batches.sort(key=lambda batch: batch["id"][0].as_py())
        self._first = np.array([batch["id"][0].as_py() for batch in self._batches], np.int64)

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    def row(self, id: int) -> dict[str, Any]:
        """The columns of one id. Raises KeyError when it is not there."""
        number = int(np.searchsorted(self._first, id, side="right")) - 1
        if number >= 0:
            batch = self._batches[number]
            ids = batch["id"].to_numpy(zero_copy_only=True)
            at = int(np.searchsorted(ids, id))
            if at < len(ids) and ids[at] == id:
                return {name: batch[name][at].as_py() for name in batch.schema.names}
        raise KeyError(id)


class Searcher:
    """An index folder opened for search. Make one with `Searcher.load`."""

    def __init__(self, folder: Path, model: LitModel, device: Device = "auto") -> None:
        self.folder = folder
        self.model = model
        self.manifest = read_index_manifest(folder)
        if model.image_fingerprint != self.manifest["image_fingerprint"]:
            raise UsageError(
                f"{folder} was built with another image tower ({self.manifest['image_fingerprint']}"
                f") than the model's ({model.image_fingerprint}); embed and index again"
            )
        self.patch_sizes: tuple[int, ...] = tuple(self.manifest["patch_sizes"])
        self.cuda = use_cuda(device)
        self._indexes: dict[int, faiss.Index] = {}

    @classmethod
    def load(
        cls, folder: str | Path, model: LitModel | str | Path | None = None, device: Device = "auto"
    ) -> "Searcher":
        """Open an index folder.

        model: a model, its folder, or None for the one kept in the index; it must have the image
        tower of the index, its text tower may be another.
        device: `auto` searches and encodes on GPUs where there are some.
        Raises `UsageError` for a folder that is no index, or a model that does not fit it.
        """
        folder = Path(folder)
        read_index_manifest(folder)  # before a model is built
        if not isinstance(model, LitModel):
            encode_on = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
            model = LitModel.from_pretrained(model or folder / "model", device=encode_on)
        return cls(folder, model, device)

    @cached_property
    def metadata(self) -> Metadata:
        return Metadata(self.folder / "metadata")

    def index(self, patch_size: int) -> faiss.Index:
        """The FAISS index of one patch size: memory-mapped, or copied to the GPUs once."""
        if patch_size not in self.patch_sizes:
            raise UsageError(
                f"patch size {patch_size} is not in {self.folder}; "
                f"allowed: {', '.join(map(str, self.patch_sizes))}"
            )
        if patch_size not in self._indexes:
            file = self.folder / f"patch_{patch_size}" / "image.index"
            try:
                index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError as error:
                raise UsageError(f"{file} is missing or damaged; build the index again") from error
            self._indexes[patch_size] = to_device(index, self.cuda)
        return self._indexes[patch_size]

    def search(
        self,
        queries: Sequence[str] | Sequence[Image.Image] | Float[Tensor, "q 3 s s"],
        k: int = 10,
        patch_size: int | None = None,
    ) -> list[list[Hit]]:
        """Per query, the k most similar images, best first (fewer where the index holds fewer).

        queries: texts, pictures, or normalised pixels. patch_size: which index answers, and how
        query pictures are encoded; None takes the finest of the index. k: 1 to 2,048.
        """
        if not 1 <= k <= MAX_K:
            raise UsageError(f"k {k} is out of range; allowed: 1 to {MAX_K}")
        if len(queries) == 0:
            return []
        patch_size = min(self.patch_sizes) if patch_size is None else patch_size
        index = self.index(patch_size)
        if not isinstance(queries, Tensor) and isinstance(queries[0], str):
            embeds = self.model.encode_text(queries)  # type: ignore[arg-type]
        else:
            embeds = self.model.encode_image(queries, patch_size=patch_size)  # type: ignore[arg-type]
        similarities, ids = self.nearest(embeds.float().cpu().numpy(), k, index)
        return [
            [
                Hit(similarity=float(similarity), **self.metadata.row(int(id)))
                for similarity, id in zip(*row, strict=True)
                if id >= 0  # FAISS fills missing places with -1
            ]
            for row in zip(similarities, ids, strict=True)
        ]

    def nearest(
        self, embeds: Float[np.ndarray, "q d"], k: int, index: faiss.Index
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(similarities, ids) from one of this searcher's indexes."""
        params = None
        if self.manifest["kind"] == "ivf":  # per call: the index is shared and never changed
            nprobe = min(self.manifest["nprobe"], MAX_K)
            params = faiss.SearchParametersIVF(nprobe=nprobe)  # type: ignore[call-arg]
        return index.search(np.ascontiguousarray(embeds, np.float32), k, params=params)


def read_index_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder. Raises `UsageError` if it has none."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text()) if file.is_file() else {}
    if manifest.get("format") != 1 or "kind" not in manifest:
        raise UsageError(f"{folder} holds no index of format 1; launch/index.py makes one")
    return manifest
