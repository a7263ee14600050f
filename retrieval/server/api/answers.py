"""The answers of the endpoints: what they hold, and what /openapi.json says of it."""

from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from retrieval.search.hit import Hit
from retrieval.server.config import Limits


class Answer(BaseModel):
    """In JSON, NaN becomes null and bytes become base64."""

    model_config = ConfigDict(ser_json_inf_nan="null", ser_json_bytes="base64")


class FoundImage(Answer):
    id: int = Field(description="A 64-bit integer; never reused within an index.")
    similarity: float = Field(description="Cosine; refined, of both patch sizes.")
    key: str
    caption: str
    image: str = Field(description="Path of its thumbnail; ?size= in pixels.")
    columns: dict[str, Any] = Field(description="The index's other metadata.")
    words: float = Field(
        description="BM25 of its texts, where words were searched for; 0: none of them."
    )
    box: list[float] | None = Field(
        description="Where regions were searched, the part that was found: left, top, right and "
        "bottom, 0 to 1."
    )

    @classmethod
    def of(cls, index: str, hit: Hit) -> "FoundImage":
        return cls(
            id=hit.id, similarity=hit.similarity, key=hit.key, caption=hit.caption,
            image=f"/v1/images/{quote(index, safe='')}/{hit.id}", columns=dict(hit.columns),
            words=hit.words, box=None if hit.box is None else list(hit.box),
        )  # fmt: skip


class SearchTimes(Answer):
    text: float = Field(
        description="Milliseconds of the text forwards, shared with other requests or not."
    )
    image: float = Field(description="Milliseconds of the image forwards.")
    search: float = Field(description="From the vector to the hits.")
    total: float


class SearchAnswer(Answer):
    index: str
    patch_size: int | None = Field(
        description="Of the index that answered; null of one by budgets of tokens."
    )
    max_tokens: int | None = Field(description="The budget of the index that answered.")
    query_patch_size: int | None = Field(description="At which a query image was encoded.")
    query_max_tokens: int | None
    refine_patch_size: int | None
    refine_max_tokens: int | None
    hits: list[FoundImage]
    background: float | None = Field(
        description="Mean similarity of the query to images at random, where asked for."
    )
    found: bool | None = Field(
        description='Of a text in a calibrated index: false is "nothing like this here", though '
        "hits are listed. null: nothing is said."
    )
    confidence: float | None = Field(
        description="The share of texts with an answer that fit their best hit as badly; null "
        "where nothing is known."
    )
    next_offset: int | None = Field(description="Of the next page, null after the last.")
    near_duplicates: int = Field(
        description="With `deduplicate`, how many images much like better ones were left out, on "
        "this page and those before; without it they are hits."
    )
    text_cut: bool = Field(
        description="Whether a text is longer than the model reads: its end was not searched for."
    )
    warning: str = Field(
        description="A sentence where the patch size finds too little, or images have no regions, "
        'else "".'
    )
    ms: SearchTimes


class Label(Answer):
    label: str
    similarity: float
    share: float | None = Field(description="Softmax over the labels; null for a large class set.")


class ClassifyTimes(Answer):
    image: float
    total: float


class ClassifyAnswer(Answer):
    patch_size: int | None = Field(description="At which the answer was found.")
    max_tokens: int | None = Field(description="Or within which budget.")
    refined: bool
    found: bool | None = Field(
        description="false: none of the labels, as in a search. null: nothing is said."
    )
    confidence: float | None = Field(
        description="The share of images that fit their own caption as badly as this one its "
        "best label; null where nothing is known."
    )
    temperature: float | None = Field(
        description="By which logits were divided for the shares; null: none was fitted."
    )
    labels: list[Label]
    ms: ClassifyTimes


class Region(Answer):
    label: str
    share: float = Field(description="Of the image's pixels.")


class SegmentAnswer(Answer):
    patch_size: int
    width: int = Field(description="Of the mask: the image's, or in proportion where it is larger.")
    height: int
    mask: str = Field(description="A PNG of 8 bits in base64: 0 no label, k the k-th label.")
    regions: list[Region] = Field(description="The labels that some pixels are of, largest first.")
    ms: ClassifyTimes


class Detection(Answer):
    box: list[float] = Field(description="Left, top, right and bottom in the image, 0 to 1.")
    label: str | None = Field(description="null where it was found by an example.")
    example: int | None = Field(description="Its number among the examples, from 0.")
    score: float = Field(description="Mean cosine of the region's pixels.")


class DetectAnswer(Answer):
    patch_size: int
    boxes: list[Detection] = Field(description="Best first.")
    ms: ClassifyTimes


