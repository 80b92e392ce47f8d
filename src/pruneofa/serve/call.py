"""One HTTP request: which model answers, the queue, the client that may leave, and the headers of the response."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from pruneofa.engine.tokenizer import Side
from pruneofa.serve.batching import Batcher, Job
from pruneofa.serve.bodies import Body
from pruneofa.serve.metrics import Family, Method, Metrics
from pruneofa.serve.model import Item, Model, characters
from pruneofa.serve.overdue import Overdue
from pruneofa.serve.refusal import Refused, invalid
from pruneofa.serve.settings import Settings

BINARY_HEADER = "inference-header-content-length"  # bytes of JSON in a body that goes on with tensors
T = TypeVar("T")
_STORED = 65_536  # bytes of an answer that a connection stores without waiting for its client
_INLINE = 16_384  # numbers in a response that are written by the event loop; more by a thread


class ClientLeft(Exception):  # noqa: N818 - nothing failed
    """The client closed the connection before it had its answer."""


@dataclass(frozen=True)
class Serving:
    """What all requests share."""

    models: dict[str, Model]
    settings: Settings
    batcher: Batcher
    metrics: Metrics
    late: Overdue  # what to do for requests that were not answered soon


class Call:
    """A request and the jobs that it made.

    Attributes:
        serving: what all requests share.
        openai: it may have as many inputs as OpenAI takes.
        jobs: what was computed for it so far.
        places: inputs that it has in flight, until its response is sent.
        binary: the bytes behind the JSON of its body, in the Open Inference Protocol.
    """

    def __init__(self, scope: Scope, receive: Receive, *, openai: bool = False) -> None:
        self.serving: Serving = scope["app"].state.serving
        self.openai = openai
        self.jobs: list[Job] = []
        self.places = 0
        self.binary = b""
        self._scope, self._receive = scope, receive
        self._begin = time.perf_counter()
        self._characters = 0

    def model(self, task: str | None = None, name: str | None = None) -> Model:
        """The model of that name; without one, that of the path; without both, the first that does the task.

        Raises:
            Refused: there is no such model, or it does not do the task.
        """
        name = name if name is not None else self._scope["path_params"].get("model")
        models = self.serving.models
        if name is not None:
            if name not in models:
                raise Refused("NotFound", f"no such model; wanted one of {', '.join(models)}", cause="model")
            found = models[name]
        else:
            found = next((model for model in models.values() if task and model.does(task)), next(iter(models.values())))
        if task is not None:
            found.check_task(task)
        return found

    def check_size(self, inputs: int, field: str = "inputs") -> None:
        """Raise Refused for no input, or for more than one request may have."""
        settings = self.serving.settings
        most = settings.most_openai_inputs if self.openai else settings.most_inputs
        if not inputs:
            raise Refused("Empty", f"`{field}` cannot be empty", cause="validation")
        if inputs > most:
            message = f"batch size {inputs} > maximum allowed batch size {most}"
            raise Refused("Validation", message, cause="batch_size")

    def acquire(self, inputs: int, windows: int = 0) -> None:
        """Count inputs as in flight until the response is sent: as many as the windows that they are read in.

        Windows count as at most a quarter of what may be in flight, so that one request leaves room for others, and so
        do inputs that are more than most requests may have.

        Raises Refused: too many are in flight already, or the parts of this request are together too many.
        """
        batcher = self.serving.batcher
        quarter = batcher.limit // 4
        places = max(min(inputs, max(self.serving.settings.most_inputs, quarter)), min(windows, quarter))
        if self.places and self.places + places > batcher.limit:
            message = f"batch size {self.places + places} > maximum concurrent requests {batcher.limit}"
            raise Refused("Validation", message, cause="batch_size")
        batcher.acquire(places)
        self.places += places

    async def run(
        self,
        model: Model,
        items: Sequence[Item],
        *,
        single: bool = False,
        field: str = "inputs",
        truncate: bool | None = None,
        side: Side | None = None,
        prompt_name: str | None = None,
        whole: bool = False,
        finish: Callable[[Job], Any] = lambda job: None,
    ) -> Job:
        """Compute inputs through the queue.

        Args:
            model: the model.
            items: the inputs.
            single: the request has one input, and not a list of one.
            field: where the inputs are in the request, for error messages.
            truncate: truncate inputs that are too long; None: as the server is set.
            side: the end at which they are truncated; None: as the model is set.
            prompt_name: the prompt to put before each.
            whole: return all hidden states.
            finish: makes the `value` of the job, on the thread that computed it; may raise Refused.

        Raises:
            Refused: the inputs are wrong, or too many are in flight.
            ClientLeft: nobody waits for the result any more.
        """
        self.check_size(len(items), field)
        settings, metrics = self.serving.settings, self.serving.metrics
        family: Family = "embed" if model.does("embedding") else "predict"
        method: Method = "single" if single else "batch"
        metrics.accepted(method, family, len(items))
        self.acquire(len(items), model.states_of(items) if whole else model.windows_of(items))
        job = Job(
            model=model,
            items=items,
            names=[field] if single else [f"{field}[{index}]" for index in range(len(items))],
            truncate=settings.auto_truncate if truncate is None else truncate,
            side=side,
            prompt=model.prompt(prompt_name),
            whole=whole,
            finish=finish,
        )
        await self._run_while_connected(job)
        self.jobs.append(job)
        self._characters += sum(map(characters, items))
        duration = time.perf_counter() - self._begin

        def count() -> None:
            seconds = {
                "duration": duration,
                "tokenization": job.tokenization,
                "queue": job.queue / len(job.sequences),
                "inference": job.inference / len(job.sequences),
            }
            metrics.answered(method, family, [len(sequence.ids) for sequence in job.sequences], len(items), seconds)

        # In the next turn of the event loop: the response is sent at the end of this one.
        asyncio.get_running_loop().call_soon(count)
        self._scope["state"]["tokens"] = self.tokens
        return job

    @property
    def tokens(self) -> int:
        """Tokens that were computed."""
        return sum(job.tokens for job in self.jobs)

    def headers(self) -> dict[str, str]:
        """Headers with times in milliseconds, of the mean input where they are not of the whole request."""
        if not self.jobs:
            return {}
        sequences = sum(len(job.sequences) for job in self.jobs)
        total = _milliseconds(time.perf_counter() - self._begin)
        return {
            "x-compute-type": "cpu",
            "x-compute-time": total,
            "x-compute-characters": str(self._characters),
            "x-compute-tokens": str(self.tokens),
            "x-total-time": total,
            "x-tokenization-time": _milliseconds(sum(job.tokenization for job in self.jobs) / len(self.jobs)),
            "x-queue-time": _milliseconds(sum(job.queue for job in self.jobs) / sequences),
            "x-inference-time": _milliseconds(sum(job.inference for job in self.jobs) / sequences),
        }

    async def respond(self, send: Send, value: Any, size: int = 0) -> None:
        """Send `value`, which may hold arrays, as JSON; `size` is about how many numbers are in it."""
        body = await made(lambda: to_json(value), size)
        headers = {"content-length": str(len(body)), "content-type": "application/json", **self.headers()}
        encoded = [(name.encode(), text.encode()) for name, text in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": encoded})
        await send({"type": "http.response.body", "body": body})

    async def each(self, function: Callable[[int], T], count: int) -> list[T]:
        """What `function` returns for 0 to `count` - 1, by a thread, one after the other.

        Threads are few: between two, others have their turn, and nothing is done for a client that has left.

        Raises ClientLeft.
        """
        leaving = asyncio.ensure_future(self._receive())
        try:
            found = []
            for index in range(count):
                if leaving.done():
                    raise ClientLeft
                found.append(await asyncio.to_thread(function, index))
            return found
        finally:
            leaving.cancel()

    async def _run_while_connected(self, job: Job) -> None:
        """Run a job, which is cancelled when the client leaves."""
        watching: list[asyncio.Future[Any]] = []

        def watch() -> None:
            leaving = asyncio.ensure_future(self._receive())  # the body was read: only a farewell can come
            leaving.add_done_callback(lambda task: None if task.cancelled() else job.cancel(ClientLeft()))
            watching.append(leaving)

        self.serving.late.add(watch)
        try:
            await self.serving.batcher.run(job)
        finally:
            self.serving.late.remove(watch)
            for leaving in watching:
                leaving.cancel()


@dataclass(frozen=True)
class Post:
    """A POST route: its path, the body that it takes, and the function that answers with a value and its size.

    `model` is the name of the one that answers, where the path does not have it as a parameter; `openai` lets requests
    have as many inputs as OpenAI takes.
    """

    path: str
    body: type[Body]
    answer: Callable[[Call, Any], Awaitable[tuple[Any, int]]]
    model: str | None = None
    openai: bool = False

    def route(self) -> Route:
        """The route for the application."""
        return Route(self.path, self, methods=["POST"], name=self.answer.__name__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; errors are left to the application."""
        if self.model is not None:
            scope["path_params"] = {"model": self.model}
        call = Call(scope, receive, openai=self.openai)
        try:
            await self._answer(call, scope, receive, _until_read(send))
        finally:
            call.serving.batcher.release(call.places)

    async def _answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        content = scope["state"]["body"]
        length = dict(scope["headers"]).get(BINARY_HEADER.encode(), b"")
        if length.isdigit() and len(length) < 10:
            content, call.binary = content[: int(length)], content[int(length) :]
        try:
            body = self.body.model_validate_json(content)
        except ValidationError as error:
            raise wrong_body(error) from None
        value, size = await self.answer(call, body)
        if isinstance(value, Response):
            await value(scope, receive, send)
        else:
            await call.respond(send, value, size)


