"""A route whose body and answer are pydantic models, read and written as JSON."""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response

from retrieval.server.refusals import Refusal, RequestError, explain

FORM_JSON = (
    "where",
    "vector",
    "mix",
    "labels",
    "templates",
    "box",
    "examples",
)  # fields of a form that are JSON
MAX_FIELD_BYTES = 1 << 20  # of a form's part that is no file

Model = TypeVar("Model", bound=BaseModel)


class ModelRoute(APIRoute):
    """Describes itself to FastAPI as any route, but reads and writes the models directly.

    FastAPI would take a body for JSON only if its content type says so, which clip-retrieval's
    clients do not; and it would check an answer that is a checked model already a second time.
    """

    def __init__(self, path: str, endpoint: Callable[..., Awaitable[Any]], **settings: Any) -> None:
        settings["responses"] = {"4XX": {"model": Refusal}, **(settings.get("responses") or {})}
        exclude_none = bool(settings.get("response_model_exclude_none"))
        super().__init__(path, _answering(endpoint, exclude_none), **settings)

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        if not self.dependant.body_params:
            return super().get_route_handler()
        (body,) = self.dependant.body_params
        model: Any = body.field_info.annotation

        async def handle(request: Request) -> Response:
            return await self.endpoint(await read(request, model))

        return handle


def _answering(
    endpoint: Callable[..., Awaitable[Any]], exclude_none: bool
) -> Callable[..., Awaitable[Response]]:
    """The endpoint, its answer made JSON."""

    @wraps(endpoint)
    async def answer(*args: Any, **kwargs: Any) -> Response:
        found = await endpoint(*args, **kwargs)
        if isinstance(found, Response):
            return found
        data = to_json(found, exclude_none=exclude_none, serialize_unknown=True)
        return Response(data, media_type="application/json")

    return answer


async def read(request: Request, model: type[Model]) -> Model:
    """The body as `model`: a form if the content type says so, else JSON. Raises `RequestError`."""
    try:
        if request.headers.get("content-type", "").startswith("multipart/"):
            return model.model_validate(await _read_form(request, model), strict=False)
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise explain(error, list(model.model_fields)) from None


async def _read_form(request: Request, model: type[BaseModel]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    try:
        async with request.form(
            max_files=1, max_fields=len(model.model_fields), max_part_size=MAX_FIELD_BYTES
        ) as form:
            for name, value in form.multi_items():
                if name in fields:
                    raise RequestError(400, f"{name[:80]}: is there more than once")
                if isinstance(value, UploadFile):
                    if name != "image":
                        raise RequestError(400, f"{name[:80]}: is a file; allowed: image")
                    fields[name] = await value.read()
                else:
                    fields[name] = _from_json(name, value) if name in FORM_JSON else value
    except HTTPException as error:
        raise RequestError(400, f"the form cannot be read: {error.detail}") from None
    return fields


def _from_json(name: str, text: str) -> Any:
    try:
        return from_json(text)  # as a body's, it refuses halves of characters
    except ValueError:
        raise RequestError(400, f"{name}: is not JSON") from None


def form_of(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: the body may be a form of the same fields."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}
