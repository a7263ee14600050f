"""The page before the service: a browser has it while models and indexes are still being loaded.

Requests for anything else wait. Nothing of them is read here, so their connections can be handed to
the server as they are.
"""

import contextlib
import selectors
import socket
import threading

from retrieval.server.page import PAGE, PAGE_HEADERS

MAX_WAITING = 64  # connections
MAX_HEAD = 16 << 10  # bytes


class EarlyPage:
    """Answers for the page's files on a listening socket, from a thread, until `stop`."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._waiting: list[socket.socket] = []
        self._woken, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="early page", daemon=True)
        self._thread.start()

    def stop(self) -> list[socket.socket]:
        """Leave the listening socket alone. Returns the connections that wait for a server."""
        if self._thread.is_alive():
            self._wake.send(b"!")
            self._thread.join()
            self._woken.close()
            self._wake.close()
        waiting, self._waiting = self._waiting, []
        return waiting

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listening, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            silent: set[socket.socket] = set()  # a browser may connect before it asks
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    self._waiting += silent
                    return
                for found in ready:
                    assert isinstance(found, socket.socket)
                    if found is not self._listening:
                        selector.unregister(found)
                        silent.discard(found)
                        self._answer(found)
                    elif connection := self._accept(len(silent)):
                        selector.register(connection, selectors.EVENT_READ)
                        silent.add(connection)

    def _accept(self, num_silent: int) -> socket.socket | None:
        with contextlib.suppress(OSError):
            connection, _ = self._listening.accept()
            if num_silent + len(self._waiting) < MAX_WAITING:
                connection.setblocking(False)
                return connection
            connection.close()
        return None

    def _answer(self, connection: socket.socket) -> None:
        """Send a file of the page, or let the connection wait."""
        try:
            head = connection.recv(MAX_HEAD, socket.MSG_PEEK)
            method, _, rest = head.partition(b" ")
            path = rest.partition(b" ")[0].partition(b"?")[0].decode("latin-1")
            if not head:
                connection.close()
            elif method == b"GET" and path in PAGE and b"\r\n\r\n" in head:
                connection.recv(head.index(b"\r\n\r\n") + 4)
                connection.settimeout(5)
                connection.sendall(_response(*PAGE[path]))
                connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            else:
                self._waiting.append(connection)
        except OSError:
            connection.close()


def _response(media_type: str, data: bytes) -> bytes:
    headers = {
        "Content-Type": media_type,
        "Content-Length": str(len(data)),
        "Connection": "close",
        **PAGE_HEADERS,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode() + data