def _until_read(send: Send) -> Send:
    """`send`, which returns behind a long body when its client has read it; by itself it returns when it is stored."""

    async def send_and_wait(message: Message) -> None:
        if message["type"] == "http.response.body" and len(message.get("body", b"")) > _STORED:
            await send({**message, "more_body": True})
            message = {"type": "http.response.body"}  # before it is sent, what is stored has to be less
        await send(message)

    return send_and_wait


def wrong_body(error: ValidationError) -> Refused:
    """JSON that is broken is 400; JSON of another form 422, as in text-embeddings-inference."""
    if error.errors(include_url=False, include_input=False)[0]["type"] == "json_invalid":
        return Refused("Validation", "the request's body is not valid JSON", status=400)
    return invalid(explained(error))


def explained(error: ValidationError) -> str:
    """What is wrong, and where, in one line."""
    found = error.errors(include_url=False, include_input=False)
    # Where several types are accepted, there is an error for each: those that went furthest tell most.
    places = [[part for part in one["loc"] if not _is_type(part)] for one in found]
    furthest = max(places, key=lambda place: (len(place), [part for part in place if isinstance(part, int)]))
    first, *others = dict.fromkeys(one["msg"] for one, place in zip(found, places, strict=True) if place == furthest)
    message = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    names = [str(part)[:60] for part in furthest]  # a parameter that is not known may be long
    return f"{'.'.join(names)}: {message}" if furthest else message


def _is_type(part: Any) -> bool:
    """Whether a part of an error's place is one of the types that are accepted there, such as list[str] or Question."""
    return isinstance(part, str) and (part in ("str", "int") or bool(re.search(r"[\[A-Z-]", part)))


async def made(make: Callable[[], T], size: int) -> T:
    """What `make` returns, which a thread calls if there are many numbers in it: the event loop is not to wait."""
    return await asyncio.to_thread(make) if size > _INLINE else make()


def to_json(value: Any) -> bytes:
    """JSON of a value that may hold numpy arrays; a number that is not finite becomes null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))
