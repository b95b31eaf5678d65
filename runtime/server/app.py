"""The paths and what answers them, and the OpenAPI document."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from ... import __version__
from ...formats.errors import HotcoldError
from . import bodies, metrics, responses, schemas, shapes, small
from .answers import Stream, Whole
from .failures import APIError, as_api_error, unknown_model
from .gate import GONE, Gate
from .page import add_page
from .service import Service, report
from .work import while_wanted

M = TypeVar("M", bound=BaseModel)
_WORDS = {
    400: "The request is wrong", 401: "The API key is missing or wrong", 403: "Host or Origin may not call",
    404: "No such model", 405: "No such method here", 408: "The body did not come", 413: "The body is too large",
    429: "The queue is full", 500: "An error of the server", 503: "Loading, shutting down, or out of memory",
}  # fmt: skip
# the bodies of requests, and an example of each for the document
REQUESTS: dict[type[BaseModel], dict[str, Any]] = {
    schemas.ChatRequest: {"messages": [{"role": "user", "content": "What is a noun?"}], "max_tokens": 16},
    schemas.CompletionRequest: {"prompt": "Once upon a time", "max_tokens": 16},
    schemas.EmbeddingRequest: {"input": ["a noun", "a verb"]},
    schemas.ResponsesRequest: {"input": "What is a noun?", "max_output_tokens": 16},
    schemas.TokenizeRequest: {"content": "a noun"},
    schemas.DetokenizeRequest: {"tokens": [1, 2, 3]},
}


def make_app(service: Service) -> ASGIApp:
    """The server as an ASGI application."""
    app = FastAPI(title="hotcold", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for kind in (APIError, HotcoldError, MemoryError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    public = {"/health", "/openapi.json", *add_page(app)}
    _add_small(app, service)
    _add_answers(app, service)
    setattr(app, "openapi", lambda: _document(app, service))  # noqa: B010 (FastAPI's own way to replace it)
    known = {*public, *(route.path for route in app.routes if hasattr(route, "path"))}
    gate: ASGIApp = Gate(app, service, public, known)
    if service.settings.cors:
        gate = CORSMiddleware(
            gate, allow_origins=service.settings.cors, allow_methods=["*"], allow_headers=["*"], max_age=3600
        )
    return gate


async def _receive(service: Service, request: Request, schema: type[M]) -> tuple[M, dict[str, Any]]:
    """The checked body, unless the server stops before it is there."""
    return await while_wanted(bodies.receive(request, schema, service.settings.max_body, service.room), service.stops)


async def _answer(
    service: Service, request: Request, schema: type[schemas.ChatRequest] | type[schemas.CompletionRequest], opens: str
) -> Response:
    """The started reply to a request; opens: the name of LLM's method that makes it."""
    body, given = await _receive(service, request, schema)
    model, llm = service.pick(body.model)
    reply = await service.prepare(request.receive, llm, getattr(llm, opens), {**given, "model": model})
    reply.start()
    return (Stream if body.stream else Whole)(service, model, reply)


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", **_documented(schemas.ChatRequest, shapes.ChatCompletion, stream=True))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(service, request, schemas.ChatRequest, "open_chat")

    @app.post("/v1/completions", **_documented(schemas.CompletionRequest, shapes.Completion, stream=True))
    async def complete(request: Request) -> Response:
        """Continue a prompt."""
        return await _answer(service, request, schemas.CompletionRequest, "open_completion")

    @app.post("/v1/responses", **_documented(schemas.ResponsesRequest, shapes.Response, stream=True))
    async def respond(request: Request) -> Response:
        """Answer a conversation, in the newer form; nothing is kept between requests."""
        body, given = await _receive(service, request, schemas.ResponsesRequest)
        model, llm = service.pick(body.model)
        wanted = {**responses.chat_request(given), "model": model}
        if body.stream:
            wanted |= {"stream": True, "stream_options": {"include_usage": True}}
        reply = await service.prepare(request.receive, llm, llm.open_chat, wanted)
        reply.start()
        response = responses.Response(given, model, reply.created)
        if body.stream:
            return Stream(service, model, reply, response)
        return Whole(service, model, reply, response.whole)

    @app.post("/v1/embeddings", **_documented(schemas.EmbeddingRequest, shapes.Embeddings))
    async def embed(request: Request) -> Response:
        """Embed texts."""
        body, given = await _receive(service, request, schemas.EmbeddingRequest)
        model, llm = service.pick(body.model)
        small.check_dimensions(body.dimensions, llm.config.n_embd)
        return small.Embedding(service, model, llm, given)


