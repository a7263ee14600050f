"""From folders to a running server."""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from contrastive.model.lit import LitModel
from data.class_names import DEFAULT_TEMPLATES, read_class_names
from data.errors import UsageError
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.index.config import Device
from retrieval.search.searcher import Searcher
from retrieval.server.app import build_app
from retrieval.server.limits import Limits
from retrieval.server.monitoring import Metrics
from retrieval.server.service import Service

GRACE_S = 30  # for requests under way when the server is told to stop


@dataclass(frozen=True)
class ServeConfig:
    """One server."""

    index: tuple[str, ...]
    """Folders of indexes; each is named as its folder, the first is the default."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 1234
    """0 takes a free one."""
    model: str | None = None
    """A model with the indexes' image tower, instead of those kept in them."""
    classes: tuple[str, ...] = ()
    """Class sets for /v1/classify: files with a name per line, or folders that
    `ZeroShotClassifier.save` wrote; each is named as its file."""
    token_file: str = ""
    """File with the bearer token that requests must bring."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may read answers, such as http://localhost:8080."""
    image_urls: bool = False
    """Fetch the image_url of requests, from public addresses alone."""
    device: Device = "auto"
    """Where to search and encode."""
    limits: Limits = field(default_factory=Limits)


def serve(cfg: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are answered first.

    Raises `UsageError` for a port that is taken, and for an index that is damaged, of another model
    or missing files.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # every broken form warns
    token = _read_token(cfg)
    listening = _listen(cfg.host, cfg.port)
    with contextlib.closing(listening):
        service = load_service(cfg)
        app = build_app(service, token, cfg.cors)
        listening.listen(2048)  # who comes before the first accept waits
        host, port = listening.getsockname()[:2]
        for name, searcher in service.searchers.items():
            sizes = ", ".join(map(str, searcher.patch_sizes))
            print(f"{name}: {len(searcher):,} images at patch {sizes}", flush=True)
        if not token and not ipaddress.ip_address(host).is_loopback:
            print(f"anyone who reaches {host} may search; --token-file asks for a token",
                  file=sys.stderr, flush=True)  # fmt: skip
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        gc.collect()
        gc.freeze()  # what is loaded stays: to look through it took 0.25 s, again and again
        try:
            Server(app).run(sockets=[listening])
        finally:
            gc.unfreeze()


class Server(uvicorn.Server):
    """uvicorn, which ends with status 0 when it is told to stop."""

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


def load_service(cfg: ServeConfig) -> Service:
    """Open everything that a server needs. Raises `UsageError`."""
    names = [Path(folder).resolve().name for folder in cfg.index]
    if not names:
        raise UsageError("--index: at least one folder of an index is needed")
    if len(set(names)) < len(names):
        raise UsageError(f"--index: two folders of one name ({', '.join(names)}); rename one")
    models: list[LitModel] = []
    searchers: dict[str, Searcher] = {}
    for name, folder in zip(names, cfg.index, strict=True):
        searcher = Searcher.load(folder, cfg.model, cfg.device)
        searcher.snapshot.check_contents()
        for model in models:  # of equal models one is kept, and their requests share forwards
            if _same(model, searcher.model):
                searcher = Searcher.load(folder, model, cfg.device)
        if searcher.model not in models:
            models.append(searcher.model)
        for size in searcher.model.patch_sizes:  # what a request would else wait for
            searcher.profile.gflops(size)
        searcher.profile.ms(searcher.model.patch_sizes)
        searcher.model.encode_text(["warm"])
        searchers[name] = searcher
    class_sets = {Path(file).stem: _load_classes(Path(file), models[0]) for file in cfg.classes}
    if len(class_sets) < len(cfg.classes):
        raise UsageError(f"--classes: two of one name ({', '.join(cfg.classes)}); rename one")
    return Service(searchers, class_sets, cfg.limits, Metrics(), cfg.image_urls)


def _same(one: LitModel, other: LitModel) -> bool:
    return (one.image_fingerprint, one.text_fingerprint) == (
        other.image_fingerprint,
        other.text_fingerprint,
    )


def _load_classes(file: Path, model: LitModel) -> ZeroShotClassifier:
    if file.is_dir():
        return ZeroShotClassifier.load(file, model)
    return ZeroShotClassifier(model, read_class_names(file), DEFAULT_TEMPLATES)


def _read_token(cfg: ServeConfig) -> str:
    if not cfg.token_file:
        return ""
    try:
        token = Path(cfg.token_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token-file {cfg.token_file}: cannot be read ({error})") from error
    if not token or not token.isascii() or any(c.isspace() for c in token):
        raise UsageError(f"--token-file {cfg.token_file}: one word of ASCII is needed")
    return token


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: allowed: 0 to 65535")
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
