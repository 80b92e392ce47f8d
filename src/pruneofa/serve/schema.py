"""The OpenAPI description of the POST routes, from the models of their bodies."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from pruneofa import __version__
from pruneofa.serve.call import Post
from pruneofa.serve.refusal import STATUS

_ANSWERS = {"200": {"description": "the answer"}} | {
    str(status): {"description": "refused"} for status in sorted({401, 413, *STATUS.values()})
}


def describe(posts: Sequence[Post], *, key: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of some routes, which want a key or none."""
    bodies = list(dict.fromkeys(post.body for post in posts))
    references, schemas = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "pruneofa", "version": __version__},
        "paths": {post.path: {"post": _operation(post, references[post.body, "validation"])} for post in posts},
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if key else [],
    }


def _operation(post: Post, reference: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", post.path)
    ]
    return {
        "summary": post.answer.__doc__,
        "parameters": parameters,
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
        "responses": _ANSWERS,
    }
