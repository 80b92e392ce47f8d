"""What a server can be told: limits and who may call."""

import math
from dataclasses import dataclass

from pruneofa.errors import InputError

NOT_IN_NAMES = frozenset("/{}")  # of a model: its routes have the name as one part, where braces are a parameter
_OPENAI_INPUTS = 2048  # of a request, as OpenAI takes
_COUNTS = ("max_batch_tokens", "max_concurrent_requests", "payload_limit")


@dataclass(frozen=True)
class Settings:
    """Settings of one server; where text-embeddings-inference has the same one, by its name and default.

    Attributes:
        max_batch_tokens: tokens that are computed together; also how long, in tokens, a request waits for the batch
            before it. Lower than that of servers that pad: without padding larger batches are no faster.
        max_concurrent_requests: inputs that may be waiting or computed at a time; more are refused with 429.
        max_client_batch_size: inputs of one request; None: 32 or max_concurrent_requests, whichever is less, and 2048
            for OpenAI's embeddings.
        auto_truncate: truncate inputs that are too long unless the request says otherwise.
        payload_limit: bytes of a request's body.
        body_timeout: seconds that a client may take to send its request's body.
        api_key: what clients must send as a bearer token; None: nothing.
        access_log: write one line of JSON per request to stderr.

    Raises:
        InputError: a limit is not positive, a request's limit is more than all may have, or no client could send the
            key.
    """

    max_batch_tokens: int = 2048
    max_concurrent_requests: int = 512
    max_client_batch_size: int | None = None
    auto_truncate: bool = True
    payload_limit: int = 2_000_000
    body_timeout: float = 30.0
    api_key: str | None = None
    access_log: bool = True

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, wanted at least 1")
        names = "max_client_batch_size", "max_concurrent_requests"
        check_client_batch_size(self.max_client_batch_size, self.max_concurrent_requests, names)
        if not 0 < self.body_timeout < math.inf:
            raise InputError(f"body_timeout is {self.body_timeout}, wanted a positive number of seconds")
        if self.api_key is not None:
            check_key(self.api_key, "api_key")

    @property
    def most_inputs(self) -> int:
        """Inputs that one request may have."""
        return self.max_client_batch_size or min(32, self.max_concurrent_requests)

    @property
    def most_openai_inputs(self) -> int:
        """The same, of a request to OpenAI's embeddings: its clients send what OpenAI takes."""
        return self.max_client_batch_size or _OPENAI_INPUTS


def check_client_batch_size(given: int | None, concurrent: int, names: tuple[str, str]) -> None:
    """Check the inputs that one request may have, of which at most `concurrent` may be in flight.

    Args:
        given: what the user wants; None: nothing.
        concurrent: inputs that may be in flight.
        names: how the user gives the two.

    Raises:
        InputError: the size is less than 1, or such requests would always be refused.
    """
    if given is None:
        return
    if given < 1:
        raise InputError(f"{names[0]} is {given}, wanted at least 1")
    if given > concurrent:
        raise InputError(
            f"{names[0]} is {given}, which {names[1]} {concurrent} would always refuse; lower it, or raise {names[1]}"
        )


def check_key(key: str, name: str) -> None:
    """Raise InputError unless clients can send the key in a header; the key itself is not said."""
    if not key:
        raise InputError(f"{name} is empty; give a key")
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise InputError(
            f"{name} has a key that no header can carry, wanted one line of letters, digits and signs of ASCII"
        )
