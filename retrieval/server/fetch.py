"""Fetch an image from public addresses only.

Every hop is resolved once, every address of its name must be public, and the connection goes to the
address that was checked, whatever the name resolves to a moment later (DNS rebinding).
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import closing, suppress
from urllib.parse import urljoin, urlsplit

from retrieval.server.refusals import RequestError

MAX_HOPS = 4
CONNECT_S = 5.0
REDIRECTS = (301, 302, 303, 307, 308)
# Not public, though some Python versions call them global. NAT64 is judged by the address within.
PRIVATE = [
    ipaddress.ip_network(net)
    for net in ("0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15",
                "64:ff9b:1::/48", "fec0::/10", "2001::/23")
]  # fmt: skip
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, max_bytes: int, timeout_s: float) -> bytes:
    """The body at a URL. Raises `RequestError` for anything but a public http or https address
    that answers 200 in time with at most max_bytes."""
    deadline = time.monotonic() + timeout_s
    for _ in range(MAX_HOPS):
        status, location, body = _one_hop(url, max_bytes, deadline)
        if status == 200:
            return body
        if status not in REDIRECTS or not location:
            raise RequestError(400, f"image_url: the server answered {status}, 200 is needed")
        url = urljoin(url, location)
    raise RequestError(400, f"image_url: more than {MAX_HOPS - 1} redirects")


def _one_hop(url: str, max_bytes: int, deadline: float) -> tuple[int, str, bytes]:
    """(status, Location, body)."""
    scheme, host, port, target = _parse(url)
    address = _resolve(host, port)
    left = deadline - time.monotonic()
    connection = _Pinned(host, port, address, min(CONNECT_S, max(left, 0.1)), scheme == "https")
    timer = threading.Timer(max(left, 0.1), connection.cut)  # also ends an answer that trickles in
    timer.daemon = True
    timer.start()
    try:
        connection.request("GET", target, headers={"User-Agent": "flexilit", "Accept": "image/*"})
        with closing(connection.getresponse()) as answer:
            body = answer.read(max_bytes + 1) if answer.status == 200 else b""
        if time.monotonic() >= deadline:  # without Content-Length a cut-off body looks whole
            raise TimeoutError
        if len(body) > max_bytes:
            raise RequestError(400, f"image_url: more than the {max_bytes} bytes that are allowed")
        return answer.status, answer.getheader("Location") or "", body
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RequestError(400, "image_url: cannot be fetched from there") from error
    finally:
        timer.cancel()
        connection.close()


def _parse(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path and query)."""
    try:
        if not all("!" <= char <= "~" for char in url):
            raise ValueError
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if parts.scheme not in ("http", "https"):
            raise RequestError(400, f"image_url: {parts.scheme[:20]!r}; allowed: http, https")
        if not host or "%" in host or "@" in parts.netloc:
            raise ValueError
    except ValueError:
        raise RequestError(400, f"image_url: {url[:80]!r} is no URL") from None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80), target


def _resolve(host: str, port: int) -> str:
    """An address of the host, all of whose addresses are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RequestError(400, f"image_url: {host[:80]!r} is not known") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise RequestError(400, f"image_url: {host[:80]!r} is no public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is public; of a tunnel or mapping, the address within counts."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a zone, so link-local
        return False
    if ip.version == 6:
        inside = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(str(inside))
    if any(ip.version == net.version and ip in net for net in PRIVATE):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Pinned(http.client.HTTPConnection):
    """A connection to a checked address; the host's name stays in its headers and in TLS."""

    def __init__(self, host: str, port: int, address: str, timeout_s: float, tls: bool) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._address, self._tls = address, tls
        self._opened: socket.socket | None = None  # http.client forgets it while it reads
        if tls:
            self.default_port = 443

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        self._opened = self.sock

    def cut(self) -> None:
        """End whatever the connection waits for."""
        if self._opened is not None:
            with suppress(OSError):
                self._opened.shutdown(socket.SHUT_RDWR)
