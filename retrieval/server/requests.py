"""The bodies of requests."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from retrieval.detail import Detail, MaxTokens
from retrieval.regions.boxes import check_box
from retrieval.search.config import CANDIDATES
from retrieval.server.config import Limits
from retrieval.server.refusals import RequestError
from retrieval.words.asked import unmarked

MAX_ID = 2**63 - 1
MAX_LABELS = 1000  # of an answer
QUERIES = ("text", "image", "image_url", "vector", "id")

Size = Field(default=None, ge=1, le=4096)


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool | float):
        raise ValueError("input should be a whole number")
    return value


# May be a string: JavaScript's numbers hold 53 bits.
Id = Annotated[int, Field(ge=0, le=MAX_ID, strict=False), BeforeValidator(_no_boolean)]


class Strict(BaseModel):
    """In JSON neither a string nor a boolean is a number; in a form every value is a string."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Query(Strict):
    """One thing to look for: exactly one of text, image, image_url, vector and id."""

    text: str | None = Field(default=None, min_length=1, description="What the text tower reads.")
    image: str | bytes | None = Field(
        default=None,
        min_length=1,
        description="A file in base64; in a form, the file itself.",
    )
    image_url: str | None = Field(
        default=None, min_length=1, description="If the server allows it."
    )
    vector: list[float] | None = Field(
        default=None,
        min_length=1,
        max_length=65536,
        description="As wide as the index.",
    )
    id: Id | None = Field(default=None, description="An image of the index.")
    box: list[float] | None = Field(
        default=None,
        description="The part of the image that is looked for: left, top, right, bottom, 0 to 1.",
    )

    @model_validator(mode="after")
    def _box_of_an_image(self) -> "Query":
        if self.box is not None:
            check_box(self.box)
            if self.image is None and self.image_url is None and self.id is None:
                raise ValueError("box: is for an image, image_url or id")
        return self

    def is_encoded(self) -> bool:
        """Whether an image has to be read for it."""
        by_part = self.id is not None and self.box is not None
        return self.image is not None or self.image_url is not None or by_part

    def given(self) -> list[str]:
        return [name for name in QUERIES if getattr(self, name) is not None]


class Term(Query):
    """A part of a mixed query."""

    weight: float = Field(default=1.0, ge=-100, le=100, description="Below 0: less of this.")

    @model_validator(mode="after")
    def _one(self) -> "Term":
        if len(self.given()) != 1:
            raise ValueError(f"exactly one of {', '.join(QUERIES)} is needed")
        return self


class PatchSizeFields(Strict):
    """Patch sizes, or what encoding one image may cost."""

    index: str | None = Field(default=None, description="The first when not given.")
    patch_size: int | None = Size
    max_gflops: float | None = Field(
        default=None,
        gt=0,
        description="Instead of a patch size: the finest that costs less an image.",
    )
    max_ms: float | None = Field(default=None, gt=0, description="The same, in ms on the server.")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Instead of a patch size: at most so many patches an image, any number; of an "
        "index, the finest within it.",
    )
    refine_patch_size: int | None = Size
    refine_max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Instead of refine_patch_size; a search takes the largest square number within "
        "it, or a budget of the index.",
    )

    @model_validator(mode="after")
    def _patch_size_or_budget(self) -> "PatchSizeFields":
        sizes = (getattr(self, f"{of}patch_size", None) for of in ("", "query_", "index_"))
        has_size, by_cost = any(size is not None for size in sizes), self.has_budget()
        if self.max_tokens is not None and (has_size or by_cost):
            raise ValueError(
                "max_tokens stands instead of a patch size, and of max_gflops and max_ms; give one"
            )
        if by_cost and (self.patch_size or getattr(self, "query_patch_size", None)) is not None:
            raise ValueError(
                "max_gflops and max_ms stand instead of a patch size; give one or other"
            )
        if self.refine_patch_size is not None and self.refine_max_tokens is not None:
            raise ValueError("refine_max_tokens stands instead of refine_patch_size; give one")
        return self

    def has_budget(self) -> bool:
        return self.max_gflops is not None or self.max_ms is not None

    def refinement(self) -> Detail | None:
        """At what the best are encoded again."""
        if self.refine_max_tokens is not None:
            return MaxTokens(self.refine_max_tokens)
        return self.refine_patch_size


