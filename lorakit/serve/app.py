"""The HTTP app: OpenAI's routes, /v1/classify, the admin's, health and metrics, behind the guard."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from lorakit.errors import LorakitError
from lorakit.serve.admin import add_admin
from lorakit.serve.answers import Answers
from lorakit.serve.guard import ADMIN, Access, Guard
from lorakit.serve.metrics import Metrics
from lorakit.serve.openai import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest
from lorakit.serve.problems import Problem, malformed, problem_of
from lorakit.serve.server import Server

log = logging.getLogger("lorakit.serve")


def build_app(server: Server, access: Access | None = None) -> Guard:
    """An ASGI app over a server, which stays its caller's to close. Needs lorakit[serve]."""
    from fastapi import FastAPI

    metrics = Metrics(server.engine, server.bank)
    answers = Answers(server, metrics)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        answers.close()

    app = FastAPI(title="lorakit", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    _add_answers(app, answers)
    add_admin(app, server)
    _add_state(app, server, metrics)
    _add_errors(app)
    return Guard(app, access or Access(), metrics.http)


def _add_answers(app: Any, answers: Answers) -> None:
    from fastapi import Request

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        return await answers.generate(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        return await answers.generate(body, request)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Any:
        return await answers.embed(body, request)

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest, request: Request) -> Any:
        return await answers.classify(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await asyncio.to_thread(answers.models)}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return await asyncio.to_thread(answers.model, name)


def _add_state(app: Any, server: Server, metrics: Metrics) -> None:
    from fastapi.responses import JSONResponse, Response

    @app.get("/health")
    async def health() -> Any:
        """Whether the process should live on."""
        alive = server.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> Any:
        """Whether requests should be sent here: the engine runs, and what was in service is loaded."""
        state = "ready" if server.engine.alive and server.warmed else "loading" if server.engine.alive else "stopped"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503, {"Retry-After": "1"})

    @app.get("/metrics")
    async def read() -> Response:
        return Response(await asyncio.to_thread(metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: Any) -> None:
    """Every error in OpenAI's shape; what nobody foresaw is logged, and not told."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def answer(problem: Problem) -> Any:
        return JSONResponse(problem.body(), problem.status, dict(problem.headers))

    @app.exception_handler(LorakitError)
    async def known(request: Request, error: LorakitError) -> Any:
        return answer(problem_of(error, admin=request.url.path.startswith(ADMIN)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Any:
        return answer(malformed(error.errors()))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Any:
        said = {404: "there is no such route.", 405: "this route does not answer this method."}
        code = {404: "unknown_route", 405: "wrong_method"}.get(error.status_code, "invalid_request")
        message = said.get(error.status_code, str(error.detail))
        return answer(Problem(error.status_code, code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Any:
        log.error("a request failed", exc_info=error)
        return answer(Problem(500, "internal_error", "the server failed; its log says why."))
