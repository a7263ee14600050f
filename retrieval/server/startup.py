"""From the command line to a running server. What can be checked without torch is checked first,
within a second; models and indexes are loaded after that."""

import contextlib
import gc
import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.class_names import read_class_names
from data.errors import UsageError
from retrieval.detail import said
from retrieval.model_folder import check_model_folder
from retrieval.server.config import ServeConfig

if TYPE_CHECKING:
    from retrieval.server.http_server import TakeOver
    from retrieval.server.service import Service

BACKLOG = 2048  # connections that wait to be accepted


def serve(cfg: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are answered first.

    Raises `UsageError` for a port that is taken, and for an index that cannot be opened or is of
    another model. Damage within its files is found while it is served (`ServedIndex.check_files`).
    """
    token = _read_token(cfg)
    check_folders(cfg)
    listening = listen(cfg.host, cfg.port)
    with contextlib.closing(listening):
        from retrieval.server.loading import load_service

        service = load_service(cfg)
        listening.listen(BACKLOG)  # connections wait here until the first accept
        host, port = listening.getsockname()[:2]
        for name, index in service.indexes.items():
            sizes = said(*index.searcher.patch_sizes)
            print(f"{name}: {len(index.searcher):,} images at {sizes}", flush=True)
            for size in index.searcher.patch_sizes:
                if warning := index.searcher.warning(size):
                    print(f"{name}: {warning}", file=sys.stderr, flush=True)
        if not token and not ipaddress.ip_address(host).is_loopback:
            print(f"anyone who reaches {host} may search; --token-file asks for a token",
                  file=sys.stderr, flush=True)  # fmt: skip
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        run_service(service, listening, token, cfg.cors)


def run_service(
    service: "Service",
    listening: socket.socket,
    token: str = "",
    cors: Sequence[str] = (),
    take_over: "TakeOver" = list,
) -> None:
    """Answer requests until SIGTERM or SIGINT. token, cors: see `build_app`. take_over: see
    `HttpServer`."""
    from retrieval.server.app import build_app
    from retrieval.server.http_server import HttpServer

    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # every broken form warns
    app = build_app(service, token, cors)
    gc.collect()
    gc.freeze()  # models and indexes are never garbage: each full collection took 0.25 s
    try:
        HttpServer(app, take_over).run(sockets=[listening])
    finally:
        gc.unfreeze()


def check_folders(cfg: ServeConfig) -> None:
    """Raises `UsageError` for an index, a model or a class set that is plainly not there."""
    from retrieval.index_places import find_place

    cfg.index_names()
    for folder in cfg.index:
        find_place(folder).manifest()
    if cfg.model is not None:
        check_model_folder(cfg.model)
    if len({Path(file).stem for file in cfg.classes}) < len(cfg.classes):
        raise UsageError(f"classes: two of one name ({', '.join(cfg.classes)}); rename one")
    for file in cfg.classes:
        if not Path(file).is_dir():
            read_class_names(file)


def _read_token(cfg: ServeConfig) -> str:
    if not cfg.token_file:
        return ""
    try:
        token = Path(cfg.token_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"token_file {cfg.token_file}: cannot be read ({error})") from error
    if not token or not token.isascii() or any(c.isspace() for c in token):
        raise UsageError(f"token_file {cfg.token_file}: must hold one word of ASCII")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket with that address. Raises `UsageError` where it cannot be had."""
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port}: allowed: 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen on {host} port {port}: {reason}") from error
    return listening
