"""What indexes hold: their sizes and costs, their images, the values of their columns."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from retrieval.detail import Detail, MaxTokens, answered, finest
from retrieval.index.filters import parse_where
from retrieval.index.manifest import IndexManifest
from retrieval.indexing_progress import IndexingProgress
from retrieval.search.hit import Hit
from retrieval.server.api.answers import (
    ClassSetAnswer,
    ColumnsAnswer,
    FoundImage,
    IndexAnswer,
    IndexingAnswer,
    IndicesAnswer,
    LimitsAnswer,
    ListAnswer,
    SampleAnswer,
    ScaleAnswer,
)
from retrieval.server.api.column_values import describe_columns
from retrieval.server.api.described_sizes import describe_sizes, own_size
from retrieval.server.api.route import ModelRoute
from retrieval.server.api.similarity_scale import similarity_scale
from retrieval.server.api.stored_images import MAX_CHOSEN
from retrieval.server.api.v1 import where_of
from retrieval.server.patch_sizes import check_size, map_patch_sizes
from retrieval.server.refusals import RequestError
from retrieval.server.served_index import ServedIndex
from retrieval.server.service import Service

MAX_LISTED = 100


def routes(service: Service) -> APIRouter:
    """The endpoints of whole indexes."""
    router = APIRouter(prefix="/v1", route_class=ModelRoute)
    # of a state of an index, which a generation does not tell: it may have been built anew
    columns_of: dict[str, tuple[IndexManifest, ColumnsAnswer]] = {}  # by index
    scale_of: dict[tuple[str, Detail], tuple[IndexManifest, ScaleAnswer]] = {}  # and patch size

    @router.get("/indices", summary="Indexes, what their patch sizes cost, class sets, limits")
    async def indices() -> IndicesAnswer:
        return IndicesAnswer(
            indices=[
                _describe(index, service.refuse)
                for index in service.indexes.values()
                if not index.damage
            ],
            class_sets=[
                ClassSetAnswer(name=name, count=len(classes.class_names))
                for name, classes in service.class_sets.items()
            ],
            limits=LimitsAnswer(**asdict(service.limits), max_chosen=MAX_CHOSEN),
        )

    @router.get("/indices/{index}/sample", summary="Images at random")
    async def sample(index: str, n: int = 24) -> SampleAnswer:
        found = service.index(index)
        _check_listed("n", n)
        chosen = await found.of_snapshot(lambda snapshot: snapshot.draw(n))
        rows = await found.rows(chosen.tolist())
        return SampleAnswer(index=found.name, hits=_images(found, rows))

    @router.get("/indices/{index}/images", summary="Images that a filter lets through, by id")
    async def images(index: str, where: str = "", k: int = 24, offset: int = 0) -> ListAnswer:
        """where: a filter as JSON."""
        found = service.index(index)
        _check_listed("k", k)
        if offset < 0:
            raise RequestError(400, f"offset: {offset}; allowed: 0 and more")
        wanted = parse_where(where) if where else None
        where_of(wanted)
        ids, count = await found.ids(wanted or None, offset + k)
        rows = await found.rows(ids[offset : offset + k].tolist())
        return ListAnswer(
            index=found.name,
            hits=_images(found, rows),
            count=count,
            next_offset=offset + k if count > offset + k else None,
        )

    @router.get("/indices/{index}/columns", summary="Columns to filter by, and their values")
    async def columns(index: str) -> ColumnsAnswer:
        found = service.index(index)
        manifest = found.searcher.snapshot.manifest
        kept = columns_of.get(found.name)
        if kept is None or kept[0] != manifest:
            described = await found.of_snapshot(describe_columns)
            kept = manifest, ColumnsAnswer(index=found.name, columns=described)
            columns_of[found.name] = kept
        return kept[1]

    @router.get("/indices/{index}/scale", summary="What a similarity means here")
    async def scale(
        index: str,
        patch_size: int | None = None,
        max_tokens: Annotated[int | None, Query(ge=1)] = None,
    ) -> ScaleAnswer:
        """Of the finest where neither a patch size nor a budget is given."""
        found = service.index(index)
        sizes, manifest = found.searcher.patch_sizes, found.searcher.snapshot.manifest
        if patch_size is not None and max_tokens is not None:
            raise RequestError(400, "give patch_size or max_tokens, not both")
        size = patch_size or finest(sizes)
        if max_tokens is not None:
            size = MaxTokens(max_tokens)
        check_size(
            "patch_size" if max_tokens is None else "max_tokens", size, sizes, f"index {found.name}"
        )
        kept = scale_of.get((found.name, size))
        if kept is None or kept[0] != manifest:
            kept = manifest, await similarity_scale(service, found, size)
            scale_of[found.name, size] = kept
        return kept[1]

    return router


def _check_listed(field: str, count: int) -> None:
    if not 1 <= count <= MAX_LISTED:
        raise RequestError(400, f"{field}: {count}; allowed: 1 to {MAX_LISTED}")


def _images(index: ServedIndex, rows: list[tuple[int, dict[str, Any]]]) -> list[FoundImage]:
    return [FoundImage.of(index.name, Hit.of(0.0, row)) for _, row in rows]


def _numbers(sizes: Sequence[Detail]) -> list[int]:
    return [size.count if isinstance(size, MaxTokens) else size for size in sizes]


def _progress(found: IndexingProgress) -> IndexingAnswer:
    values = {**asdict(found), **answered("", found.patch_size)}
    return IndexingAnswer(**values)


def _describe(index: ServedIndex, refuse: float) -> IndexAnswer:
    searcher, snapshot = index.searcher, index.searcher.snapshot
    columns = {} if snapshot.columns is None else {f.name: str(f.type) for f in snapshot.columns}
    return IndexAnswer(
        name=index.name,
        count=len(snapshot),
        kind=snapshot.manifest.index_type,
        width=snapshot.width,
        generation=snapshot.generation,
        image_size=searcher.model.image_size,
        budgets=searcher.model.vision.flexible,
        fit=searcher.model.transform.fit,
        **answered("own_", own_size(searcher)),
        patch_sizes=describe_sizes(searcher, refuse),
        columns=columns,
        words=snapshot.has_words,
        region_sizes=[] if searcher.regions is None else _numbers(searcher.regions.patch_sizes),
        map_patch_sizes=map_patch_sizes(searcher),
        indexing=_progress(index.indexing) if index.indexing else None,
    )
