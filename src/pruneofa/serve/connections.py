"""Connections of broken clients: a head without end, a request that never comes whole, an answer that nobody reads.

The times of bodies and of idle connections between requests are limited by `access` and by uvicorn.
"""

import contextlib
import json
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if sys.platform == "linux":
    import fcntl
    import termios

MAX_HEAD = 1 << 16  # bytes of a request that are no body: its line, headers and trailers; uvicorn has no limit
_MOST_DROPPED = 1 << 20  # bytes that are read behind what is no HTTP, so that the client gets to read the answer
_LINGER = 5  # seconds for the same
INTERVAL = 30  # seconds between two looks for connections on which nothing moves

State = tuple[RequestResponseCycle | None, int, int]  # the last request, and the unread bytes here and in the kernel


class Connection(HttpToolsProtocol):
    """HTTP/1.1 on one connection, with heads and trailers of at most about MAX_HEAD bytes.

    Attributes:
        partial: whether a request has begun whose head is not complete.
    """

    partial = False
    _dropped: int | None = None  # bytes since the client was told that it does not speak HTTP
    _extra: int | None = None  # bytes since the request began, or since its last body, with that read left out

    def on_message_begin(self) -> None:
        """Called by the parser at the first byte of a request."""
        super().on_message_begin()
        self.partial, self._extra = True, 0

    def on_headers_complete(self) -> None:
        """Called by the parser behind the head."""
        if self._upgrades():
            return
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
        self._extra = None
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with what the client sent."""
        if self._dropped is not None:
            self._dropped += len(data)
            if self._dropped > _MOST_DROPPED:
                self.transport.abort()
            return
        if self._extra is not None:
            self._extra += len(data)  # the parser sets it again where there is a body or another request
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._dropped is not None or self._extra is None or self._extra <= MAX_HEAD or self.transport.is_closing():
            return
        if self.partial:
            self.send_400_response(f"The request's head has more than {MAX_HEAD} bytes.")
        else:
            self.transport.abort()

    def _upgrades(self) -> bool:
        """Whether the client offers another protocol, as Java's client and curl offer HTTP/2."""
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

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
            self.send_400_response("Invalid HTTP request received.")

    def send_400_response(self, msg: str) -> None:
        """Called where the parser fails: say so in JSON, and read on for a while, as in `access`."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or self.partial or not cycle.more_body or cycle.response_started:
                self.transport.abort()  # the client would take it for the answer to an earlier request, or a part of it
                return
            cycle.disconnected = True  # the application gets no more of this body, and need not answer
            cycle.message_event.set()
        body = json.dumps({"error": msg, "error_type": "Validation"}).encode()
        head = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d"
        self.transport.write(head % len(body) + b"\r\n\r\n" + body)
        self.transport.write_eof()
        self.flow.resume_reading()
        self._dropped = 0
        self.timeout_keep_alive_task = self.loop.call_later(_LINGER, self.timeout_keep_alive_handler)


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
