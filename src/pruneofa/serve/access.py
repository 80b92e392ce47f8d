"""What every request passes: the key, the limits of its body, and the access log."""

import asyncio
import hmac
import json
import sys
import time
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pruneofa.serve.call import ClientLeft, to_json
from pruneofa.serve.overdue import Overdue
from pruneofa.serve.refusal import Refused, error_body
from pruneofa.serve.settings import Settings

PUBLIC = {"/", "/health", "/ping", "/metrics", "/v2/health/live", "/v2/health/ready"}  # for GET, without the key


class Access:
    """ASGI middleware; it reads the whole body into the request's state, so that the routes wait for no client."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._slow = Overdue(settings.body_timeout)
        self._key = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()

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
        except Exception:
            status = status or 500  # what the application sends outside of this
            raise
        finally:
            if self._settings.access_log:
                # In the next turn of the event loop: the response is sent at the end of this one.
                asyncio.get_running_loop().call_soon(_log, scope, status, time.perf_counter() - begin)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])  # of repeated headers the last
        if not self._may_call(scope, headers):
            await Response(status_code=401, headers={"www-authenticate": "Bearer"})(scope, receive, send)
            return
        try:
            body = await self._body(headers, receive)
        except Refused as refused:
            answer = to_json(error_body(scope["path"], refused))
            # What the client still sends is not read, so the connection cannot serve another request.
            closing = {"connection": "close"}
            response = Response(answer, refused.status, headers=closing, media_type="application/json")
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["body"] = body
        await self._app(scope, receive, send)

    def _may_call(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or (scope["method"] in ("GET", "HEAD") and scope["path"] in PUBLIC):
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), self._key)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body. Raises Refused if it is too long or too slow, ClientLeft if it ends too early."""
        limit = self._settings.payload_limit
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 15 or int(length) > limit):
            raise _too_long(limit)
        try:
            async with asyncio.timeout(None) as timeout:

                def expire() -> None:
                    timeout.reschedule(0.0)

                self._slow.add(expire)
                try:
                    return await _read(receive, limit)
                finally:
                    self._slow.remove(expire)
        except TimeoutError:
            raise Refused("Validation", "the request's body took too long", status=408, cause="timeout") from None


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
