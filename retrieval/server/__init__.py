"""The HTTP service: clip-retrieval's endpoints, /v1, and the page."""

from retrieval.server.app import build_app
from retrieval.server.limits import Limits
from retrieval.server.run import ServeConfig, Server, load_service, serve
from retrieval.server.service import Service

__all__ = ["Limits", "ServeConfig", "Server", "Service", "build_app", "load_service", "serve"]
