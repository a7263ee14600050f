"""A real server in a thread, and a plain client for it."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.search.searcher import Searcher
from retrieval.server.app import build_app
from retrieval.server.config import Limits
from retrieval.server.http_server import HttpServer
from retrieval.server.monitoring import Metrics
from retrieval.server.service import Service


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A server that runs."""

    service: Service
    server: HttpServer
    port: int

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self._ask("GET", path, None, dict(headers or {}))

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask("POST", path, data, dict(headers or {}))

    def form(self, path: str, **fields: Any) -> Answer:
        """Bytes are sent as files, anything else as JSON or text."""
        parts = []
        for name, value in fields.items():
            file = '; filename="picture"' if isinstance(value, bytes) else ""
            text = value if isinstance(value, str) else json.dumps(value) if not file else ""
            head = f'--frontier\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
            parts.append(head.encode() + (value if file else text.encode()) + b"\r\n")
        body = b"".join(parts) + b"--frontier--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=frontier"}
        return self._ask("POST", path, body, headers)

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, data)
        finally:
            connection.close()


@contextmanager
def serving(
    searchers: Mapping[str, Searcher],
    class_sets: Mapping[str, ZeroShotClassifier] | None = None,
    limits: Limits | None = None,
    image_urls: bool = False,
    **app: Any,
) -> Iterator[Served]:
    """A server on a free port of this machine. app: further arguments of `build_app`."""
    service = Service(searchers, class_sets or {}, limits or Limits(), Metrics(), image_urls)
    listening = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(build_app(service, **app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.02)
        yield Served(service, server, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(40)
        listening.close()
        assert not thread.is_alive()
