"""uvicorn, set up for this service."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator

import uvicorn

GRACE_S = 30  # for requests under way when the server is told to stop


class HttpServer(uvicorn.Server):
    """uvicorn that exits with status 0 on SIGTERM and SIGINT, after the requests under way."""

    def __init__(self, app: object) -> None:
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_level="warning", access_log=False, server_header=False, proxy_headers=False,
            ws="none", lifespan="on",
            timeout_graceful_shutdown=GRACE_S, timeout_keep_alive=15,
        )  # fmt: skip
        super().__init__(config)

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
