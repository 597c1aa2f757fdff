"""The routes: `/v1/restore`, `/v1/model`, `/healthz`, `/readyz`, `/metrics`, the page at `/`, `/docs`."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines.serve import openapi, options
from pipelines.serve.bodies import check_content_type, image_in
from pipelines.serve.guard import App, Guard
from pipelines.serve.refusals import Refusal
from pipelines.serve.service import Result, Service

log = logging.getLogger(__name__)

_PAGE = Path(__file__).parent / "page"
_MEDIA_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
                ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}  # fmt: skip
_NO_STORE = {"Cache-Control": "no-store"}
_CLIENT_LEFT = 499  # nginx's number; nobody is there to read it


def page_files() -> dict[str, bytes]:
    """The page's files by name; nodes of a cluster are sent them with the replica."""
    return {file.name: file.read_bytes() for file in _PAGE.iterdir() if file.suffix in _MEDIA_TYPES}


def make_app(service: Service, page: Mapping[str, bytes]) -> App:
    """The whole application, with its guard.

    Args:
        service: what restores.
        page: `page_files()`.
    """
    try:
        number = version("nafnet-ray")
    except PackageNotFoundError:  # a checkout, or code that was sent to a node
        number = "0"
    app = FastAPI(
        title="nafnet serve", version=number, docs_url=None, redoc_url=None,
        description="Deblurs photos. Errors are JSON: problem, expected, got, fix. Where a token is wanted: "
        "Authorization: Bearer TOKEN.",
    )  # fmt: skip
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _fault)
    _add_routes(app, service)
    _add_states(app, service)
    _add_page(app, page)
    return Guard(app, service.settings, on_refused=service.metrics.answered)


def _add_routes(app: FastAPI, service: Service) -> None:
    image = openapi.IMAGE
    form = {"schema": {"type": "object", "properties": {"image": image["schema"]}, "required": ["image"]}}

    @app.post(
        "/v1/restore",
        summary="Deblur one image",
        response_class=Response,
        responses=openapi.restore_responses(),
        openapi_extra={
            "parameters": options.PARAMETERS,
            "requestBody": {"required": True, "content": {"image/*": image, "multipart/form-data": form}},
        },
    )
    async def restore(request: Request) -> Response:
        """The image as the body, or as the one file of a form. EXIF and ICC stay, pixels come out upright."""
        try:
            response = await _restore(request, service)
        except Refusal as refusal:
            service.metrics.answered(refusal.status)
            raise
        except ClientDisconnect:
            service.metrics.answered(_CLIENT_LEFT)
            return Response(status_code=_CLIENT_LEFT)
        except Exception:
            service.metrics.answered(500)
            raise
        service.metrics.answered(200)
        return response

    @app.get(
        "/v1/model",
        summary="Which model answers, how it is run, and the limits",
        responses=openapi.model_responses(),
    )
    async def model() -> JSONResponse:
        settings, served = service.settings, service.network.served
        run_with = served.restorer.settings
        return JSONResponse(
            {
                "model": _told_of(service),
                "pinned": {
                    "backend": served.restorer.loaded.backend,
                    "precision": served.restorer.precision,
                    "tile_px": run_with.tile_px,
                    "tile_batch": run_with.tile_batch,
                    "local_statistics_px": served.restorer.loaded.train_patch_px,
                    "device": served.restorer.device.type,
                },
                "limits": {
                    "max_mib": settings.max_mib,
                    "max_megapixels": settings.max_megapixels,
                    "timeout_s": settings.timeout_s,
                    "max_queue": settings.max_queue,
                },
            },
            headers=_NO_STORE,
        )


async def _restore(request: Request, service: Service) -> Response:
    wanted = options.parse(request.query_params.multi_items())
    content_type = request.headers.get("content-type", "")
    check_content_type(content_type)
    async with service.place() as place:
        body = await service.read(request.stream(), place)
        content = image_in(body, content_type)
        del body
        begin = time.perf_counter()
        result = await service.restore(content, wanted)
        return Response(
            result.download.content,
            media_type=result.download.media_type,
            headers=_headers(result, time.perf_counter() - begin),
        )


