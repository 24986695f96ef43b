"""An OpenAI endpoint over a registered model: `python -m helpers serve --model models:/slm-onnx@champion`.

Two processes: this front, which speaks HTTP and counts, and the worker (`worker.py`), which holds the model.
Which models can be served, `chat_models.py` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
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
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as StarletteMessage

from helpers import parameters, processes, tracking
from helpers.serving import model_process
from helpers.serving.chat_request import ApiError, ChatRequest, parse
from helpers.serving.model_process import LOG_FORMAT, Answer, Worker

log = logging.getLogger("helpers.serving")
API_KEY = "OPENAI_SERVER_API_KEY"
RETRY_SECONDS = 2
BODY_SECONDS = 30  # for a request's body; uvicorn (0.54) sets no limit for what comes before it
# How much of a refused body is read on and dropped, and for how long.
DROP_BYTES = 250_000_000
DROP_SECONDS = 30
FAREWELL_SECONDS = 2  # between the last word to those who wait at the end of the grace, and the cut
disable_created_metrics()


class Metrics:
    """Prometheus metrics. The front sees every request and every event, so it alone counts."""

    def __init__(self, worker: Worker):
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
        Gauge("requests_in_progress", "Requests being answered.", **names).set_function(
            lambda: len(worker.answers)
        )
        Gauge("queue_length", "Requests that wait for their first token.", **names).set_function(
            lambda: sum(answer.waiting for answer in worker.answers.values())
        )

    def count_tokens(self, read: int, written: int) -> None:
        self.tokens_in.inc(read)
        self.tokens_out.inc(written)


class Front:
    """The HTTP side of one worker.

    Args:
        api_key: what `Authorization: Bearer …` must hold under /v1 and for /metrics; with None, the request
            must be addressed to this machine by a loopback name.
        max_queue: requests in progress above which a new one is answered 429.
        max_body: bytes of a request's body.
        timeout: seconds an answer may take.
    """

    def __init__(self, worker: Worker, api_key: str | None, max_queue: int, max_body: int, timeout: float):
        self.worker, self.model = worker, worker.model
        self.api_key, self.max_queue, self.max_body, self.timeout = api_key, max_queue, max_body, timeout
        self.created = int(time.time())
        self.metrics = Metrics(worker)
        self.on_worker_death = lambda: None

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None, lifespan=self._lifespan)
        keyed = [Depends(self._check_caller)]
        app.get("/health")(self.health)
        app.get("/metrics", dependencies=keyed)(self.show_metrics)
        app.get("/v1/models", dependencies=keyed)(self.models)
        app.get("/v1/models/{name}", dependencies=keyed)(self.one_model)
        app.post("/v1/chat/completions", dependencies=keyed)(self.chat)
        app.exception_handler(ApiError)(_error_response)
        app.exception_handler(HTTPException)(
            lambda request, error: _error_response(
                request, ApiError(error.status_code, f"{error.detail}."), error.headers
            )
        )
        app.add_middleware(_UnreadBodies)
        app.add_middleware(_RequestIds, metrics=self.metrics)
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.model_process.listen(self.on_worker_death, self.metrics.count_tokens)
        yield

    def stop(self) -> None:
        """End all answers in progress, and say why."""
        for answer in list(self.worker.answers.values()):
            self.model_process.give_up(answer, 503, "The server is stopping.")

    async def _check_caller(self, request: Request) -> None:
        """The key; without one, the address: a web page can point a name of its own at 127.0.0.1."""
        if not self.api_key:
            name = re.sub(r":\d*$", "", request.headers.get("host", ""))
            if not _is_loopback(name.strip("[]").lower()):
                message = f"Host {name[:100]!r} is not localhost, 127.0.0.1 or [::1], and no API key is set."
                raise ApiError(403, message, code="host_not_allowed")
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(key.encode(), self.api_key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")

    async def health(self) -> Response:
        status = 200 if self.worker.alive else 503
        return JSONResponse(
            {"status": "ok" if self.worker.alive else "the model's process has ended"}, status
        )

    async def show_metrics(self) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    def _model(self) -> dict:
        return {"id": self.model.name, "object": "model", "created": self.created, "owned_by": "mlflow"}

    async def models(self) -> dict:
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, name: str) -> dict:
        self._check_model(name)
        return self._model()

    def _check_model(self, name: str) -> None:
        if name != self.model.name:
            message = f"There is no model {name[:100]!r} here; the one served is {self.model.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat(self, request: Request) -> Response:
        arrived = time.perf_counter()
        call = parse(await self._read(request))
        self._check_model(call.model)
        messages, params = [message.plain() for message in call.messages], call.params()
        if self.model.system_message is not None and all(m["role"] != "system" for m in messages):
            messages.insert(0, {"role": "system", "content": self.model.system_message})
        if len(self.worker.answers) >= self.max_queue:
            raise ApiError(429, f"{self.max_queue} requests are in progress. Try again.", code="queue_full")
        events = self._events(self.model_process.ask(request.state.id, messages, params), request, arrived)
        await anext(events)  # the start, or an error while the answer can still have a status of its own
        if call.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            chunks = self._chunks(events, request, call)
            return StreamingResponse(chunks, headers=headers, media_type="text/event-stream")
        pieces = []
        async for kind, *event in events:
            if kind == "text":
                pieces += event
        usage, finish_reason = event
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        head = self._head(request, "chat.completion")
        return JSONResponse(head | {"choices": [choice], "usage": _usage(*usage)})

    async def _read(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":  # which no web page may send unasked
            raise ApiError(415, f"The content type is {kind[:100]!r}, not application/json.")
        body, too_long = bytearray(), ApiError(413, f"The body is longer than {self.max_body} bytes.")
        if int(request.headers.get("content-length", 0)) > self.max_body:
            raise too_long
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self.max_body:
                        raise too_long
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} s.") from None
        except ClientDisconnect:
            raise ApiError(499, "The client has gone.") from None
        return bytes(body)

    async def _events(self, answer: Answer, request: Request, arrived: float) -> AsyncIterator[tuple]:
        """The worker's events up to the end; the work stops with this generator, whatever the reason.

        Raises:
            ApiError: for an error in the worker, a time-out, or a client that has gone.
        """
        gone = asyncio.create_task(_disconnected(request))
        gone.add_done_callback(lambda _: self.model_process.give_up(answer, 499, "The client has gone."))
        # Both end the work by themselves: nobody takes events while a slow reader's socket is full.
        late = f"The answer took longer than {self.timeout:g} s."
        alarm = asyncio.get_running_loop().call_later(self.timeout, self.worker.give_up, answer, 504, late)
        first = True
        try:
            while True:
                kind, *event = await answer.events.get()
                if kind == "error":
                    raise ApiError(*event)
                if kind == "text" and first:
                    self.metrics.first_token.observe(time.perf_counter() - arrived)
                    first = False
                yield kind, *event
                if kind == "end":
                    return
        finally:
            alarm.cancel()
            gone.cancel()
            self.model_process.close(answer)

    async def _chunks(
        self, events: AsyncIterator[tuple], request: Request, call: ChatRequest
    ) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        include_usage = bool(call.stream_options and call.stream_options.include_usage)
        head = self._head(request, "chat.completion.chunk") | ({"usage": None} if include_usage else {})

        def chunk(delta: dict, finish_reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return _sse(head | {"choices": [choice]})

        try:
            yield chunk({"role": "assistant", "content": ""})
            async for kind, *event in events:
                if kind == "text":
                    yield chunk({"content": event[0]})
            usage, finish_reason = event
            yield chunk({}, finish_reason)
            if include_usage:
                yield _sse(head | {"choices": [], "usage": _usage(*usage)})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            request.state.failed = error.status
            log.warning("%s %d %r", request.state.id, error.status, str(error))
            yield _sse(error.body())

    def _head(self, request: Request, kind: str) -> dict:
        answer_id = request.state.id.replace("req_", "chatcmpl-")
        return {"id": answer_id, "object": kind, "created": int(time.time()), "model": self.model.name}


def _usage(prompt: int, completion: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _sse(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_response(request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    log.warning("%s %d %r", request.state.id, error.status, str(error))
    if error.status in (429, 503):
        headers = {"Retry-After": str(RETRY_SECONDS)}
    return JSONResponse(error.body(), error.status, headers)


class _UnreadBodies:
    """Reads on and drops what is left of a request's body when its answer, a refusal, is already there.

    A server that closes a connection on which the client still sends resets it, and the client may never see
    the answer. So the answer goes out whole, and its end follows when the body has ended, or after DROP_BYTES
    or DROP_SECONDS of it.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", []))
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

        async def receive_and_note() -> StarletteMessage:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def send_and_drop(message: StarletteMessage) -> None:
            if unread and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif unread and not message.get("more_body"):
                await send(message | {"more_body": True})
                await _drop_body(receive)
                message = {"type": "http.response.body"}
            await send(message)

        await self.app(scope, receive_and_note, send_and_drop)


