"""Bodies of text-embeddings-inference's requests."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]  # one error is told, so a hundred thousand need not be collected
Ids = Many[Annotated[int, Field(ge=0, lt=2**32)]]
Direction = Annotated[
    Literal["left", "right"], BeforeValidator(lambda side: {"Left": "left", "Right": "right"}.get(str(side), side))
]


class Body(BaseModel):
    """The body of a request: no conversions between types; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, protected_namespaces=())


class Parameters(Body):
    """The options of a request to Hugging Face's inference API: one that is not known would change the answer there."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


Input = str | Ids
TextOrPair = Annotated[list[str], Field(min_length=1, max_length=2)]


class EmbedAllRequest(Body):
    """Texts or token ids, one or a list."""

    inputs: Input | Many[Input]
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class EmbedRequest(EmbedAllRequest):
    """The same, and what becomes of the vectors."""

    normalize: bool = True
    dimensions: int | None = None


class PredictParameters(Parameters):
    """How many labels to return, and what makes scores of logits: all labels and the model's own function if None."""

    top_k: int | None = Field(default=None, ge=1)
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None


class PredictRequest(Body):
    """A text, a pair of texts, or a batch of lists of one or two; `function_to_apply` counts before `raw_scores`."""

    inputs: str | TextOrPair | Many[TextOrPair]
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    raw_scores: bool = False
    parameters: PredictParameters | None = None


class RerankRequest(Body):
    """A query and the texts to rank by it."""

    query: str
    texts: Many[str]
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    raw_scores: bool = False
    return_text: bool = False


class SimilarityInput(Body):
    """A sentence and those that it is compared with."""

    source_sentence: str
    sentences: Many[str]


class SimilarityParameters(Body):
    """How the sentences are tokenized."""

    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityRequest(Body):
    """The sentences, and how they are tokenized."""

    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None


class TokenizeRequest(Body):
    """Texts, one or a list."""

    inputs: str | Many[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Body):
    """Token ids, one sequence or a list."""

    ids: Ids | Many[Ids]
    skip_special_tokens: bool = True


class VertexRequest(Body):
    """Requests of the model's task."""

    instances: Many[dict[str, Any]]


def is_single(inputs: Any) -> bool:
    """Whether it is a text or token ids, and not a list of these."""
    return isinstance(inputs, str) or (isinstance(inputs, list) and (not inputs or isinstance(inputs[0], int)))
