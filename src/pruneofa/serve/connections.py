"""Connections of broken clients: a head without end, a request that never comes whole, an answer that nobody reads.

The times of bodies and of idle connections between requests are limited by `access` and by uvicorn.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD = 1 << 16  # bytes of a request's line and headers; uvicorn has no limit
INTERVAL = 30  # seconds between two looks for connections on which nothing moves

State = tuple[RequestResponseCycle | None, int]  # the last request and the bytes of answers that wait to be read


class Connection(HttpToolsProtocol):
    """HTTP/1.1 on one connection, with heads of at most about MAX_HEAD bytes.

    Attributes:
        head: bytes of the head so far; None: no request has begun that has no complete head.
    """

    head: int | None = None

    def on_message_begin(self) -> None:
        """Called by the parser at the first byte of a request."""
        super().on_message_begin()
        self.head = 0

    def on_headers_complete(self) -> None:
        """Called by the parser behind the head."""
        self.head = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with what the client sent."""
        super().data_received(data)
        if self.head is not None:
            self.head += len(data)
            if self.head > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response(f"The request's head has more than {MAX_HEAD} bytes.")


def close_stalled(connections: Iterable[Any], seen: Mapping[Any, State]) -> dict[Any, State]:
    """Close connections on which nothing has moved since the last call, and return what to compare with next time.

    Args:
        connections: open ones, of class Connection.
        seen: what the last call returned.
    """
    waiting = {}
    for connection in connections:
        unread = connection.transport.get_write_buffer_size()
        answered = connection.cycle is None or connection.cycle.response_complete
        idle = connection.timeout_keep_alive_task is not None  # uvicorn closes it
        if unread or connection.head is not None or (answered and not idle):
            waiting[connection] = state = (connection.cycle, unread)
            if seen.get(connection) == state:
                connection.transport.abort()
    return waiting
