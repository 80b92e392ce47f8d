"""A span per request for an OpenTelemetry collector."""

from starlette.types import ASGIApp

# Searched for in the whole address, which may have these words in the name of a model or in the query.
EXCLUDED = r"^\w+://[^/]*/(health|ping|metrics|v2/health/(live|ready))(\?|$)"


def traced(app: ASGIApp, endpoint: str) -> ASGIApp:
    """The application, with a span of every request but those for health and metrics.

    A span continues the trace that the `traceparent` header names; it holds no text and no key. Call it in the process
    that serves: spans are sent by a thread.

    Args:
        app: the application.
        endpoint: URL of a collector's OTLP over HTTP, such as http://localhost:4318.

    Raises:
        ImportError: the otel extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ImportError("--otlp-endpoint needs OpenTelemetry: pip install 'pruneofa[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "pruneofa"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    return OpenTelemetryMiddleware(
        app, excluded_urls=EXCLUDED, tracer_provider=provider, exclude_spans=["receive", "send"]
    )
