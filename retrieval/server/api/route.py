"""JSON that goes out."""

from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from retrieval.search.searcher import Hit


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """JSON of anything that metadata may hold; numbers that JSON has not become null."""
    data = to_json(content, inf_nan_mode="null", bytes_mode="base64", serialize_unknown=True)
    return Response(data, status, headers, "application/json")


def refusal(status: int, sentence: str) -> Response:
    """`{"error": "one sentence"}`."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status)
    return json_response({"error": sentence}, status, headers)


def columns_of(hit: Hit) -> dict[str, Any]:
    """What a stranger may know of an image: not where it lies on this machine."""
    return {**hit.columns, "key": hit.key, "caption": hit.caption}
