"""The application: every protocol's routes over the same models."""

import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from pruneofa.errors import InputError
from pruneofa.serve import answers, infer, openai, page, rerank, schema, status, tei
from pruneofa.serve.access import Access
from pruneofa.serve.batching import Batcher
from pruneofa.serve.call import Post, Serving, to_json
from pruneofa.serve.metrics import Metrics
from pruneofa.serve.model import Model
from pruneofa.serve.overdue import Overdue
from pruneofa.serve.refusal import Refused, error_body
from pruneofa.serve.settings import NOT_IN_NAMES, Settings


def create_app(models: Sequence[Model], settings: Settings | None = None) -> Starlette:
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
    if wrong := [name for name in names if NOT_IN_NAMES & set(name)]:
        raise InputError(f"a model is named {wrong[0]!r}; wanted one without slashes and braces, as it is in routes")

    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher = Batcher(
            max_batch_tokens=settings.max_batch_tokens,
            max_concurrent_requests=settings.max_concurrent_requests,
            observe=metrics.batch,
            queued=metrics.queued,
        )
        # A request that is answered sooner is not worth a look whether somebody waits for it.
        late = Overdue(0.02)
        app.state.serving = Serving({model.name: model for model in models}, settings, batcher, metrics, late)
        yield
        batcher.close()

    by_model = [*tei.POSTS, *answers.POSTS]
    posts = [
        *by_model,
        *openai.POSTS,
        *rerank.POSTS,
        *infer.POSTS,
        *tei.defaults(models[0]),
        *(Post(f"/models/{{model}}{post.path}", post.body, post.answer) for post in by_model),
        *(post for model in models for post in tei.defaults(model, f"/models/{model.name}")),
    ]
    described = to_json(schema.describe(posts, key=settings.api_key is not None))

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    gets = [
        Route("/", page.root),
        Route("/health", status.health),
        Route("/ping", status.health),
        Route("/metrics", status.metrics),
        Route("/info", status.info),
        Route("/models/{model}/info", status.info),
        Route("/v1/models", openai.models),
        Route("/api-doc/openapi.json", openapi),
        *(Route(path, function) for path, function in infer.GETS.items()),
    ]
    app = Starlette(
        routes=[*(post.route() for post in posts), *gets],
        lifespan=lifespan,
        middleware=[Middleware(Access, settings=settings, refused=metrics.refused)],
        exception_handlers={Refused: _refused, HTTPException: _wrong_route, Exception: _unforeseen},
    )
    app.router.redirect_slashes = False  # the address that it would send clients to is made of what they sent
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    request.app.state.serving.metrics.refused(error.cause)
    body = to_json(error_body(request.url.path, error))
    return Response(body, error.status, media_type="application/json")


async def _wrong_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "NotFound" if error.status_code == 404 else "Validation"
    response = await _refused(request, Refused(kind, error.detail, status=error.status_code))
    response.headers.update(error.headers or {})
    if "allow" in response.headers:  # of the first of several routes of this path
        found = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        response.headers["allow"] = ", ".join(sorted(set().union(*(route.methods or () for route in found))))
    return response


async def _unforeseen(request: Request, error: Exception) -> Response:
    return await _refused(request, Refused("Internal", "internal error"))
