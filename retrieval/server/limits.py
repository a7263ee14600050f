"""What a request may ask for, and the sentences that refuse the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from data.errors import UsageError
from retrieval.search.config import MAX_K


@dataclass(frozen=True)
class Limits:
    """Upper bounds on one request, and on how many may wait."""

    max_body_mib: float = 16.0
    """Of a request's body."""
    max_pixels: int = 50_000_000
    """Of a query image, told from its header."""
    max_k: int = MAX_K
    """Hits, those of earlier pages included."""
    max_text: int = 1000
    """Characters of a text."""
    max_labels: int = 200
    """Labels of one classification."""
    max_candidates: int = 500
    """Images encoded again for one search."""
    max_queue: int = 256
    """Requests that wait for a forward or for a search; more are told to come back."""
    timeout_s: float = 30.0
    """Seconds from a request's first byte to its answer."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            flag = f"--limits.{name.replace('_', '-')}"
            if not value > 0:
                raise UsageError(f"{flag} {value:g}: allowed are numbers above 0")
        if self.max_k > MAX_K:
            raise UsageError(f"--limits.max-k {self.max_k}: at most {MAX_K}")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mib * 2**20)


class RequestError(Exception):
    """What the caller can mend: an HTTP status from 400 to 499 and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def explain(error: ValidationError, allowed: Sequence[str]) -> RequestError:
    """The first thing that pydantic found wrong, as one sentence.

    allowed: the names of the request's fields.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field, message = _path(first["loc"]), str(first["msg"])
    message = message.removeprefix("Value error, ")
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
    """`mix[2].text`, cut where a stranger chose the name."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc]
    return "".join(parts).removeprefix(".")[:80]
