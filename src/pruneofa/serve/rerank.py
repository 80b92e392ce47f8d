"""The rerank routes of Cohere and Jina."""

import uuid
from typing import Any

import numpy as np

from pruneofa.serve.bodies import Body, Many
from pruneofa.serve.call import Call, Post
from pruneofa.serve.names import named
from pruneofa.serve.refusal import invalid
from pruneofa.serve.scoring import relevance


class Document(Body):
    """A document that has a text; other fields are not read."""

    text: str


class RankRequest(Body):
    """A query and the documents to rank by it."""

    query: str
    documents: Many[str | Document]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool = False


async def rank(call: Call, body: RankRequest) -> tuple[Any, int]:
    """Documents by how well they answer the query, best first."""
    if body.top_n is not None and body.top_n < 1:
        raise invalid("top_n should be positive")
    model = named(call, "reranking", body.model)
    call.check_size(len(body.documents), "documents")  # before anything is made of them
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    found = await relevance(call, model, body.query, texts, field="documents")
    results = []
    for index in np.argsort(-found, kind="stable")[: body.top_n]:
        result: dict[str, Any] = {"index": int(index), "relevance_score": found[index]}
        if body.return_documents:
            result["document"] = {"text": texts[index]}
        results.append(result)
    value = {
        "id": str(uuid.uuid4()),
        "model": model.name,
        "results": results,
        "usage": {"total_tokens": call.tokens},
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }
    return value, len(results)


POSTS = [Post("/v1/rerank", RankRequest, rank), Post("/v2/rerank", RankRequest, rank)]
