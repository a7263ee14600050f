"""What /openapi.json says of bodies and answers beyond what FastAPI reads from signatures."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from retrieval.server.requests import (
    ClassifyRequest,
    KnnRequest,
    MetadataRequest,
    SearchRequest,
)

REF = "#/components/schemas/{model}"


class Refusal(BaseModel):
    error: str = Field(description="One sentence that names the field and what is allowed.")


class FoundImage(BaseModel):
    id: int = Field(description="A 64-bit integer; never reused within an index.")
    similarity: float = Field(description="Cosine; refined, of both patch sizes.")
    key: str
    caption: str
    image: str = Field(description="Path of its thumbnail; ?size= in pixels.")
    columns: dict[str, Any] = Field(description="The index's other metadata.")


class SearchTimes(BaseModel):
    text: float = Field(
        description="Milliseconds of text forwards, those of other requests with it."
    )
    image: float = Field(description="Milliseconds of image forwards.")
    search: float = Field(description="From the vector to the hits.")
    total: float


class SearchAnswer(BaseModel):
    index: str
    patch_size: int = Field(description="Of the index that answered.")
    query_patch_size: int | None = Field(description="At which a query image was encoded.")
    refine_patch_size: int | None
    hits: list[FoundImage]
    next_offset: int | None = Field(description="Of the next page, null after the last.")
    ms: SearchTimes


class Label(BaseModel):
    label: str
    similarity: float
    share: float | None = Field(description="Softmax over the labels; null for a large class set.")


class ClassifyTimes(BaseModel):
    image: float
    total: float


class ClassifyAnswer(BaseModel):
    patch_size: int = Field(description="At which the answer was found.")
    refined: bool
    labels: list[Label]
    ms: ClassifyTimes


class SizeCost(BaseModel):
    patch_size: int
    in_index: bool
    gflops: float = Field(description="10^9 floating-point operations of one image.")
    ms: float = Field(description="Of one image alone, measured on this server.")


class IndexAnswer(BaseModel):
    name: str
    count: int
    kind: str
    width: int
    generation: int = Field(description="Grows with every change.")
    image_size: int
    patch_sizes: list[SizeCost]
    columns: dict[str, str] = Field(description="Names and types of the metadata.")


class ClassSet(BaseModel):
    name: str
    count: int


class IndicesAnswer(BaseModel):
    indices: list[IndexAnswer]
    class_sets: list[ClassSet]
    limits: dict[str, float]


class SampleAnswer(BaseModel):
    index: str
    hits: list[FoundImage]


class KnnEntry(BaseModel):
    """Of the first `num_images`, the metadata's columns too."""

    model_config = ConfigDict(extra="allow")
    id: int
    similarity: float = Field(description="Cosine.")
    image: str | None = Field(default=None, description="A JPEG in base64.")


class MetadataEntry(BaseModel):
    id: int
    metadata: dict[str, Any]


JSON, FORM = "application/json", "multipart/form-data"


def _route(
    summary: str,
    answer: Any,
    body: type[BaseModel] | None = None,
    contents: Sequence[str] = (JSON, FORM),
) -> dict[str, Any]:
    route: dict[str, Any] = {
        "summary": summary,
        "responses": {200: {"model": answer}, "4XX": {"model": Refusal}},
    }
    if body is not None:
        schema = {"schema": {"$ref": REF.format(model=body.__name__)}}
        content = dict.fromkeys(contents, schema)
        route["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return route


SEARCH = _route("Images for a text, an image, a vector, or a mix", SearchAnswer, SearchRequest)
CLASSIFY = _route("Labels for an image", ClassifyAnswer, ClassifyRequest)
KNN = _route("clip-retrieval's search", list[KnnEntry], KnnRequest, [JSON])
METADATA = _route("clip-retrieval's metadata by id", list[MetadataEntry], MetadataRequest, [JSON])
INDICES = _route("Indexes, what their patch sizes cost, class sets, limits", IndicesAnswer)
SAMPLE = _route("Images at random", SampleAnswer)
IMAGE: dict[str, Any] = {
    "summary": "A thumbnail, JPEG",
    "response_class": Response,
    "responses": {200: {"content": {"image/jpeg": {}}}, "4XX": {"model": Refusal}},
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that FastAPI does not read itself."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    bodies = (SearchRequest, ClassifyRequest, KnnRequest, MetadataRequest)
    models: Any = [(model, "validation") for model in bodies]
    _, schemas = models_json_schema(models, ref_template=REF)
    document["components"]["schemas"].update(schemas["$defs"])
    return document
