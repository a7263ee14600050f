"""The web application: /v1, clip-retrieval's endpoints, health, the page, and the guard."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from data.errors import UsageError
from retrieval.index_interface import IndexUnavailable
from retrieval.server.api import clip_retrieval, contents, stored_images, v1
from retrieval.server.api.route import ModelRoute
from retrieval.server.guard import Guard
from retrieval.server.page import PAGE, PAGE_HEADERS
from retrieval.server.refusals import RequestError, refusal
from retrieval.server.service import Service


def build_app(service: Service, token: str = "", cors: Sequence[str] = ()) -> FastAPI:
    """The application of a service. token: what requests must bring, "" for none. cors: origins
    whose pages may read answers."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch())
        service.ready = True
        yield
        service.ready = False
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        service.close()

    # Swagger's page would be loaded from another site.
    app = FastAPI(
        title="FlexiLiT", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    _add_refusals(app)
    app.include_router(clip_retrieval.routes(service))
    for api in (v1, contents, stored_images):
        app.include_router(api.routes(service))
    app.include_router(_health(service))
    _add_page(app)
    app.add_middleware(Guard, service=service, token=token, cors=cors)
    if cors:
        methods, headers = ["GET", "POST"], ["authorization", "content-type"]
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=methods, allow_headers=headers
        )
    return app


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return refusal(error.status, error.sentence)

    @app.exception_handler(UsageError)
    async def refuse_value(request: Request, error: UsageError) -> Response:
        return refusal(400, str(error))

    @app.exception_handler(IndexUnavailable)
    async def refuse_for_now(request: Request, error: IndexUnavailable) -> Response:
        return refusal(503, str(error))

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return refusal(
            400, f"{first['loc'][-1]}: {str(first['msg'])[:1].lower()}{first['msg'][1:]}"
        )

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return refusal(404, "no such path; /openapi.json names those there are")
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            return refusal(405, f"{request.method} is not for this path; allowed: {allowed}")
        return refusal(error.status_code, str(error.detail))


def _health(service: Service) -> APIRouter:
    router = APIRouter(route_class=ModelRoute)

    @router.get("/healthz", summary="Whether the process answers")
    async def healthz() -> str:
        return "ok"

    @router.get("/readyz", summary="Whether it takes searches")
    async def readyz() -> Response:
        answer, status = ("ready", 200) if service.ready else ("stopping", 503)
        return JSONResponse(answer, status)

    return router


def _add_page(app: FastAPI) -> None:
    for path, (media_type, data) in PAGE.items():
        app.add_api_route(path, _file(media_type, data), include_in_schema=False)


def _file(media_type: str, data: bytes) -> Any:
    async def answer() -> Response:
        return Response(data, headers=PAGE_HEADERS, media_type=media_type)

    return answer
