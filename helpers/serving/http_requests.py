"""What the OpenAI endpoint does with every request: read its body, refuse it, count it, log it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Mapping

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helpers.serving import metrics
from helpers.serving.chat_request import ApiError

log = logging.getLogger("helpers.serving")
RETRY_SECONDS = 2
# For a request's body; uvicorn (0.54) sets no limit for what comes before it.
BODY_SECONDS = 30
# How much of a refused body is read on and dropped, and for how long.
DROP_BYTES = 250_000_000
DROP_SECONDS = 30


class RequestLog:
    """ASGI middleware that gives every request an id, for the log and the header, and counts it.

    An error that nothing else has answered becomes a 500, and its stack trace goes to the log.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        request.state.id = f"req_{uuid.uuid4().hex}"
        request.state.began = time.perf_counter()
        request.state.body_is_read = False
        status = None
        complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request.state.id.encode())]
            else:
                complete = not message.get("more_body")
            await send(message)

        failure = None
        try:
            await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # Uvicorn cancels what is left at the end of the grace period.
            failure = ApiError(503, "The server is stopping.")
        except Exception:
            log.exception("%s failed", request.state.id)
            failure = ApiError(500, "The server failed. Its log has more under the request id.")
        # A client that reads nothing blocks this until uvicorn closes its connection.
        with contextlib.suppress(asyncio.CancelledError):
            if failure and status is None:
                await error_response(request, failure)(scope, receive, send_with_id)
            elif failure and not complete:
                await send_with_id({"type": "http.response.body", "body": last_event(request, failure)})
        _count(request, status if complete else 499)


def _count(request: Request, status: int) -> None:
    """Count and log a request that has ended."""
    path = request.scope["path"]
    if path in ("/health", "/metrics"):
        return
    status = getattr(request.state, "failed", status)
    metrics.REQUESTS.labels(status).inc()
    metrics.ERRORS.inc(status >= 400)
    seconds = time.perf_counter() - request.state.began
    log.info("%s %s %r %s %.3f s", request.state.id, request.method, path, status, seconds)


def last_event(request: Request, error: ApiError) -> bytes:
    """The event that ends a stream with an error, which counts as the request's status."""
    request.state.failed = error.status
    log.warning("%s %d %r", request.state.id, error.status, str(error))
    return server_sent(error.body())


def server_sent(data: dict) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


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
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, HTTPException):
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
