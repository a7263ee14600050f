"""Why a request is refused: a status and one sentence that the client can act on."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}


class RequestError(Exception):
    """An HTTP status and one sentence: 400 to 499 for an error that the client can fix, 503 for an
    index that is damaged."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Refusal(BaseModel):
    error: str = Field(description="One sentence that names the field and what is allowed.")


def refusal(status: int, sentence: str) -> Response:
    """`{"error": sentence}`."""
    data = Refusal(error=sentence).model_dump_json()
    return Response(data, status, HEADERS.get(status), "application/json")


def explain(error: ValidationError, allowed: Sequence[str]) -> RequestError:
    """The first problem that pydantic found, as one sentence.

    allowed: the names of the request's fields.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field, message = _path(first["loc"]), str(first["msg"])
    message = message.removeprefix("Value error, ").replace(" after validation", "")
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON: {message.partition(': ')[2][:200]}")
    if first["type"] == "extra_forbidden":
        return RequestError(400, f"{field}: no such field; allowed: {', '.join(allowed)}")
    if first["type"] == "model_type":
        return RequestError(400, "the body is no JSON object")
    if first["type"] == "missing":
        message = "is needed"
    message = message[:1].lower() + message[1:300]
    return RequestError(400, f"{field}: {message}" if field else message)


def _path(loc: Sequence[Any]) -> str:
    """`mix[2].text`, cut short because the client may have chosen the name."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc]
    return "".join(parts).removeprefix(".")[:80]
