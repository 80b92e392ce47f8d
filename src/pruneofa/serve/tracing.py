"""A span per request for an OpenTelemetry collector."""

import contextlib
import importlib
from collections.abc import Iterator

from starlette.types import ASGIApp

# Searched for in the whole address, which may have these words in the name of a model or in the query.
EXCLUDED = r"^\w+://[^/]*/(health|ping|metrics|v2/health/(live|ready))(\?|$)"
_PARTS = ("exporter.otlp.proto.http.trace_exporter", "instrumentation.asgi", "sdk.trace.export")


def check_extra() -> None:
    """Raise ImportError if the otel extra is not installed."""
    try:
        for part in _PARTS:
            importlib.import_module(f"opentelemetry.{part}")
    except ImportError:
        raise ImportError("--otlp-endpoint needs OpenTelemetry: pip install 'pruneofa[otel]'") from None


@contextlib.contextmanager
def traced(app: ASGIApp, endpoint: str | None) -> Iterator[ASGIApp]:
    """The application, with a span of every request but those for health and metrics; the last are sent at the end.

    A span continues the trace that the `traceparent` header names; it holds no text and no key. Call it in the process
    that serves: spans are sent by a thread.

    Args:
        app: the application.
        endpoint: URL of a collector's OTLP over HTTP, such as http://localhost:4318; None: no spans.
    """
    if endpoint is None:
        yield app
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "pruneofa"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    try:
        yield OpenTelemetryMiddleware(
            app, excluded_urls=EXCLUDED, tracer_provider=provider, exclude_spans=["receive", "send"]
        )
    finally:
        provider.shutdown()  # not left to atexit, which a worker does not run
