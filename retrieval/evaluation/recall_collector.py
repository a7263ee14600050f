"""Collect what recall@k needs from batches and ranks, however many images there are.

Embeddings and captions wait on disk; about ten numbers per caption stay in memory.
"""

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from contrastive.distributed import barrier, gather_objects, is_main, world_size
from data.batch import EvalBatch
from data.captions import concept_id
from retrieval.detail import Detail
from retrieval.evaluation.metrics import Recall, recall_at_k

Encode = Callable[[list[str]], Float[np.ndarray, "b d"]]
TEXTS_PER_FORWARD = 256
ROWS_PER_MESSAGE = 4096


class RecallCollector:
    """Takes batches as they come, then measures recall over the images of all ranks.

    folder: empty, of this rank alone; takes 4 bytes per number of each embedding, on the main rank
    of several twice as much. shared_captions: images that carry an equal caption are all right for
    it; else each caption is of its image alone, as Flickr30k and COCO are scored.
    """

    def __init__(
        self, folder: Path, patch_sizes: Sequence[Detail], width: int, shared_captions: bool
    ) -> None:
        self._embeds = {size: RowFile(folder / f"image_{size}", width) for size in patch_sizes}
        self._texts = RowFile(folder / "text", width)
        self._captions = folder / "captions"
        self._positions = array("q")  # of each image in the data set
        self._owners = array("q")  # per caption: the row of its image
        self._rows = array("q")  # per caption: the row of its embedding
        self._row_of: dict[int, int] | None = {} if shared_captions else None
        self._num_texts = 0

    def add(self, batch: EvalBatch, embeds: Mapping[Detail, Float[np.ndarray, "b d"]]) -> None:
        """embeds: patch size -> unit-norm embeddings of the batch's images.

        Images without a caption are left out.
        """
        captioned = [row for row, captions in enumerate(batch.captions) if captions]
        first = len(self._positions)
        self._positions.extend((batch.shard << 40) + int(batch.indices[row]) for row in captioned)
        for size, rows in embeds.items():
            self._embeds[size].append(rows[captioned])
        with self._captions.open("a", encoding="utf-8") as file:
            for owner, row_in_batch in enumerate(captioned, first):
                for caption in batch.captions[row_in_batch]:
                    self._owners.append(owner)
                    row = self._num_texts
                    if self._row_of is not None:
                        row = self._row_of.setdefault(concept_id((caption,)), row)
                    if row == self._num_texts:
                        file.write(json.dumps(caption) + "\n")
                        self._num_texts += 1
                    self._rows.append(row)

    def __len__(self) -> int:
        """This rank's images with captions."""
        return len(self._positions)

    def recall(self, encode: Encode) -> dict[Detail, Recall]:
        """Patch size -> recall, on every rank. Ranks call it together, and `encode` equally often.

        {} where no image has a caption.
        """
        self._encode(encode)
        order = _Order.of_ranks(
            np.array(self._positions, np.int64),
            np.array(self._owners, np.int64),
            np.array(self._rows, np.int64),
            None if self._row_of is None else np.array(list(self._row_of), np.int64),
        )
        if not len(order.pairs):
            return {}
        texts = self._gather(self._texts, order.texts)
        found = {}
        for size, file in self._embeds.items():
            images = self._gather(file, order.images)
            if is_main():
                found[size] = recall_at_k(images, texts, order.pairs)
        barrier(patient=True)  # the main rank ranks for all
        return gather_objects(found)[0]

    def _encode(self, encode: Encode) -> None:
        """All ranks run the same number of forwards, as ZeRO-3 needs."""
        rounds = max(gather_objects(-(-self._num_texts // TEXTS_PER_FORWARD)))
        self._captions.touch()
        with self._captions.open(encoding="utf-8") as lines:
            for _ in range(rounds):
                texts = [json.loads(line) for line in islice(lines, TEXTS_PER_FORWARD)]
                self._texts.append(encode(texts))

    def _gather(
        self, file: "RowFile", places: Sequence[Int[np.ndarray, " n"]]
    ) -> Float[np.ndarray, "m d"]:
        """The rows of all ranks, mapped, in the data set's order; on the main rank alone.

        places: per rank, where each of its rows goes; -1: nowhere.
        """
        own = file.mapped()
        if world_size() == 1:
            return own
        merged = own
        if is_main():
            shape = (sum(int((p >= 0).sum()) for p in places), own.shape[1])
            merged = np.memmap(file.path.with_suffix(".all"), np.float32, "w+", shape=shape)
        for start in range(0, max(map(len, places)), ROWS_PER_MESSAGE):
            blocks = gather_objects(own[start : start + ROWS_PER_MESSAGE])
            for block, place in zip(blocks, places, strict=True) if is_main() else ():
                goes = place[start : start + ROWS_PER_MESSAGE]
                merged[goes[goes >= 0]] = block[goes >= 0]
        return merged


@dataclass(frozen=True)
class _Order:
    """The order in which a single process would see everything, merged from all ranks."""

    images: Sequence[Int[np.ndarray, " n"]]  # per rank: where its images go
    texts: Sequence[Int[np.ndarray, " m"]]  # per rank: where its texts go; -1: an equal one counts
    pairs: Int[np.ndarray, "p 2"]  # (image, text)

    @classmethod
    def of_ranks(
        cls,
        positions: Int[np.ndarray, " n"],
        owners: Int[np.ndarray, " c"],
        rows: Int[np.ndarray, " c"],
        idents: Int[np.ndarray, " m"] | None,
    ) -> "_Order":
        """positions: of this rank's images; owners, rows: per caption, its image and its text.

        idents: per text, a number that equal texts of other ranks have too; None: no two are one.
        """
        ranks = gather_objects((positions, owners, rows, idents))
        images = _split(_places(np.concatenate([r[0] for r in ranks])), [len(r[0]) for r in ranks])
        owner = np.concatenate([place[r[1]] for place, r in zip(images, ranks, strict=True)])
        order = np.argsort(owner, kind="stable")  # captions, image by image
        if idents is None:
            texts = _split(_places(owner), [len(r[1]) for r in ranks])
            return cls(images, texts, np.stack([owner[order], np.arange(len(owner))], axis=1))
        ident = np.concatenate([r[3][r[2]] for r in ranks])[order]
        _, first, inverse = np.unique(ident, return_index=True, return_inverse=True)
        number = _places(first)  # texts count in the order in which they appear
        sizes = [len(r[3]) for r in ranks]
        bases = np.cumsum([0, *sizes])
        row = np.concatenate([r[2] + base for r, base in zip(ranks, bases, strict=False)])
        place = np.full(bases[-1], -1)
        place[row[order[first]]] = number
        pairs = np.unique(np.stack([owner[order], number[inverse]], axis=1), axis=0)
        return cls(images, _split(place, sizes), pairs)


def _places(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Where each value comes when they are sorted; of equal ones the first comes first."""
    places = np.empty(len(values), np.int64)
    places[np.argsort(values, kind="stable")] = np.arange(len(values))
    return places


def _split(values: Int[np.ndarray, " n"], sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1])


class RowFile:
    """Rows of float32, written one after the other, then mapped."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self._width = path, width
        self.path.touch()

    def append(self, rows: Float[np.ndarray, "b d"]) -> None:
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(rows, np.float32).tobytes())

    def mapped(self) -> Float[np.ndarray, "n d"]:
        if not self.path.stat().st_size:  # an empty file cannot be mapped
            return np.zeros((0, self._width), np.float32)
        return np.memmap(self.path, np.float32, "r").reshape(-1, self._width)