class SearchRequest(Query, PatchSizeFields):
    """What to look for, and how. Give one of text, image, image_url, vector, id, or a mix."""

    mix: list[Term] | None = Field(
        default=None, min_length=1, max_length=16, description="Weighted parts of one query."
    )
    k: int = Field(default=20, ge=1, description="Hits of this page.")
    offset: int = Field(default=0, ge=0, description="Hits of the pages before.")
    query_patch_size: int | None = Size
    index_patch_size: int | None = Size
    candidates: int = Field(default=CANDIDATES, ge=1, description="Hits that are refined.")
    lost: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Instead of candidates: as many as lose, on average "
        "over texts, at most this share of what refining all images finds.",
    )
    where: dict[str, Any] | None = Field(
        default=None, description='Filter on metadata: {"caption": {"contains": "cat"}}.'
    )
    deduplicate: bool = Field(default=False, description="Leave out hits much like better ones.")
    background: bool = Field(default=False, description="Say how similar images at random are.")
    regions: bool = Field(
        default=False,
        description="A picture is as similar as its most similar part, or the whole: a hit's box.",
    )
    nprobe: int | None = Field(
        default=None, ge=1, le=1 << 20, description="Inverted lists that an ivf looks into."
    )
    ef: int | None = Field(default=None, ge=1, le=1 << 16, description="efSearch of an hnsw.")
    words: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="What the words of captions, names and other texts count beside the vectors: "
        '0 nothing, 1 all. Then a "phrase" in quotes must be there, and wor* begins a word.',
    )

    @model_validator(mode="after")
    def _one_query(self) -> "SearchRequest":
        if len(self.given()) + (self.mix is not None) != 1:
            raise ValueError(f"exactly one of {', '.join(QUERIES)} and mix is needed")
        if self.regions and (self.words or self.refinement() is not None):
            raise ValueError("regions: are found by one vector; give no words, refine nothing")
        return self

    def terms(self) -> list[Term]:
        """The query as a mix."""
        if self.mix is not None:
            return self.mix
        return [Term(**{name: getattr(self, name) for name in self.given()}, box=self.box)]

    def word_query(self) -> tuple[tuple[str, float], ...]:
        """The texts whose words are looked for, with their weights."""
        return tuple((term.text, term.weight) for term in self.terms() if term.text)

    def read_terms(self) -> list[Term]:
        """The terms as the model is to read them: without the marks that are for words."""
        terms = self.terms()
        if not self.words:
            return terms
        texts = [term.text and (unmarked(term.text) or term.text) for term in terms]
        pairs = zip(terms, texts, strict=True)
        return [term.model_copy(update={"text": text}) for term, text in pairs]


class Picture(Strict):
    """An image that is sent, named by URL, or stored in an index."""

    image: str | bytes | None = Field(default=None, min_length=1, description="As in a search.")
    image_url: str | None = Field(
        default=None, min_length=1, description="If the server allows it."
    )
    id: Id | None = Field(default=None, description="An image of the index.")

    @model_validator(mode="after")
    def _one_image(self) -> "Picture":
        if sum(given is not None for given in (self.image, self.image_url, self.id)) != 1:
            raise ValueError("exactly one of image, image_url and id is needed")
        return self


class OneImage(Picture):
    """An image, and the index whose model reads it."""

    index: str | None = Field(default=None, description="The first when not given.")


class ImageToLabel(OneImage):
    """An image, and the templates that its labels stand in."""

    templates: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="With {c} where the label goes.",
    )

    @model_validator(mode="after")
    def _places_for_labels(self) -> "ImageToLabel":
        if any("{c}" not in template for template in self.templates or ()):
            raise ValueError("templates: each needs {c} where the label goes")
        return self


class ClassifyRequest(ImageToLabel, PatchSizeFields):
    """An image, and labels or the name of a class set."""

    labels: list[str] | None = Field(default=None, min_length=1)
    class_set: str | None = Field(default=None, description="One that /v1/indices names.")
    k: int = Field(default=20, ge=1, le=MAX_LABELS, description="Labels, best first.")
    margin: float = Field(
        default=0.02, ge=0, le=2, description="Refine where the first two lie closer than this."
    )

    @model_validator(mode="after")
    def _labels_or_class_set(self) -> "ClassifyRequest":
        if (self.labels is None) == (self.class_set is None):
            raise ValueError("exactly one of labels and class_set is needed")
        if self.class_set is not None and self.templates is not None:
            raise ValueError("templates: a class set has its own; give them with labels")
        return self


def check_text(text: str, limits: Limits, field: str) -> None:
    """Raises `RequestError` for a text that is too long."""
    if len(text) > limits.max_text:
        sentence = f"{field}: has {len(text)} characters; at most {limits.max_text}"
        raise RequestError(400, sentence)
