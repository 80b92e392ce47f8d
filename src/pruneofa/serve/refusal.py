"""Why a request is refused: the kinds of errors of text-embeddings-inference, and their form in each protocol."""

from typing import Any, Literal

Kind = Literal[
    "Empty", "Unauthorized", "NotFound", "Validation", "Tokenizer", "Backend", "Overloaded", "Internal", "Unhealthy"
]

STATUS: dict[Kind, int] = {
    "Empty": 400,
    "Unauthorized": 401,
    "NotFound": 404,
    "Validation": 422,
    "Tokenizer": 422,
    "Backend": 424,
    "Overloaded": 429,
    "Internal": 500,
    "Unhealthy": 503,
}


class Refused(Exception):  # noqa: N818 - the server is well, the request is not
    """A request that gets an error for an answer.

    Attributes:
        kind: of the error; it determines the status.
        message: for the client; it names no path of the server.
        status: of the response.
        cause: the label of `te_request_failure`.
    """

    def __init__(self, kind: Kind, message: str, *, status: int | None = None, cause: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message
        self.status = status or STATUS[kind]
        self.cause = cause or kind.lower()


def invalid(message: str, cause: str = "validation") -> Refused:
    """A request whose content is wrong, in the words of text-embeddings-inference."""
    return Refused("Validation", f"Input validation error: {message}", cause=cause)


def error_body(path: str, refused: Refused) -> dict[str, Any]:
    """The body of the response to a refused request, in the form of the protocol that its path belongs to."""
    path = path.rstrip("/")
    if path.endswith(("/v1/rerank", "/v2/rerank")):  # Cohere and Jina
        return {"message": refused.message}
    if f"{path}/".startswith("/v2/"):  # Open Inference Protocol
        return {"error": refused.message}
    if path.endswith("/embeddings") or "/v1/" in path:  # OpenAI, as text-embeddings-inference answers
        return {"message": refused.message, "code": refused.status, "type": refused.kind}
    return {"error": refused.message, "error_type": refused.kind}
