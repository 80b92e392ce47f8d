"""Connections of broken clients: a head without end, a request that never comes whole, an answer that nobody reads.

The times of bodies and of idle connections between requests are limited by `access` and by uvicorn.
"""

import asyncio
import contextlib
import json
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httptools
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pruneofa.serve.refusal import Refused, error_body

if sys.platform == "linux":
    import fcntl
    import termios

MAX_HEAD = 1 << 16  # bytes of a request that are no body: its line, headers and trailers; uvicorn has no limit
_PIECE = 1 << 14  # bytes that are parsed together, and so the precision with which a head without end is measured
_MOST_DROPPED = 1 << 20  # bytes that are read behind what is no HTTP, so that the client gets to read its answers
_LINGER = 5  # seconds for the same
INTERVAL = 30  # seconds between two looks for connections on which nothing moves

_LONG_HEAD = f"The request's head has more than {MAX_HEAD} bytes."

State = tuple[RequestResponseCycle | None, int, int]  # the last request, and the unread bytes here and in the kernel


class Connection(HttpToolsProtocol):
    """HTTP/1.1 on one connection, with heads and trailers of at most about MAX_HEAD bytes.

    Attributes:
        partial: whether a request has begun whose head is not complete.
    """

    partial = False
    _dropped: int | None = None  # bytes behind what is no HTTP; nothing is parsed any more
    _extra = 0  # bytes since the last body, or the last complete request, with the piece in which that ended left out

    def on_message_begin(self) -> None:
        """Called by the parser at the first byte of a request."""
        super().on_message_begin()
        self.partial = True

    def on_headers_complete(self) -> None:
        """Called by the parser behind the head."""
        if self._upgrades():
            return
        if self._long_head():
            raise ValueError("long head")  # ends the parser, which may hold the whole head from one read
        self.partial = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser with each part of a body."""
        self._extra = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser behind the request."""
        if self._upgrades():
            return
        self._extra = 0
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with what the client sent."""
        if self._dropped is None:
            self._unset_keepalive_if_required()
        for begin in range(0, len(data), _PIECE):
            piece = data[begin : begin + _PIECE]
            if self._dropped is not None:
                self._drop(len(data) - begin)
                return
            self._extra += len(piece)  # the parser sets it to 0 where there is a body, or a request is complete
            self._parse(piece)
            if self._dropped is None and self._extra > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response(_LONG_HEAD)

    def shutdown(self) -> None:
        """Called by the server when it ends: wait for the answers, but for no body that is refused."""
        super().shutdown()
        self._end_refused_body()

    def _upgrades(self) -> bool:
        """Whether the client offers another protocol, as Java's client and curl offer HTTP/2."""
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _long_head(self) -> bool:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD

    def _parse(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as stop:
                    if not self._upgrades():
                        return  # CONNECT: what follows is for nobody
                    rest = rest[stop.args[0] :]
                # The parser leaves the body unread for the other protocol. The offer is not taken: parse without it.
                line = self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()
                headers = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                self.parser.feed_data(b"\r\n".join([line, *headers, b"", b""]))
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            long = self.partial and self._long_head()
            self.send_400_response(_LONG_HEAD if long else "Invalid HTTP request received.")

    def send_400_response(self, msg: str) -> None:
        """Called where the parser fails: say so in JSON, and read on for a while, as in `access`.

        The requests before are answered first. Where there are any, the connection is closed behind the last answer: a
        client could take a 400 that it did not wait for as the answer to another request.
        """
        cycle = self.cycle
        answered = cycle is None or cycle.response_complete
        broken = not answered and cycle.more_body and not self.partial  # this request, in its body
        self._dropped, self.partial = 0, False
        self.timeout_keep_alive = _LINGER
        if answered or (broken and not self.pipeline and not cycle.response_started):
            if broken:
                cycle.disconnected = True  # the application gets no more of this body, and need not answer
                cycle.message_event.set()
            body = _error(msg)
            head = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            self._half_close()
            return
        if broken and self.pipeline:
            self.pipeline[0] = (cycle, _refusing(msg))  # type: ignore[assignment]
        self._end_refused_body()
        cycle.keep_alive = False
        cycle.transport = _Open(self.transport, self._half_close)  # type: ignore[assignment]

    def _drop(self, size: int) -> None:
        """Count what is read behind what is no HTTP; read no more once it is _MOST_DROPPED bytes."""
        self._dropped = (self._dropped or 0) + size
        if self._dropped > _MOST_DROPPED:
            self.flow.pause_reading()

    def _end_refused_body(self) -> None:
        """Wait for no more of a body whose request is answered already; nothing but a refusal is sent so early."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and cycle.more_body and not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def _half_close(self) -> None:
        """Send no more, and read on for a while, as a client that still sends would see a reset before the answer."""
        if not self.transport.is_closing():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(_LINGER, self.timeout_keep_alive_handler)


class _Open:
    """A transport for the last answer of a connection, which does not close it at once as uvicorn would.

    Attributes:
        write: of the transport.
        is_closing: of the transport.
        close: what to do in place of its own.
    """

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, close


def _error(message: str) -> bytes:
    # Not `call.to_json`: prometheus_client, which call imports, wants to know of the workers first.
    return json.dumps(error_body("/", Refused("Validation", message))).encode()


def _refusing(message: str) -> ASGIApp:
    """An application that answers a request with 400 when its turn has come."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(_error(message), 400, media_type="application/json")(scope, receive, send)

    return refuse


def close_stalled(connections: Iterable[Any], seen: Mapping[Any, tuple[State, int]]) -> dict[Any, tuple[State, int]]:
    """Close connections on which nothing has moved since the last call, or the last two where an answer waits.

    An answer has three looks, as the system of a client that reads slowly makes room in large steps.

    Args:
        connections: open ones, of class Connection.
        seen: what the last call returned.

    Returns:
        What each connection that waits for its client looked like, and in how many calls.
    """
    waiting = {}
    for connection in connections:
        unread = connection.transport.get_write_buffer_size()
        answered = connection.cycle is None or connection.cycle.response_complete
        idle = connection.timeout_keep_alive_task is not None  # uvicorn closes it
        partial = connection.partial and not connection.flow.read_paused  # otherwise it is the client that waits
        if not (unread or partial or (answered and not idle)):
            continue
        state = (connection.cycle, unread, _unacknowledged(connection.transport) if unread else 0)
        before, looks = seen.get(connection, (None, 0))
        looks = looks + 1 if state == before else 1
        waiting[connection] = state, looks
        if unread and looks == 3:
            connection.transport.abort()
        elif not unread and looks == 2:
            connection.transport.close()
    return waiting


def _unacknowledged(transport: Any) -> int:
    """Bytes that the client's system has not acknowledged; 0 where the system does not say."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError):
            found = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            return int(struct.unpack("i", found)[0])
    return 0
