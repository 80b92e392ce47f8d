"""The application: every protocol's routes over the same models."""

import contextlib
from collections.abc import AsyncIterator, Sequence

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from pruneofa import __version__
from pruneofa.errors import InputError
from pruneofa.serve import answers, openai, page, rerank, status, tei
from pruneofa.serve.access import Access
from pruneofa.serve.batching import Batcher
from pruneofa.serve.call import Serving, to_json
from pruneofa.serve.metrics import Metrics
from pruneofa.serve.model import Model
from pruneofa.serve.refusal import Refused, error_body
from pruneofa.serve.settings import Settings


def create_app(models: Sequence[Model], settings: Settings | None = None) -> FastAPI:
    """An ASGI application that serves models.

    Args:
        models: at least one. Where a request names none, the first model that does the task answers.
        settings: limits; default: those of `Settings`.

    Raises:
        InputError: no model, or two of one name.
    """
    settings = settings or Settings()
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise InputError(f"models are named {', '.join(names) or 'nothing'}; give at least one, each a name of its own")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = Metrics()
        batcher = Batcher(
            max_batch_tokens=settings.max_batch_tokens,
            max_concurrent_requests=settings.max_concurrent_requests,
            observe=metrics.batch,
        )
        app.state.serving = Serving({model.name: model for model in models}, settings, batcher, metrics)
        yield
        batcher.close()

    app = FastAPI(
        title="pruneofa",
        version=__version__,
        lifespan=lifespan,
        openapi_url="/api-doc/openapi.json",
        docs_url=None,  # both would fetch scripts from elsewhere
        redoc_url=None,
        strict_content_type=False,  # what is JSON is read as JSON, whatever a client calls it
    )
    for routes in (status.router, page.router, openai.router, rerank.router):
        app.include_router(routes)
    for router in (tei.router, answers.router):
        app.include_router(router)
        app.include_router(router, prefix="/models/{model}")
    app.include_router(tei.default_router(models[0]))
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _wrong_body)
    app.add_exception_handler(HTTPException, _wrong_route)
    app.add_exception_handler(Exception, _unforeseen)
    app.add_middleware(Access, settings=settings)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    if (serving := getattr(request.app.state, "serving", None)) is not None:
        serving.metrics.refused(error.cause)
    body = to_json(error_body(request.url.path, error))
    return Response(body, error.status, media_type="application/json")


async def _wrong_body(request: Request, error: Exception) -> Response:
    """JSON that is broken is 400; JSON of the wrong form 422, as in text-embeddings-inference."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:4])
    if first["type"] == "json_invalid":
        refused = Refused("Validation", "the request's body is not valid JSON", status=400)
    else:
        where = f"{place}: " if place else ""
        refused = Refused("Validation", f"Input validation error: {where}{first['msg']}")
    return await _refused(request, refused)


async def _wrong_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = await _refused(
        request,
        Refused("NotFound" if error.status_code == 404 else "Validation", error.detail, status=error.status_code),
    )
    response.headers.update(error.headers or {})
    return response


async def _unforeseen(request: Request, error: Exception) -> Response:
    return await _refused(request, Refused("Internal", "internal error"))
