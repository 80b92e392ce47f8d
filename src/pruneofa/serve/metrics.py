"""Metrics under the names of text-embeddings-inference, for Prometheus."""

import os
import re
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector

Family = Literal["embed", "predict"]
Method = Literal["single", "batch"]

_SECONDS = tuple(1e-5 * 1.5**power for power in range(1, 36))
_COUNTS = tuple(2.0**power for power in range(21))


def count_in_place(place: int) -> None:
    """Continue the files of the worker that had this place before, of which a scrape would read more and more.

    Call it before there are metrics.
    """
    values.ValueClass = values.MultiProcessValue(lambda: place)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._count = self._by_method("te_request_count", "requests")
        self._success = self._by_method("te_request_success", "requests that were answered")
        self._failure = self._counter("te_request_failure", "requests that were refused or failed", "err")
        self._durations = {
            part: self._histogram(f"te_request_{part}", "seconds", _SECONDS)
            for part in ("duration", "tokenization_duration", "queue_duration", "inference_duration")
        }
        self._lengths = self._histogram("te_request_input_length", "tokens of an input", _COUNTS)
        self._batch_size = self._histogram("te_batch_next_size", "sequences of a batch", _COUNTS)
        self._batch_tokens = self._histogram("te_batch_next_tokens", "tokens of a batch", _COUNTS)
        self._queue = Gauge(
            "te_queue_size", "sequences that wait", registry=self._registry, multiprocess_mode="livesum"
        )
        self._families = {
            family: {
                "count": self._counter(f"te_{family}_count", "inputs"),
                "success": self._counter(f"te_{family}_success", "inputs that were answered"),
                "duration": self._histogram(f"te_{family}_duration", "seconds of an input's request", _SECONDS),
                **{
                    part: self._histogram(f"te_{family}_{part}_duration", "seconds", _SECONDS)
                    for part in ("tokenization", "queue", "inference")
                },
            }
            for family in ("embed", "predict")
        }

    def batch(self, sequences: int, tokens: int) -> None:
        """A batch is computed."""
        self._batch_size.observe(sequences)
        self._batch_tokens.observe(tokens)

    def accepted(self, method: Method, family: Family, inputs: int) -> None:
        """A request has come."""
        self._count[method].inc()
        self._families[family]["count"].inc(inputs)

    def refused(self, cause: str) -> None:
        """A request was refused, or failed."""
        self._failure.labels(cause).inc()

    def answered(
        self,
        method: Method,
        family: Family,
        lengths: list[int],
        inputs: int,
        seconds: dict[str, float],
    ) -> None:
        """A request was answered.

        Args:
            method: whether it had one input.
            family: what it asked for.
            lengths: tokens of its sequences.
            inputs: number of its inputs.
            seconds: "duration" in all, and of the mean input "tokenization", "queue" and "inference".
        """
        self._success[method].inc()
        self._families[family]["success"].inc(inputs)
        for length in lengths:
            self._lengths.observe(length)
        for part, value in seconds.items():
            self._durations[part if part == "duration" else f"{part}_duration"].observe(value)
            self._families[family][part].observe(value)

    def queued(self, sequences: int) -> None:
        """So many sequences wait in the queue of this process: what is stored counts when another one is asked."""
        self._queue.set(sequences)

    def text(self) -> bytes:
        """Everything in Prometheus' text format, of all workers."""
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # the folder that all workers share
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        # The library ends the names of counters in _total; text-embeddings-inference does not.
        return re.sub(rb"(?m)^(# (?:HELP|TYPE) )?(te_\w+)_total", rb"\1\2", generate_latest(registry))

    def _counter(self, name: str, what: str, *labels: str) -> Any:
        return Counter(name, what, labels, registry=self._registry)

    def _by_method(self, name: str, what: str) -> dict[Method, Any]:
        counter = self._counter(name, what, "method")
        return {method: counter.labels(method) for method in ("single", "batch")}

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Any:
        return Histogram(name, what, buckets=buckets, registry=self._registry)
