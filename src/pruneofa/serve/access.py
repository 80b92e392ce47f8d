"""What every request passes: the key, the limits of its body, and the access log."""

import asyncio
import contextlib
import hmac
import json
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pruneofa.serve.call import ClientLeft, to_json
from pruneofa.serve.overdue import Overdue
from pruneofa.serve.refusal import Refused, error_body
from pruneofa.serve.settings import Settings

T = TypeVar("T")

_MOST_DROPPED = 32 << 20  # bytes of a refused body that are read, so that its client gets to read the answer
PUBLIC = {"/", "/health", "/ping", "/metrics", "/v2/health/live", "/v2/health/ready"}  # for GET, without the key


class Access:
    """ASGI middleware; it reads the whole body into the request's state, so that the routes wait for no client."""

    def __init__(self, app: ASGIApp, settings: Settings, refused: Callable[[str], object]) -> None:
        """Call `refused` with the cause of each refusal."""
        self._app, self._settings, self._refused = app, settings, refused
        self._slow = Overdue(settings.body_timeout)
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        status = 0

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, send_and_see)
        except ClientLeft:
            status = 499  # as in nginx's log; nobody receives it
        except asyncio.CancelledError:  # the server ends, and waits no longer
            if not status:
                self._refused("ending")
                refused = Refused("Unhealthy", "the server is ending")
                await _refusal(scope["path"], refused)(scope, receive, send_and_see)
        except Exception:
            status = status or 500  # what the application sends outside of this
            raise
        finally:
            if self._settings.access_log:
                # In the next turn of the event loop: the response is sent at the end of this one.
                asyncio.get_running_loop().call_soon(_log, scope, status, time.perf_counter() - begin)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])  # of repeated headers the last
        # A client that expects 100 sends no body before it is asked for one, which the first `receive` does.
        unread = headers.get(b"expect", b"").lower() != b"100-continue"

        async def receive_and_see() -> Message:
            nonlocal unread
            unread = True
            message = await receive()
            unread = message.get("more_body", False)  # http.disconnect has none
            return message

        try:
            if not self._may_call(scope, headers):
                raise Refused("Unauthorized", "the key is missing or wrong; wanted Authorization: Bearer KEY")
            body = await self._body(headers, receive_and_see)
        except Refused as refused:
            self._refused(refused.cause)
            response = _refusal(scope["path"], refused)
            if unread:
                await self._send_and_drop(response, scope, receive, send)
            else:
                await response(scope, receive, send)
            return
        scope.setdefault("state", {})["body"] = body
        await self._app(scope, receive, send)

    def _may_call(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or (scope["method"] in ("GET", "HEAD") and scope["path"] in PUBLIC):
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body. Raises Refused if it is too long or too slow, ClientLeft if it ends too early."""
        limit = self._settings.payload_limit
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 15 or int(length) > limit):
            raise _too_long(limit)
        try:
            return await self._in_time(_read(receive, limit))
        except TimeoutError:
            raise Refused("Validation", "the request's body took too long", status=408, cause="timeout") from None

    async def _send_and_drop(self, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer at once, and read the rest of the body before the connection is closed.

        The system resets a connection that is closed while bytes are unread; most clients send their whole body before
        they read, and would see the reset instead of the answer.
        """

        async def send_without_end(message: Message) -> None:
            await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

        await response(scope, receive, send_without_end)
        # Cancelled when the server ends, and waits no longer.
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await self._in_time(_drop(receive))
        await send({"type": "http.response.body"})

    async def _in_time(self, reading: Coroutine[Any, Any, T]) -> T:
        """What `reading` returns. Raises TimeoutError when it takes longer than a body may."""
        async with asyncio.timeout(None) as timeout:

            def expire() -> None:
                timeout.reschedule(0.0)

            self._slow.add(expire)
            try:
                return await reading
            finally:
                self._slow.remove(expire)


def _refusal(path: str, refused: Refused) -> Response:
    body, headers = error_body(path, refused), {"connection": "close"}
    if refused.kind == "Unauthorized":
        headers["www-authenticate"] = "Bearer"
        if "error_type" in body:  # text-embeddings-inference sends no body
            return Response(status_code=refused.status, headers=headers)
    return Response(to_json(body), refused.status, headers=headers, media_type="application/json")


async def _drop(receive: Receive) -> None:
    """Read what is left of a body, up to _MOST_DROPPED bytes."""
    size, more = 0, True
    while more and size < _MOST_DROPPED:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > limit:
            raise _too_long(limit)
    return b"".join(parts)


def _too_long(limit: int) -> Refused:
    return Refused("Validation", f"the request's body has more than {limit} bytes", status=413, cause="payload")


def _log(scope: Scope, status: int, seconds: float) -> None:
    """One line of JSON on stderr; no text, no query, no key."""
    client = scope.get("client")
    entry: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "ms": round(1000 * seconds, 2),
        "client": client[0] if client else None,
    }
    tokens = scope.get("state", {}).get("tokens")
    if tokens is not None:
        entry["tokens"] = tokens
    sys.stderr.write(json.dumps(entry) + "\n")
