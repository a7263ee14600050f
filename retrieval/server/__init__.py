"""The HTTP service: /v1, clip-retrieval's endpoints, and the page. Searches through
`retrieval.search`; how a search works is decided there.

The names load on first use, so that reading the configuration loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval.server.app import build_app
    from retrieval.server.config import Limits, ServeConfig
    from retrieval.server.http_server import HttpServer
    from retrieval.server.loading import load_service
    from retrieval.server.service import Service
    from retrieval.server.startup import serve

_MODULES = {
    "HttpServer": "http_server",
    "Limits": "config",
    "ServeConfig": "config",
    "Service": "service",
    "build_app": "app",
    "load_service": "loading",
    "serve": "startup",
}

__all__ = [
    "HttpServer",
    "Limits",
    "ServeConfig",
    "Service",
    "build_app",
    "load_service",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
