"""What the OpenAI endpoint does with every request: read its body, refuse it, count it, log it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Mapping

from fastapi import Request
from fastapi.responses import JSONResponse
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helpers.serving.chat_request import ApiError
from helpers.serving.model_process import Answer

log = logging.getLogger("helpers.serving")
RETRY_SECONDS = 2
# For a request's body; uvicorn (0.54) sets no limit for what comes before it.
BODY_SECONDS = 30
# How much of a refused body is read on and dropped, and for how long.
DROP_BYTES = 250_000_000
DROP_SECONDS = 30
disable_created_metrics()


class Metrics:
    """Prometheus metrics. The server sees every request and every event of the model, so it alone counts.

    Args:
        answers: those in progress.
    """

    def __init__(self, answers: Mapping[str, Answer]):
        self.registry = CollectorRegistry()
        names = {"namespace": "chat", "registry": self.registry}
        help_text = "Requests, by the status they ended with, also in a stream; 499: the client has gone."
        self.requests = Counter("requests", help_text, ["status"], **names)
        self.errors = Counter("errors", "Requests that failed, before or during the answer.", **names)
        self.tokens_in = Counter("prompt_tokens", "Tokens read.", **names)
        self.tokens_out = Counter("completion_tokens", "Tokens written.", **names)
        buckets = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        help_text = "From a request's arrival to the first text of its answer."
        self.first_token = Histogram("time_to_first_token_seconds", help_text, buckets=buckets, **names)
        in_progress = Gauge("requests_in_progress", "Requests being answered.", **names)
        in_progress.set_function(lambda: len(answers))
        waiting = Gauge("queue_length", "Requests that wait for their first token.", **names)
        waiting.set_function(lambda: sum(answer.waiting for answer in answers.values()))

    def count_tokens(self, read: int, written: int) -> None:
        self.tokens_in.inc(read)
        self.tokens_out.inc(written)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class RequestLog:
    """ASGI middleware that gives every request an id, for the log and the header, and counts it.

    An error that nothing else has answered becomes a 500, and its stack trace goes to the log.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {}).update(id=request_id, body_is_read=False)
        began = time.perf_counter()
        status = None
        complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            else:
                complete = not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # Uvicorn cancels what is left at the end of the grace period.
            if status is None:
                response = error_response(Request(scope), ApiError(503, "The server is stopping."))
                await response(scope, receive, send_with_id)
        except Exception:
            log.exception("%s failed", request_id)
            if status is None:
                message = "The server failed. Its log has more under the request id."
                await error_response(Request(scope), ApiError(500, message))(scope, receive, send_with_id)
        finally:
            if scope["path"] not in ("/health", "/metrics"):
                ended = scope["state"].get("failed") or (status if complete else 499)
                self.metrics.requests.labels(ended).inc()
                self.metrics.errors.inc(ended >= 400)
                seconds = time.perf_counter() - began
                log.info("%s %s %r %s %.3f s", request_id, scope["method"], scope["path"], ended, seconds)


async def read_body(request: Request, longest: int) -> bytes:
    """The body of a request; ApiError if it is not JSON, has more than `longest` bytes, or is late."""
    kind = request.headers.get("content-type", "")
    # No web page may send JSON to another address without asking first.
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"The content type is {kind[:100]!r}, not application/json.")
    too_long = ApiError(413, f"The body is longer than {longest} bytes.")
    if int(request.headers.get("content-length", 0)) > longest:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > longest:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} s.") from None
    except ClientDisconnect:
        raise ApiError(499, "The client has gone.") from None
    request.state.body_is_read = True
    return bytes(body)


def error_response(
    request: Request, error: ApiError, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's shape; it is logged under the request's id."""
    log.warning("%s %d %r", request.state.id, error.status, str(error))
    headers = dict(headers or {})
    if error.status in (429, 503):
        headers["Retry-After"] = str(RETRY_SECONDS)
    return JSONResponse(error.body(), error.status, headers)


async def refuse(request: Request, error: ApiError | HTTPException) -> JSONResponse:
    """Answer with an error when the client has sent all of its body.

    A server that closes a connection on which the client still sends resets it, and the client may never see
    the answer.
    """
    headers = {}
    if isinstance(error, HTTPException):
        headers |= error.headers or {}
        error = ApiError(error.status_code, f"{error.detail}.")
    if error.status == 408 or not await _drop_body(request):
        headers["Connection"] = "close"
    return error_response(request, error, headers)


async def _drop_body(request: Request) -> bool:
    """Read on what is left of a body, and drop it; whether its end has come."""
    if request.state.body_is_read:
        return True
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DROP_SECONDS):
            while dropped < DROP_BYTES:
                message = await request.receive()
                if not message.get("more_body"):
                    return True
                dropped += len(message["body"])
    return False