def _add_small(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={200: {"model": shapes.Health}, 503: {"model": shapes.Health}})
    async def health() -> Response:
        """Whether the server serves."""
        return JSONResponse({"status": service.status}, 200 if service.status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={
        200: {"content": {metrics.TYPE: {"schema": {"type": "string"}}}}, **_errors(401, 403, 405, 503)
    })  # fmt: skip
    async def figures() -> Response:
        """Counts and times, for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": metrics.TYPE})

    @app.get("/v1/models", responses={200: {"model": shapes.Models}, **_errors(401, 403, 405, 503)})
    async def list_models() -> Response:
        """The models."""
        data = [small.model_entry(name, service.models[name], service.created) for name in service.names]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{id:path}", responses={200: {"model": shapes.Model}, **_errors(401, 403, 404, 405, 503)})
    async def one_model(id: str) -> Response:
        """One of the models."""
        if id not in service.models:
            raise unknown_model(id, service.names)
        return JSONResponse(small.model_entry(id, service.models[id], service.created))

    @app.post("/tokenize", **_documented(schemas.TokenizeRequest, shapes.TokenIds))
    async def tokenize(request: Request) -> Response:
        """Cut a text into tokens."""
        body, _ = await _receive(service, request, schemas.TokenizeRequest)
        _, llm = service.pick(body.model)
        ids = await service.tokenize(request.receive, llm.tokenize, body.content, body.add_special, body.parse_special)
        return JSONResponse({"tokens": small.pieces(llm.tokenizer, ids) if body.with_pieces else ids})

    @app.post("/detokenize", **_documented(schemas.DetokenizeRequest, shapes.Content))
    async def detokenize(request: Request) -> Response:
        """Put tokens together."""
        body, _ = await _receive(service, request, schemas.DetokenizeRequest)
        _, llm = service.pick(body.model)
        text = await service.tokenize(request.receive, llm.detokenize, body.tokens, True)
        return JSONResponse({"content": text})


async def _answer_error(request: Request, error: Exception) -> Response:
    """Every error in OpenAI's shape."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=GONE)
    if isinstance(error, HTTPException):
        failed = _routing_error(request, error)
        if failed is None:
            return Response(status_code=204, headers=error.headers)
    else:
        failed = as_api_error(error)
        if failed.status == 500:
            report(error)
    return JSONResponse(failed.body(), failed.status, failed.headers)


def _routing_error(request: Request, error: HTTPException) -> APIError | None:
    path, headers = request.scope["path"], dict(error.headers or {})
    if error.status_code == 404:
        return APIError(404, f"{request.method} {path!r:.200}: no such path", code="unknown_url")
    if "GET" in headers.get("Allow", ""):
        headers["Allow"] += ", HEAD"
    if request.method == "OPTIONS":
        error.headers = headers
        return None
    return APIError(
        error.status_code, f"{request.method} {path!r:.200}: wanted {headers.get('Allow', 'another method')}",
        code="method_not_allowed", headers=headers,
    )  # fmt: skip


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": shapes.Error, "description": _WORDS[status]} for status in statuses}


def _documented(schema: type[BaseModel], shape: type[BaseModel], stream: bool = False) -> dict[str, Any]:
    """What the OpenAPI document says about a POST; the body is checked by us, not by FastAPI."""
    content = {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}, "example": REQUESTS[schema]}
    answer: dict[str, Any] = {"model": shape}
    if stream:
        # no type: tools differ in whether they take the whole stream as a text or each event as an object
        what = "Server-sent events; the data of each is a chunk as JSON, and [DONE] at the end."
        answer["content"] = {"text/event-stream": {"schema": {"description": what}}}
    return {
        "responses": {200: answer, **_errors(400, 401, 403, 404, 405, 408, 413, 429, 500, 503)},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": content}}},
    }


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        asked: list[tuple[type[BaseModel], Any]] = [(schema, "validation") for schema in REQUESTS]
        _, definitions = models_json_schema(asked, ref_template="#/components/schemas/{model}")
        found["components"]["schemas"] |= definitions["$defs"]
        if service.settings.api_keys:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in found["paths"].items():
                if path != "/health":
                    for operation in methods.values():
                        operation["security"] = [{"key": []}]
        app.openapi_schema = found
    return app.openapi_schema
