"""Search an index by texts, images or vectors, at any patch size that it holds."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from contrastive.model.lit import LitModel
from contrastive.model.with_fit import with_fit
from data.errors import UsageError
from data.given import Images
from retrieval.detail import (
    Detail,
    MaxTokens,
    coarse_first,
    finest,
    num_tokens,
    said,
)
from retrieval.index.config import Device
from retrieval.index.filters import Where
from retrieval.index.gpu_check import num_gpus
from retrieval.index_interface import IndexPlace, IndexState
from retrieval.index_places import find_place
from retrieval.regions.opened import Regions, opened_regions, regions_manifest
from retrieval.search.agreement import Agreement, read_agreement
from retrieval.search.calibrated import Calibrated
from retrieval.search.calibration import Calibration
from retrieval.search.config import CANDIDATES, MAX_K, PatchSizeOrBudget, check_k, check_words
from retrieval.search.cost_profile import CostProfile
from retrieval.search.fusion import Fusion
from retrieval.search.hit import Hit
from retrieval.search.index_state import OpenedIndex
from retrieval.search.query_images import Mix, read_queries
from retrieval.search.query_vectors import query_vectors
from retrieval.search.refine import FineVectors
from retrieval.words.asked import WordQuery

Queries: TypeAlias = Images | Mix | Sequence[Any]  # a text is one too, where it is no path


class Searcher:
    """An index opened for search. Make one with `Searcher.load`. Safe for threads."""

    def __init__(self, place: IndexPlace, model: LitModel, device: Device = "auto") -> None:
        self.place, self.model = place, model
        self._device: Device = device
        self._image_fingerprint = model.image_fingerprint
        self._reload_lock = threading.Lock()
        self._opened = self._open()
        self.model_folder = self.folder / "model"
        self.profile = CostProfile(self.model)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: LitModel | str | Path | None = None,
        device: Device = "auto",
        check: bool = False,
    ) -> "Searcher":
        """Open an index: a folder, or `milvus:URI/NAME`.

        model: a model, its folder, or None for the one kept in the index; it must have the image
        tower of the index, its text tower may be another.
        device: see `retrieval.index.config`; `auto` searches and encodes on GPUs where
        there are some.
        check: read all files first, about 1 GB/s, and refuse a damaged one. Without, damage to
        vectors and metadata shows only where it makes a file unreadable; it may change answers.
        Raises `UsageError` for a folder that is no index, is damaged or misses files, or a model
        that does not fit it.
        """
        place = find_place(folder)
        manifest = place.manifest()  # before a model is built
        if check:
            place.check(manifest)
        if isinstance(model, LitModel):
            return cls(place, model, device)
        encode_on = "cuda" if num_gpus(device) else "cpu"
        kept = model or place.model(manifest)
        searcher = cls(place, LitModel.from_pretrained(kept, device=encode_on), device)
        searcher.model_folder = Path(kept)
        return searcher

    def _open(self, before: OpenedIndex | None = None) -> OpenedIndex:
        snapshot = self.place.open(self._device)
        found = snapshot.manifest.image_fingerprint
        if before is None and (fitted := with_fit(self.model, snapshot.manifest.fit)) != self.model:
            self.model, self._image_fingerprint = fitted, fitted.image_fingerprint
        if self._image_fingerprint != found and self.model.keep_transform(found, snapshot.kept):
            self._image_fingerprint = found
        if self._image_fingerprint != found:
            raise UsageError(
                f"{self.place} was built with another image tower ({found}) than the model's "
                f"({self._image_fingerprint}); embed and index again"
            )
        regions = Regions.open(snapshot, self._device)
        if before is not None and before.snapshot.kept == snapshot.kept:
            return before._replace(snapshot=snapshot, regions=regions)
        fine = FineVectors(self.model, snapshot.kept / "fine.sqlite")
        return OpenedIndex(snapshot, fine, Calibrated(snapshot.kept, self.model), regions)

    def reload(self) -> bool:
        """Pick up what was added to or deleted from the folder; returns whether there was anything.

        Searches that are under way end on the state they began with. Raises `UsageError`, and
        stays as it is, when the folder is no longer an index for this model.
        """
        with self._reload_lock:
            found = self.place.manifest(), regions_manifest(self.folder)
            regions = self._opened.regions
            if found == (self.snapshot.manifest, regions and regions.manifest):
                return False
            self._opened = self._open(self._opened)
            return True

    @property
    def snapshot(self) -> IndexState:
        """The present state of the index."""
        return self._opened.snapshot

    @property
    def regions(self) -> Regions | None:
        """Parts of its pictures; None where nobody has indexed them (`index_regions`)."""
        return self._opened.regions

    @property
    def fine(self) -> FineVectors:
        """What refining has computed."""
        return self._opened.fine

    @property
    def folder(self) -> Path:
        """Of the index; or of what is kept of one in Milvus."""
        return self.snapshot.kept

    def __len__(self) -> int:
        return len(self.snapshot)

    def __repr__(self) -> str:
        sizes = said(*self.patch_sizes)
        return f"Searcher({str(self.place)!r}: {len(self):,} images at {sizes})"

    @property
    def patch_sizes(self) -> tuple[Detail, ...]:
        """Those of the index; or its budgets of tokens, of an index that was embedded by them."""
        return self.snapshot.patch_sizes

    @property
    def encodable(self) -> list[Detail]:
        """Those of the model and those of the index, coarsest first: a checkpoint offers its own
        alone, and may be indexed at others. Of an index by budgets, budgets."""
        known: set[Detail] = {*self.model.patch_sizes}
        if any(isinstance(size, MaxTokens) for size in self.patch_sizes):
            known = {MaxTokens(num_tokens(size, self.model.image_size)) for size in known}
        return coarse_first(known | {*self.patch_sizes})

    def for_image(self, encoded: Detail) -> Detail:
        """Which of the index answers an image that is encoded so: the same, else its finest."""
        return encoded if encoded in self.patch_sizes else finest(self.patch_sizes)

    @property
    def agreement(self) -> Agreement | None:
        """How far coarse patch sizes find what the model's own finds; None where nobody has
        measured it (`measure_agreement`)."""
        return read_agreement(self.folder)

    def warning(
        self,
        patch_size: PatchSizeOrBudget = None,
        refine_patch_size: PatchSizeOrBudget = None,
        regions: bool = False,
    ) -> str:
        """One sentence where the index finds too little at a patch size, or by regions, as `search`
        takes them, else ""."""
        if regions:
            return "" if self.regions is None else self.regions.warning
        if (found := self.agreement) is None:
            return ""
        size = self.profile.choose(patch_size, self.patch_sizes)
        return found.warning(size, refined=refine_patch_size is not None)

    @property
    def calibration(self) -> Calibration | None:
        """What similarities mean; None where nobody has measured it (`calibrate_index`), or an
        index that has changed much since."""
        opened = self._opened
        return opened.calibrated.of(opened.snapshot)

    def confidence(
        self,
        texts: Float[np.ndarray, "q d"],
        found: Sequence[Sequence[Hit]],
        patch_size: PatchSizeOrBudget = None,
    ) -> list[float | None]:
        """Per text, given as its vector, and what was found of it: the share of texts with an
        answer that fit their best hit as badly. Small where there is nothing like it here; None
        where nothing was found, or the index is not calibrated."""
        best = [hits[0].id if hits else None for hits in found]
        size = self._index_patch_size(patch_size)
        opened = self._opened
        return opened.calibrated.confidence(opened.snapshot, texts, best, size)

    # ---- search ----------------------------------------------------------------------------

    def search(
        self,
        queries: Queries,
        k: int = 10,
        patch_size: PatchSizeOrBudget = None,
        *,
        query_patch_size: PatchSizeOrBudget = None,
        refine_patch_size: PatchSizeOrBudget = None,
        candidates: int = CANDIDATES,
        where: Where | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        words: float = 0.0,
        regions: bool = False,
        box: Sequence[float] | None = None,
    ) -> list[list[Hit]]:
        """Per query, the k most similar images, best first (fewer where fewer match).

        queries: texts, images and `Mix`es of both, as you like, or one of them; images as
        `LitModel.encode_image` takes them. A text that is the path of an image file searches by
        that image. k: 1 to 2,048.
        patch_size: which index answers; None takes its finest. query_patch_size: how query images
        are encoded; None takes the answering index's. Any of the three may be `MaxTokens`, or a
        `Budget`, instead.
        refine_patch_size: the best `candidates` of the index are encoded again at this patch size,
        from their files, and ranked by two thirds of that similarity and one third of the index's;
        their fine vectors are kept for the next search.
        where: a filter, see `retrieval.index.filters`. nprobe, ef (efSearch): how far an index of
        type ivf, ivfpq, rabitq or hnsw looks.
        words: what the words of captions, file names and other text columns count beside the
        vectors, 0 for nothing to 1 for all; a "phrase" in quotes must be there, wor* is how a word
        begins. Hits are ranked as `retrieval.search.fusion` says.
        regions: a picture is as similar as its most similar part, or the whole; each hit has its
        `box`. box: (left, top, right, bottom) from 0 to 1, the part of the query images that is
        looked for.
        Raises `UsageError` for values that cannot work.
        """
        check_k(k)
        given = read_queries(queries)
        if not given:
            return []
        parts = [part for query in given for part, _ in query]
        images = [part for part in parts if not isinstance(part, str)]
        if not images and query_patch_size is not None:
            raise UsageError("query_patch_size is for images; a text is not cut into patches")
        if box is not None and len(images) < len(parts):
            raise UsageError("box is for images; a text has no parts")
        size = encoded = self._index_patch_size(patch_size, regions)
        if query_patch_size is not None:
            encoded = self.profile.encoding(query_patch_size, self.encodable)
        refined = encoded
        if refine_patch_size is not None:
            refined = self.profile.encoding(refine_patch_size, self.encodable)
        embeds, fine = query_vectors(self.model, given, encoded, refined, words > 0, box)
        return self.search_embeds(
            embeds, k, size, refine_patch_size=refine_patch_size, refine_embeds=fine,
            candidates=candidates, where=where, nprobe=nprobe, ef=ef, words=words,
            texts=[[(part, w) for part, w in query if isinstance(part, str)] for query in given],
            regions=regions,
        )  # fmt: skip

    def search_embeds(
        self,
        embeds: Float[np.ndarray, "q d"],
        k: int = 10,
        patch_size: PatchSizeOrBudget = None,
        *,
        refine_patch_size: PatchSizeOrBudget = None,
        refine_embeds: Float[np.ndarray, "q d"] | None = None,
        candidates: int = CANDIDATES,
        where: Where | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        words: float = 0.0,
        texts: Sequence[WordQuery] = (),
        regions: bool = False,
    ) -> list[list[Hit]]:
        """`search` by unit-norm vectors. refine_embeds: the queries as the refinement sees them;
        the same ones when not given. texts: of each vector the texts whose words are looked for,
        with weights."""
        check_k(k)
        check_words(words)
        for name, value in (("nprobe", nprobe), ("ef", ef)):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is out of range; allowed: 1 and more")
        if embeds.shape[1] != self.snapshot.width:
            raise UsageError(
                f"a vector of width {embeds.shape[1]} does not fit {self.place}; allowed: "
                f"{self.snapshot.width}"
            )
        if not np.isfinite(embeds).all():
            raise UsageError("a query vector has numbers that are not finite")
        opened = self._opened  # one state of the index, whatever is reloaded meanwhile
        snapshot = opened.snapshot
        size = self._index_patch_size(patch_size, regions)
        if regions:
            if words or refine_patch_size is not None:
                raise UsageError("regions are found by one vector: give no words, refine nothing")
            parts = opened_regions(opened.regions, self.place)
            return opened.in_regions(parts, embeds, k, size, where, nprobe, ef)
        depth = k
        if refine_patch_size is not None:
            if not k <= candidates <= MAX_K:
                raise UsageError(f"candidates {candidates}: allowed are k ({k}) to {MAX_K}")
            depth = candidates
        fusion = Fusion(snapshot, texts, words, where) if words and texts else None
        if fusion is None:
            similarities, ids = snapshot.nearest(embeds, depth, size, where, nprobe, ef)
        else:
            similarities, ids = fusion.candidates(embeds, depth, size, nprobe, ef)
        if refine_patch_size is not None:
            refined = self.profile.encoding(refine_patch_size, self.encodable)
            queries = embeds if refine_embeds is None else refine_embeds
            similarities, ids = opened.refine(self.model, queries, similarities, ids, refined)
            if fusion is not None:
                similarities, ids = fusion.ranked(similarities, ids, k)
            similarities, ids = similarities[:, :k], ids[:, :k]
        by_words = np.zeros(ids.shape) if fusion is None else fusion.scores(ids)
        return opened.hits(similarities, ids, by_words)

    def vectors(self, ids: Sequence[int], patch_size: Detail) -> Float[np.ndarray, "n d"]:
        """The index's vectors of ids, as precise as its type. KeyError for an unknown one."""
        return self.snapshot.vectors(ids, self._index_patch_size(patch_size))

    def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The metadata of ids, in the order given. Raises KeyError for an unknown one."""
        return self.snapshot.rows(ids)

    def _index_patch_size(self, patch_size: PatchSizeOrBudget, regions: bool = False) -> Detail:
        held, where = self.patch_sizes, f"{self.place}"
        if regions:
            held = opened_regions(self.regions, self.place).patch_sizes
            where = f"the regions of {self.place}"
        size = self.profile.choose(patch_size, held)
        if size not in held:
            raise UsageError(
                f"patch size {size} is not in {where}; allowed: {', '.join(map(str, held))}"
            )
        return size
