"""The router's routes beside generations: tokens, models, health and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response

from router.bodies import parsed_body
from router.error_handlers import json_response
from router.errors import Refused
from router.metrics import CONTENT_TYPE
from router.openapi import openapi_document
from router.responses import Model, ModelList
from router.schema import DetokenizeBody, TokenizeBody
from router.translation import model_not_found

if TYPE_CHECKING:
    from router.app import RouterService


def add_information_routes(app: FastAPI, service: RouterService) -> None:
    """Serve everything but generations."""
    model = Model(service.config.model, service.created_s)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        service.identify(request)
        body = parsed_body(await service.read(request), TokenizeBody)
        return json_response(200, await service.tokenization.tokenize(body))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        service.identify(request)
        body = parsed_body(await service.read(request), DetokenizeBody)
        return json_response(200, await service.tokenization.detokenize(body))

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        service.identify(request)
        return json_response(200, ModelList((model,)))

    @app.get("/v1/models/{model_id:path}")
    async def get_model(request: Request, model_id: str) -> Response:
        service.identify(request)
        if model_id != model.id:
            raise model_not_found(model_id, served=model.id)
        return json_response(200, model)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        service.identify(request)
        raise Refused(
            "this server generates text only and makes no embeddings; use /v1/chat/completions or "
            "/v1/completions, and another server for embeddings",
            status=404,
            code="unsupported_route",
        )

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return json_response(200, openapi_document())

    @app.get("/health")
    async def health() -> Response:
        obstacles = service.pool.obstacles(service.clock.now_s())
        nodes = {endpoint_id: obstacle or "ready" for endpoint_id, obstacle in obstacles.items()}
        is_ready = None in obstacles.values()
        status = "ready" if is_ready else "no node can take requests now"
        return json_response(200 if is_ready else 503, {"status": status, "nodes": nodes})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await service.all_metrics(), media_type=CONTENT_TYPE)
