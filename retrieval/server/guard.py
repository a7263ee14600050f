"""What every request passes first: token, size of the body, time limit."""

import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import anyio

from data.errors import refusal_of_gpu
from retrieval.server.page import PAGE
from retrieval.server.refusals import RequestError, refusal
from retrieval.server.service import Service

# These need no token: the page without data, and what a load balancer asks.
OPEN_PATHS = frozenset({*PAGE, "/healthz", "/readyz"})
HELD_BODIES = 32  # bodies of the largest size that may be held at once
# Clients read a refusal only after sending; drain at most this many maximum-size bodies, so long.
DRAINED_BODIES, DRAIN_S = 4, 2.0

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware around the whole service. Bodies are read here, whole: no endpoint waits for
    a slow client."""

    def __init__(
        self, app: Any, service: Service, token: str = "", cors: Sequence[str] = ()
    ) -> None:
        self.app, self._service, self._limits = app, service, service.limits
        self._names = {urlsplit(origin).hostname for origin in cors}
        self._token = token.encode()
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Request(scope, receive, send)
        try:
            await self._answer(request)
        except _Gone:
            pass
        finally:
            self._held_bytes -= len(request.body)
            path = getattr(scope.get("route"), "path", "other")
            self._service.metrics.requests.labels(path, str(request.status)).inc()

    async def _answer(self, request: "_Request") -> None:
        sentence = f"the request took longer than the {self._limits.timeout_s:g} s that are allowed"
        try:
            with anyio.fail_after(self._limits.timeout_s) as limit:
                request.on_part = partial(self._on_part, request, limit)
                try:
                    self._check(request)
                    await self._read(request)
                    await self._pass_on(request)
                    return
                except RequestError as error:
                    with anyio.move_on_after(DRAIN_S):
                        await request.drain(DRAINED_BODIES * self._limits.max_body_bytes)
                    response = refusal(error.status, error.sentence)
        except TimeoutError:
            response = refusal(408, sentence)
        except _Gone:
            raise
        except Exception as error:
            full = refusal_of_gpu(error)  # the next request may find room
            log.exception("%s %s failed", request.scope["method"], request.scope["path"])
            response = refusal(503 if full else 500, full or "the server failed; its log says why")
        if not request.status:
            await response(request.scope, request.replay, request.send)

    def _check(self, request: "_Request") -> None:
        """Raises `RequestError` for what can be refused before the body is read."""
        if request.scope["path"] in OPEN_PATHS:
            return
        headers = dict(request.scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token)
        if self._token and not known:
            raise RequestError(401, "authorization: a bearer token is needed, and this is not it")
        if not self._token:
            self._check_host(request.scope, headers.get(b"host", b"").decode("latin-1"))
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.max_body_bytes:
            raise self._too_large()

    def _check_host(self, scope: Scope, host: str) -> None:
        """Raises `RequestError` where a page of another site has its name point to this machine, to
        read what only this machine's own user may (DNS rebinding)."""
        server = scope.get("server")
        if not server or not _is_loopback(server[0]):
            return
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name == "localhost" or name in self._names:
                return
            ipaddress.ip_address(name)
        except ValueError:
            raise RequestError(
                403,
                f"host: {host[:80]!r}; allowed without --token-file are localhost, addresses, and "
                "the hosts of --cors",
            ) from None

    async def _pass_on(self, request: "_Request") -> None:
        """Raises `RequestError` where too many are under way; a request that is still being sent
        is not, or slow senders would take all places."""
        full = self._service.num_in_flight >= self._limits.max_queue
        if full and request.scope["path"] not in OPEN_PATHS:
            raise RequestError(429, "too many requests are waiting; try again in a second")
        request.places = 1
        self._service.num_in_flight += request.places
        try:
            await self.app(request.scope, request.replay, request.send)
        finally:
            self._service.num_in_flight -= request.places

    def _on_part(self, request: "_Request", limit: anyio.CancelScope) -> None:
        """An answer in parts, a download, has the whole time for each, and takes nobody's place."""
        limit.deadline = anyio.current_time() + self._limits.timeout_s
        self._service.num_in_flight -= request.places
        request.places = 0

    def _too_large(self) -> RequestError:
        allowed = f"{self._limits.max_body_mib:g} MiB"
        return RequestError(413, f"the body is too large; allowed are {allowed}")

    async def _read(self, request: "_Request") -> None:
        """The whole body. Raises `RequestError` where it, or all bodies held, are too large."""
        while not request.ended:
            chunk = await request.receive()
            request.body += chunk
            self._held_bytes += len(chunk)
            if len(request.body) > self._limits.max_body_bytes:
                raise self._too_large()
            if self._held_bytes > HELD_BODIES * self._limits.max_body_bytes:
                raise RequestError(429, "too many large requests at once; try again in a second")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class _Gone(Exception):  # noqa: N818
    """The client hung up before it had sent its request."""


class _Request:
    """One request's ASGI channels, and what went over them."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.status = 0  # of the answer, 0 before it begins
        self.body = bytearray()
        self.ended = False  # the body
        self.places = 0  # of those in flight
        self.on_part: Callable[[], None] = lambda: None  # before a part of an answer that goes on
        self._receive, self._send = receive, send
        self._replayed = False

    async def receive(self) -> bytes:
        """The next part of the body."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        self.ended = not message.get("more_body", False)
        return message.get("body", b"")

    async def replay(self) -> Message:
        """The body in one piece, then what comes after it."""
        if self._replayed:
            return await self._receive()
        self._replayed = True
        return {"type": "http.request", "body": bytes(self.body), "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message.get("more_body"):
            self.on_part()
        await self._send(message)

    async def drain(self, max_bytes: int) -> None:
        """Read the rest of the body, so that the client reads the refusal; see `DRAINED_BODIES`."""
        while not self.ended and max_bytes > 0:
            max_bytes -= len(await self.receive())
