"""The HTTP service: clip-retrieval's endpoints, /v1, and the page."""

from retrieval.server.app import build_app
from retrieval.server.refusals import Limits
from retrieval.server.service import Service
from retrieval.server.startup import ServeConfig, Server, load_service, serve

__all__ = ["Limits", "ServeConfig", "Server", "Service", "build_app", "load_service", "serve"]
