"""uvicorn, set up for this service, with limits on what comes before a request: its head's size and
time, and how many connections may be open."""

import asyncio
import contextlib
import functools
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from retrieval.server.refusals import Refusal

GRACE_S = 30  # for requests under way when the server is told to stop
HEAD_S = 15.0  # from a connection's start, or its last answer, to the end of the next head
MAX_HEAD_BYTES = 64 << 10
MAX_CONNECTIONS = 4096
SPARE_FILES = 200  # file descriptors for everything that is no connection
LINGER_S = 1.0  # a refused sender may go on so long, or it would not read why


TakeOver = Callable[[], Sequence[socket.socket]]


class HttpServer(uvicorn.Server):
    """uvicorn that exits with status 0 on SIGTERM and SIGINT, after the requests under way."""

    def __init__(self, app: object, take_over: TakeOver = list) -> None:
        """take_over: is called when requests can be answered, and gives connections that have
        waited for that."""
        most = max(SPARE_FILES, min(MAX_CONNECTIONS, raise_file_limit() - SPARE_FILES))
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_level="warning", access_log=False, server_header=False, proxy_headers=False,
            http=functools.partial(LimitedProtocol, {}, most),  # type: ignore[arg-type]
            ws="none", lifespan="on",
            timeout_graceful_shutdown=GRACE_S, timeout_keep_alive=15,
        )  # fmt: skip
        super().__init__(config)
        self._take_over = take_over

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        waiting = self._take_over()
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        for connection in waiting:
            with contextlib.suppress(OSError):  # gone meanwhile
                await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        """As `uvicorn.Server.startup` makes it."""
        make: Any = self.config.http_protocol_class
        return make(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        wanted = (signal.SIGTERM, signal.SIGINT)
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
            for number in wanted:
                loop.add_signal_handler(number, self.handle_exit, number, None)
        yield
        with contextlib.suppress(ValueError, RuntimeError):
            for number in wanted:
                loop.remove_signal_handler(number)


def raise_file_limit() -> int:
    """Allow this process as many open files as it may, up to twice `MAX_CONNECTIONS`; returns how
    many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class LimitedProtocol(HttpToolsProtocol):
    """A connection that is closed where no head comes in time, where one is too large, and, once
    there are too many connections, where it has waited longest."""

    def __init__(
        self, waiting: "dict[LimitedProtocol, None]", max_connections: int, **uvicorns: Any
    ) -> None:
        """waiting: the server's connections without a request, the oldest first."""
        super().__init__(**uvicorns)
        self._waiting, self._max_connections = waiting, max_connections
        self._unread = 0  # bytes since the last whole head, or part of a body
        self._timer: asyncio.TimerHandle | None = None
        self._refused = False

    # ---- uvicorn's events ------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self._max_connections:
            next(iter(self._waiting)).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the head is too large; allowed are {MAX_HEAD_BYTES >> 10} KiB")

    def on_headers_complete(self) -> None:
        self._unread = 0
        self._go_on()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:  # no further request is under way
            self._wait()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # closing would wait for a client that reads no answer

    # ---- limits ----------------------------------------------------------------------------

    def _wait(self) -> None:
        """A head must come."""
        self._go_on()
        self._waiting[self] = None
        self._timer = self.loop.call_later(HEAD_S, self._too_late)

    def _go_on(self) -> None:
        """It came, or will not."""
        self._waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        if self._unread:
            self._refuse(408, f"the head took longer than the {HEAD_S:g} s that are allowed")
        else:
            self.transport.abort()

    def _refuse(self, status: int, sentence: str) -> None:
        """Answer, and read nothing more."""
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # in the middle of another answer
            return
        body = Refusal(error=sentence).model_dump_json().encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(
            STATUS_LINE[status] + head.encode() + b"connection: close\r\n\r\n" + body
        )
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.abort)
