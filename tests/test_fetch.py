"""image_url: what is public is fetched, nothing else is, whatever it is called."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from retrieval.server import fetch as module
from retrieval.server.fetch import fetch, is_public
from retrieval.server.refusals import RequestError


class Site(http.server.BaseHTTPRequestHandler):
    """/ok, /to/URL (redirects), /large, /slow, /dripping, /missing."""

    seen: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        Site.seen.append(f"{self.headers['Host']}{self.path}")
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        if self.path == "/ok":
            self.wfile.write(b"picture")
        if self.path == "/large":
            self.wfile.write(b"x" * 5000)
        if self.path == "/dripping":
            for _ in range(40):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[int]:
    """The port of a web server on this machine."""
    Site.seen.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.handle_error = lambda *a: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Host -> what each look-up of it gives, the last one again and again. 198.51.100.7 stands for
    a public address and is this machine; what else is public is judged by `is_public`."""
    known: dict[str, list[list[str]]] = {}

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        answers = known.get(host)
        found = [host] if answers is None else answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]

    def to_this_machine(address: tuple[str, int], timeout: float) -> socket.socket:
        assert address[0] == "198.51.100.7"  # the address that was checked, no name
        sock = socket.socket()
        sock.settimeout(timeout)
        try:
            sock.connect(("127.0.0.1", address[1]))
        except OSError:
            sock.close()
            raise
        return sock

    monkeypatch.setattr(module.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(module.socket, "create_connection", to_this_machine)
    monkeypatch.setattr(module, "is_public", lambda ip: ip == "198.51.100.7" or is_public(ip))
    return known


PUBLIC = [["198.51.100.7"]]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255",
        "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1",
        "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
        "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b:1::1", "2002:7f00:1::1", "2002:a00:1::", "fec0::1", "2001::1", "",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


def test_a_public_picture_is_fetched_through_redirects(
    site: int, names: dict[str, list[list[str]]]
) -> None:
    names |= {"a.example": PUBLIC, "b.example": PUBLIC}
    url = f"http://a.example:{site}/to/http://b.example:{site}/to/ok"
    # the second redirect is relative: /ok of b.example
    url = url.replace("/to/ok", "/to//ok")
    assert fetch(url, 1000, 5.0) == b"picture"
    assert Site.seen[-1] == f"b.example:{site}/ok"


def refused(url: str, words: str, max_bytes: int = 1000, timeout_s: float = 5.0) -> None:
    with pytest.raises(RequestError, match=words) as error:
        fetch(url, max_bytes, timeout_s)
    assert error.value.status == 400
    assert error.value.sentence.startswith("image_url: ")


def test_names_of_private_addresses_are_refused(
    site: int, names: dict[str, list[list[str]]]
) -> None:
    names |= {
        "inside.example": [["10.0.0.5"]],
        "half.example": [["198.51.100.7", "127.0.0.1"]],
        "mapped.example": [["::ffff:127.0.0.1"]],
        "2130706433": [["127.0.0.1"]],
        "nowhere.example": [[]],
    }
    for host in ("inside.example", "half.example", "mapped.example", "2130706433", "127.0.0.1",
                 "[::1]", "169.254.169.254", "nowhere.example"):  # fmt: skip
        refused(f"http://{host}:{site}/ok", "no public address")
    assert not Site.seen


def test_a_redirect_to_a_private_address_is_refused(
    site: int, names: dict[str, list[list[str]]]
) -> None:
    names["a.example"] = PUBLIC
    for target in (
        f"http://127.0.0.1:{site}/ok",
        "http://169.254.169.254/",
        f"//localhost:{site}/ok",
    ):
        names["localhost"] = [["127.0.0.1"]]
        refused(f"http://a.example:{site}/to/{target}", "no public address")
    assert all(path.split("/")[1] == "to" for path in Site.seen)
    refused(f"http://a.example:{site}/to/file:///etc/passwd", "allowed: http, https")


def test_a_name_is_resolved_once_per_hop_and_that_address_is_used(
    site: int, names: dict[str, list[list[str]]]
) -> None:
    # A second look-up would give a private address: the connection does not ask again.
    names["rebinding.example"] = [["198.51.100.7"], ["127.0.0.1"]]
    assert fetch(f"http://rebinding.example:{site}/ok", 1000, 5.0) == b"picture"
    # The next hop asks again, and is refused.
    refused(f"http://rebinding.example:{site}/ok", "no public address")
    names["rebinding.example"] = [["198.51.100.7"], ["127.0.0.1"]]
    refused(f"http://rebinding.example:{site}/to//ok", "no public address")


def test_other_schemes_and_broken_addresses_are_refused() -> None:
    for url in ("file:///etc/passwd", "ftp://a.example/x", "gopher://a.example/x"):
        refused(url, "allowed: http, https|is no URL")
    for url in ("", "http://", "nothing", "http://a b/", "http://user@a.example/", "http://[::1",
                "http://a.example:99999/", "http://a.example/\r\nX: y",
                "http://[fe80::1%25eth0]/"):  # fmt: skip
        refused(url, "is no URL|allowed: http")


def test_large_slow_missing_and_endless_answers_are_refused(
    site: int, names: dict[str, list[list[str]]]
) -> None:
    names["a.example"] = PUBLIC
    refused(f"http://a.example:{site}/large", "more than the 1000 bytes")
    refused(f"http://a.example:{site}/missing", "answered 404")
    loop = f"http://a.example:{site}/to/" * 6 + "ok"
    refused(loop, "redirects")
    start = time.monotonic()
    refused(f"http://a.example:{site}/dripping", "cannot be fetched", timeout_s=0.5)
    assert time.monotonic() - start < 3
    with socket.socket() as silent:  # takes no connection
        silent.bind(("127.0.0.1", 0))
        refused(f"http://a.example:{silent.getsockname()[1]}/", "cannot be fetched")