async def _drop_body(receive: Receive) -> None:
    dropped = 0
    # Cancelled is who still waits when the server is cut off.
    with contextlib.suppress(TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(DROP_SECONDS):
            while dropped < DROP_BYTES and (message := await receive()).get("more_body"):
                dropped += len(message["body"])


class _RequestIds:
    """Gives every request an id, for the log and the header; counts it; keeps stack traces in."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["id"] = f"req_{uuid.uuid4().hex}"
        began, status, complete = time.perf_counter(), None, False

        async def send_with_id(message: StarletteMessage) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            else:
                complete = not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):  # the server's grace is over
                failure = ApiError(503, "The server is stopping.")
            else:
                log.exception("%s failed", request_id)
                failure = ApiError(500, "The server failed. Its log has more under the request id.")
            if status is None:
                await _error_response(Request(scope), failure)(scope, receive, send_with_id)
        finally:
            if scope["path"] not in ("/health", "/metrics"):
                ended = scope["state"].get("failed") or (status if complete else 499)
                self.metrics.requests.labels(ended).inc()
                self.metrics.errors.inc(ended >= 400)
                seconds = time.perf_counter() - began
                log.info("%s %s %r %s %.3f s", request_id, scope["method"], scope["path"], ended, seconds)


class _Server(uvicorn.Server):
    """Uvicorn cuts off who still waits at the end of the grace; here they are told before."""

    def __init__(self, config: uvicorn.Config, front: Front, grace: int):
        super().__init__(config)
        self._front, self._grace = front, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace, self._front.stop)
        await super().shutdown(sockets)


def serve(
    model_uri: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    *,
    tracking_uri: str | None = None,
    trace_sampling: float = 0.0,
    max_queue: int = 64,
    max_body: int = 1_000_000,
    timeout: float = 600,
    grace: int = 30,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C; then refuse new requests and finish those in progress.

    Args:
        model_uri: such as `models:/slm-onnx@champion`.
        host, port: the address to listen on; anything but this machine's loopback needs an API key.
        api_key: None reads the environment variable OPENAI_SERVER_API_KEY.
        tracking_uri: the store with the model and for traces; None for the project's.
        trace_sampling: share of the answers that leave an MLflow trace, 0.0 to 1.0.
        max_queue: requests in progress above which a new one is answered 429.
        max_body: bytes of a request's body.
        timeout: seconds an answer may take.
        grace: seconds that answers in progress have to finish when the server is stopped.
    Raises:
        ValueError: for a public address without a key, or a sampling rate outside 0 to 1.
        RuntimeError: if another program listens there, the model cannot be loaded, or its process dies.
    """
    api_key = api_key or os.environ.get(API_KEY) or None
    store = parameters.store(tracking_uri or "", "--tracking-uri") or tracking.default_uri()
    if not 0 <= trace_sampling <= 1:
        raise ValueError(f"trace_sampling={trace_sampling} is not between 0 and 1.")
    if not api_key and not _is_loopback(host):
        raise ValueError(f"host={host} can be reached by others: set {API_KEY}, or use --host 127.0.0.1.")
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the model's process is ended, too
    processes.refuse_if_taken(port, host)
    # Bound before the model is loaded, which takes long; refused until it is.
    config = uvicorn.Config(
        app=None,
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=grace + FAREWELL_SECONDS,
    )
    listener = config.bind_socket()
    log.info("Loading %s", model_uri)
    worker = Worker(model_uri, store, trace_sampling)
    try:
        front = Front(worker, api_key, max_queue, max_body, timeout)
        config.app = front.app()
        server = _Server(config, front, grace)
        front.on_worker_death = lambda: setattr(server, "should_exit", True)
        name, bound = listener.getsockname()[:2]
        url = f"http://{f'[{name}]' if ':' in name else name}:{bound}/v1"
        log.info("Serving %s at %s (Ctrl-C ends it)", worker.model.full_name, url)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        if not worker.alive:
            raise RuntimeError("The model's process ended, so the server did. Start it again.")
    finally:
        model_process.stop()


def running(
    model_uri: str,
    *,
    port: int | None = None,
    startup_timeout: float = 300,
    api_key: str | None = None,
    **options,
) -> AbstractContextManager[str]:
    """Serve a model in the background, and end the server with the block, whatever happens in it.

    Args:
        model_uri, options: as of `serve`; the tracking store is the one of this process.
        api_key: None asks for none, for only this machine is served.
        port: of 127.0.0.1; None takes a free one.
        startup_timeout: seconds until the server must be healthy.
    Yields:
        The server's URL; an OpenAI client takes it with `/v1` behind.
    Raises:
        RuntimeError: with the last lines of the server's log, if it does not come up.
    """
    port = port or processes.free_port()
    code = f"from {__name__} import serve; serve({model_uri!r}, port={port}, **{options!r})"
    command = [sys.executable, "-c", code]
    what, key = f"an OpenAI server for {model_uri}", {API_KEY: api_key or ""}
    return processes.running(command, port, what, startup_timeout, secrets=key)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