def _headers(result: Result, seconds: float) -> dict[str, str]:
    answer, done = result.answer, result.answer.restoration
    shift = ",".join(f"{value:.2f}" for value in result.download.colour_shift)
    label = answer.served.label.encode("ascii", "replace").decode()
    notes = {"X-NAFNet-Notes": "; ".join(result.download.notes)} if result.download.notes else {}
    timings = (("queue", result.queue_s), ("network", answer.network_s), ("total", seconds))
    return {
        **_NO_STORE,
        "X-NAFNet-Model": "".join(char for char in label if char.isprintable()),
        "X-NAFNet-Version": answer.served.version or "",
        "X-NAFNet-Digest": answer.served.digest,
        "X-NAFNet-Network-Seconds": f"{answer.network_s:.4f}",
        "X-NAFNet-Queue-Seconds": f"{result.queue_s:.4f}",
        "X-NAFNet-Tiles": str(done.num_tiles),
        "X-NAFNet-Tiles-Redone": str(done.num_redone),
        "X-NAFNet-Tiles-Kept": str(done.num_kept),
        "X-NAFNet-Colour-Shift": shift,
        **notes,
        "Server-Timing": ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in timings),
    }


def _add_states(app: FastAPI, service: Service) -> None:
    # HEAD, which monitors ask for, would be 405 else.
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Whether the process lives", responses=openapi.health_responses())
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "alive"}, headers=_NO_STORE)

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz",
        summary="Whether requests are answered, and what became of the last promotion",
        responses=openapi.ready_responses(),
    )
    async def readyz() -> JSONResponse:
        is_ready, refused = service.network.is_alive, service.follower.refused
        content = {
            "status": "ready" if is_ready else "not ready",
            "model": _told_of(service),
            "open": service.num_open,
            "refused": refused and {"version": refused[0], "reason": refused[1]},
            "registry": service.follower.silent_because or "answers",
        }
        return JSONResponse(content, status_code=200 if is_ready else 503, headers=_NO_STORE)

    @app.get(
        "/metrics",
        summary="For Prometheus",
        response_class=Response,
        responses=openapi.metrics_responses(),
    )
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4", headers=_NO_STORE)


def _told_of(service: Service) -> dict[str, str | None]:
    served = service.network.served
    return {
        "label": served.label,
        "version": served.version,
        "digest": served.digest,
        "backend": served.restorer.loaded.backend,
    }


def _add_page(app: FastAPI, page: Mapping[str, bytes]) -> None:
    """Files out of memory, each under its own name: no path of a client's is looked up."""

    def answering(name: str) -> Callable[[], Awaitable[Response]]:
        async def file() -> Response:
            kind = _MEDIA_TYPES[name[name.rfind(".") :]]
            return Response(page[name], media_type=kind, headers={"Cache-Control": "no-cache"})

        return file

    places = {"/": "index.html", "/docs": "docs.html"}
    places |= {f"/{name}": name for name in page if not name.endswith(".html")}
    for place, name in places.items():
        app.add_api_route(place, answering(name), methods=["GET", "HEAD"], include_in_schema=False)


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return JSONResponse(error.content, error.status, headers={**_NO_STORE, **error.headers})


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    told = {404: "no such page", 405: "not a method of this page"}.get(error.status_code, str(error.detail))
    refusal = Refusal(error.status_code, told, got=f"{request.method} {request.url.path}", fix="See /docs",
                      headers=error.headers)  # fmt: skip
    return await _refuse(request, refusal)


async def _fault(request: Request, error: Exception) -> JSONResponse:
    return await _refuse(request, Refusal(500, "a fault of the service's own", fix="Its log says more"))
