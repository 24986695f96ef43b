"""An OpenAI endpoint over a registered model: `python -m helpers serve --model models:/slm-onnx@champion`.

Two processes: this server, which speaks HTTP and counts, and one that holds the model (`model_process.py`).
Which models can be served, `chat_models.py` says; what a request may ask, `chat_request.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from helpers import parameters, processes, tracking
from helpers.serving import metrics, model_process
from helpers.serving.chat_request import ApiError, ChatRequest, parse
from helpers.serving.http_requests import RequestLog, last_event, read_body, refuse, server_sent
from helpers.serving.model_process import ModelProcess

log = logging.getLogger("helpers.serving")
API_KEY = "OPENAI_SERVER_API_KEY"


@dataclass
class ChatServer:
    """The HTTP side of one model; its settings are those of `serve`."""

    process: ModelProcess
    api_key: str | None
    max_queue: int
    max_body: int
    timeout: float
    created: int = field(default_factory=lambda: int(time.time()))

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        keyed = [Depends(self._check_caller)]
        app.get("/health")(self.health)
        app.get("/metrics", dependencies=keyed)(self.show_metrics)
        app.get("/v1/models", dependencies=keyed)(self.models)
        app.get("/v1/models/{name}", dependencies=keyed)(self.one_model)
        app.post("/v1/chat/completions", dependencies=keyed)(self.chat)
        app.exception_handler(ApiError)(refuse)
        app.exception_handler(HTTPException)(refuse)
        app.add_middleware(RequestLog)
        metrics.IN_PROGRESS.set_function(lambda: len(self.process.answers))
        return app

    async def _check_caller(self, request: Request) -> None:
        """The key; without one, the address: a web page can point a name of its own at 127.0.0.1."""
        if not self.api_key:
            name = re.sub(r":\d*$", "", request.headers.get("host", ""))
            if not processes.is_loopback(name.strip("[]").lower()):
                message = f"Host {name[:100]!r} is not localhost, 127.0.0.1 or [::1], and no API key is set."
                raise ApiError(403, message, code="host_not_allowed")
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(key.encode(), self.api_key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")

    async def health(self) -> Response:
        if self.process.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the model's process has ended"}, 503)

    async def show_metrics(self) -> Response:
        return Response(generate_latest(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict:
        return {"object": "list", "data": [await self.one_model(self.process.model.name)]}

    async def one_model(self, name: str) -> dict:
        self._check_model(name)
        return {"id": name, "object": "model", "created": self.created, "owned_by": "mlflow"}

    def _check_model(self, name: str) -> None:
        served = self.process.model.name
        if name != served:
            message = f"There is no model {name[:100]!r} here; the one served is {served!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat(self, request: Request) -> Response:
        call = parse(await read_body(request, self.max_body))
        self._check_model(call.model)
        messages = [message.plain() for message in call.messages]
        system_message = self.process.model.system_message
        if system_message is not None and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": system_message})
        params = call.params()
        if len(self.process.answers) >= self.max_queue:
            raise ApiError(429, f"{self.max_queue} requests are in progress. Try again.", code="queue_full")
        events = self._events(request, messages, params)
        # "started", or an error while the answer can still have a status of its own.
        await anext(events)
        if call.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            chunks = self._chunks(events, request, call)
            return StreamingResponse(chunks, headers=headers, media_type="text/event-stream")
        return await self._whole(events, request)

    async def _events(self, request: Request, messages: list[dict], params: dict) -> AsyncIterator[list]:
        """The model's events up to the end; the work stops with this generator, whatever the reason.

        Raises:
            ApiError: for an error in the model, a time-out, or a client that has gone.
        """
        request_id = request.state.id
        answer = self.process.ask(request_id, messages, params)
        give_up = functools.partial(self.process.give_up, request_id)
        # These two end the work by themselves: nobody takes events while a slow reader's socket is full.
        gone = asyncio.create_task(_disconnected(request))
        gone.add_done_callback(lambda _: give_up(499, "The client has gone."))
        late = f"The answer took longer than {self.timeout:g} s."
        alarm = asyncio.get_running_loop().call_later(self.timeout, give_up, 504, late)
        waiting = True
        metrics.WAITING.inc()
        try:
            while True:
                event = await answer.get()
                if event[0] == "error":
                    raise ApiError(*event[1:])
                if event[0] == "text" and waiting:
                    waiting = False
                    metrics.WAITING.dec()
                    metrics.FIRST_TOKEN.observe(time.perf_counter() - request.state.began)
                yield event
                if event[0] == "end":
                    return
        finally:
            if waiting:
                metrics.WAITING.dec()
            alarm.cancel()
            gone.cancel()
            self.process.close(request_id)

    async def _whole(self, events: AsyncIterator[list], request: Request) -> Response:
        pieces = []
        async for kind, *event in events:
            if kind == "text":
                pieces += event
        usage, finish_reason = event
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        head = self._head(request, "chat.completion")
        return JSONResponse(head | {"choices": [choice], "usage": usage})

    async def _chunks(
        self, events: AsyncIterator[list], request: Request, call: ChatRequest
    ) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        include_usage = bool(call.stream_options and call.stream_options.include_usage)
        head = self._head(request, "chat.completion.chunk") | ({"usage": None} if include_usage else {})

        def chunk(delta: dict, finish_reason: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return server_sent(head | {"choices": [choice]})

        try:
            yield chunk({"role": "assistant", "content": ""})
            async for kind, *event in events:
                if kind == "text":
                    yield chunk({"content": event[0]})
            usage, finish_reason = event
            yield chunk({}, finish_reason)
            if include_usage:
                yield server_sent(head | {"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield last_event(request, error)

    def _head(self, request: Request, kind: str) -> dict:
        answer_id = request.state.id.replace("req_", "chatcmpl-")
        return {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": self.process.model.name,
        }


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
        api_key: what `Authorization: Bearer …` must hold under /v1 and for /metrics; None reads it from
            OPENAI_SERVER_API_KEY. Without a key, requests must call this machine by a loopback name.
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
    if not api_key and not processes.is_loopback(host):
        raise ValueError(f"host={host} can be reached by others: set {API_KEY}, or use --host 127.0.0.1.")
    logging.basicConfig(level=logging.INFO, format=model_process.LOG_FORMAT)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Python's own handler of Ctrl-C would let asyncio cancel the wait for the model's last traces.
        signal.signal(number, _interrupt)
    processes.refuse_if_taken(port, host)
    # Bound before the model is loaded, which takes long; connections are refused until it is.
    config = uvicorn.Config(
        None, host, port, access_log=False, log_level="warning", timeout_graceful_shutdown=grace
    )
    listener = config.bind_socket()
    log.info("Loading %s", model_uri)
    model = model_process.running(model_uri, store, trace_sampling)
    settings = {"api_key": api_key, "max_queue": max_queue, "max_body": max_body, "timeout": timeout}
    asyncio.run(_serve(model, functools.partial(ChatServer, **settings), config, listener))


async def _serve(
    model: AbstractAsyncContextManager[ModelProcess],
    chat_server: Callable[[ModelProcess], ChatServer],
    config: uvicorn.Config,
    listener: socket.socket,
) -> None:
    async with model as process:
        config.app = chat_server(process).app()
        server = uvicorn.Server(config)
        events = asyncio.create_task(process.read_events())
        events.add_done_callback(lambda _: setattr(server, "should_exit", True))
        name, port = listener.getsockname()[:2]
        url = f"http://{f'[{name}]' if ':' in name else name}:{port}/v1"
        log.info("Serving %s at %s (Ctrl-C ends it)", process.model.full_name, url)
        # Uvicorn raises the signal that stopped it once more, when it has stopped.
        with contextlib.suppress(KeyboardInterrupt):
            await server.serve(sockets=[listener])
        if not process.alive:
            raise RuntimeError("The model's process ended, so the server did. Start it again.")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


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
    what = f"an OpenAI server for {model_uri}"
    return processes.running(command, port, what, startup_timeout, secrets={API_KEY: api_key or ""})