class MapAnswer(Answer):
    patch_size: int
    similarities: list[list[float]] = Field(
        description="Cosine of the text and each patch, or with `windows` each of 32 x 32 cells, "
        "row by row from the top left; they cover the whole image."
    )
    ms: ClassifyTimes


class PatchSizeCost(Answer):
    patch_size: int | None
    max_tokens: int | None = Field(
        description="Patches that an image has at most; null of a patch size."
    )
    in_index: bool
    neighbours: float | None = Field(
        description="Share of the nearest images at the own patch size that this one finds, "
        "measured on the index's images; null where nothing was."
    )
    candidates: float | None = Field(
        description="Share that is among its first 200, which a refinement ranks again; "
        "null where too few images were compared to tell."
    )
    warning: str = Field(description='A sentence where it finds too little by itself, else "".')
    refusals: str = Field(
        description='What "nothing like this here" means at it, in a sentence; "" where it is not '
        "calibrated."
    )
    gflops: float = Field(description="10^9 floating-point operations of one image.")
    ms: float = Field(description="Of one image alone, measured on this server.")


class IndexingAnswer(Answer):
    patch_size: int | None = Field(description="At which images are embedded now.")
    max_tokens: int | None = Field(description="Or within which budget.")
    done: int = Field(description="Images that are embedded at it.")
    total: int = Field(description="0: not known yet.")
    seconds_left: float | None = Field(description="null: not known yet.")
    problem: str = Field(default="", description="A sentence where it goes on no more.")


class IndexAnswer(Answer):
    name: str
    count: int = Field(description="Images.")
    kind: str = Field(description="Index type: flat, flat16, ivf, ivfpq, rabitq or hnsw.")
    width: int = Field(description="Numbers of a vector.")
    generation: int = Field(description="Grows with every change.")
    image_size: int = Field(description="Side of an image as the image tower reads it, in pixels.")
    budgets: bool = Field(description="Whether an image may be read within any number of tokens.")
    fit: str = Field(description="crop, squash or aspect: how an image becomes what is read.")
    own_patch_size: int | None = Field(description="With which the others are compared.")
    own_max_tokens: int | None
    patch_sizes: list[PatchSizeCost] = Field(
        description="Or budgets of tokens, of an index by those."
    )
    columns: dict[str, str] = Field(description="Names and types of the metadata.")
    words: bool = Field(description="Whether its texts can be searched by their words.")
    region_sizes: list[int] = Field(
        description="Patch sizes, or budgets of tokens, at which parts of its images are indexed."
    )
    map_patch_sizes: list[int] = Field(
        description="At which an image is mapped, coarsest first; by `windows` alone where the "
        "model has no tokens of patches."
    )
    indexing: IndexingAnswer | None = Field(
        description="Of an album that is being indexed while it is served; null once that is done."
    )


class ClassSetAnswer(Answer):
    name: str
    count: int = Field(description="Classes.")


@dataclass(frozen=True, kw_only=True)
class LimitsAnswer(Limits):
    max_chosen: int
    """Images of a ZIP."""


class IndicesAnswer(Answer):
    indices: list[IndexAnswer]
    class_sets: list[ClassSetAnswer]
    limits: LimitsAnswer


class SampleAnswer(Answer):
    index: str
    hits: list[FoundImage]


class ListAnswer(SampleAnswer):
    count: int = Field(description="Images that the filter lets through.")
    next_offset: int | None = Field(description="Of the next page, null after the last.")


class AboutAnswer(FoundImage):
    bytes: int = Field(description="Size of the image's file.")


class ValueCount(Answer):
    value: str | bool | int
    count: int


class ColumnAnswer(Answer):
    name: str
    type: str
    kind: Literal["choice", "text", "number", "date"] = Field(
        description="What may be asked of it: one of `values`, `contains`, or from `least` to "
        "`greatest`. Dates are ISO 8601."
    )
    values: list[ValueCount] = Field(description="Of a choice, the most frequent first.")
    least: float | str | None
    greatest: float | str | None


class ColumnsAnswer(Answer):
    index: str
    columns: list[ColumnAnswer] = Field(description="Those by which images can be told apart.")


class ScaleAnswer(Answer):
    index: str
    patch_size: int | None
    max_tokens: int | None
    words: float | None = Field(
        description="How far above their background the best hits of ordinary words lie; null for "
        "an empty index."
    )
    luck: float | None = Field(description="The same of texts that no image answers.")


class KnnEntry(Answer):
    """An image. Of the first `num_images` all metadata, further columns of the index included;
    what holds nothing is left out."""

    model_config = ConfigDict(extra="allow")
    key: str | None = None
    caption: str | None = None
    image: str | None = Field(default=None, description="A JPEG in base64.")
    id: int
    similarity: float = Field(description="Cosine.")


class MetadataEntry(Answer):
    id: int
    metadata: dict[str, Any]
