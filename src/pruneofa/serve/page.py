"""The page for a browser."""

from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from pruneofa.serve.status import check_health


async def root(request: Request) -> Response:
    """The page for a browser; for anything else what /health says, as in text-embeddings-inference."""
    if "text/html" not in request.headers.get("accept", ""):
        check_health(request.app.state.serving)
        return Response()
    return Response(_page(), media_type="text/html", headers=_HEADERS)


# The page runs its own script and talks to this server only.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


@cache
def _page() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")
