"""The process that holds the model, and the front's end of the pipe to it.

A language model that reads a long prompt holds Python's global lock for seconds, hence the process. When the
front goes, however it goes, the pipe closes and the worker ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from helpers import tracking
from helpers.serving import chat_models

log = logging.getLogger("helpers.serving")
TRACES = "serving"  # the experiment that traces go to
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


@dataclass
class Answer:
    """One request in the worker. Its events are ("started",), ("text", piece), ("end", usage, finish_reason)
    or ("error", status, message); the last two come once."""

    id: str
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    waiting: bool = True  # for its first token


class Worker:
    """The front's handle on the model's process; all methods but the constructor belong to one event loop.

    Args:
        model_uri, tracking_uri: which model to load, from which store.
        trace_sampling: share of the answers that leave an MLflow trace, 0.0 to 1.0.
    Raises:
        RuntimeError: in one sentence, if the model could not be loaded.
    """

    def __init__(self, model_uri: str, tracking_uri: str, trace_sampling: float = 0.0):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, model_uri, tracking_uri, trace_sampling), name="model", daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.model: chat_models.ServedModel = self._receive_model(model_uri)
        except BaseException:
            self._process.kill()
            raise
        self.answers: dict[str, Answer] = {}
        # A full pipe must not hold up the event loop, and messages must keep their order: one sending thread.
        self._sender = ThreadPoolExecutor(1)
        self.alive = True

    def _receive_model(self, model_uri: str) -> chat_models.ServedModel:
        try:
            model = self._pipe.recv()
        except EOFError:
            self._process.join()
            model = f"its process ended with exit code {self._process.exitcode}"
        if isinstance(model, str):
            raise RuntimeError(f"{model_uri} could not be loaded: {model}")
        return model

    def listen(self, on_death) -> None:
        """Begin to pass the worker's events on; `on_death()` is called if it ends by itself."""
        threading.Thread(
            target=self._read, args=(asyncio.get_running_loop(), on_death), daemon=True, name="worker-events"
        ).start()

    def ask(self, request_id: str, messages: list[dict], params: dict) -> Answer:
        """Send a request; its events arrive in the answer."""
        answer = self.answers[request_id] = Answer(request_id)
        self._sender.submit(self._pipe.send, ("ask", request_id, messages, params))
        return answer

    def close(self, answer: Answer) -> None:
        """Forget an answer, and stop its work if there is any left."""
        if self.answers.pop(answer.id, None):
            self._sender.submit(self._pipe.send, ("close", answer.id))

    def stop(self, seconds: float = 5) -> None:
        """End the process, by force if it takes longer than `seconds`."""
        self.alive = False
        self._sender.submit(self._pipe.send, ("stop",))
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _read(self, loop: asyncio.AbstractEventLoop, on_death) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ends before the worker does
            try:
                while True:
                    loop.call_soon_threadsafe(self._deliver, *self._pipe.recv())
            except (EOFError, OSError):
                loop.call_soon_threadsafe(self._died, on_death)

    def _deliver(self, request_id: str, *event: Any) -> None:
        if answer := self.answers.get(request_id):
            answer.waiting = answer.waiting and event[0] != "text"
            answer.events.put_nowait(event)
            if event[0] in ("end", "error"):
                del self.answers[request_id]

    def _died(self, on_death) -> None:
        if self.alive:
            self.alive = False
            for answer in self.answers.values():
                answer.events.put_nowait(("error", 503, "The model's process has ended."))
            on_death()


def _work(pipe: Connection, model_uri: str, tracking_uri: str, trace_sampling: float) -> None:
    """The worker process: load the model, then answer until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach the group, but running answers must finish
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    if trace_sampling:
        tracking.connect(tracking_uri, TRACES)
    try:
        served, model = chat_models.load(model_uri)
    except Exception as error:
        log.debug("loading failed", exc_info=True)
        pipe.send(str(error) or repr(error))
        return
    desk = _Desk(pipe, served, model, trace_sampling)
    pipe.send(served)
    handlers = {"ask": desk.ask, "close": desk.close}
    with contextlib.suppress(EOFError, OSError):
        while (message := pipe.recv())[0] != "stop":
            handlers[message[0]](*message[1:])
    if trace_sampling:
        mlflow.flush_trace_async_logging()
    os._exit(0)  # at once: a decoding thread must not keep the process


class _Desk:
    """Answers requests side by side, each read out by a thread of its own."""

    def __init__(self, pipe: Connection, served: chat_models.ServedModel, model: Any, trace_sampling: float):
        self._pipe, self._served, self._model, self._sampling = pipe, served, model, trace_sampling
        self._lock = threading.Lock()
        self._running: dict[str, Any] = {}

    def ask(self, request_id: str, messages: list[dict], params: dict) -> None:
        try:
            started = time.time_ns()
            completion = self._running[request_id] = self._model.start(messages, params)
        except Exception as error:
            self._fail(request_id, error)
            return
        self._send(request_id, "started")
        arguments = (request_id, completion, messages, params, started)
        threading.Thread(target=self._read_out, args=arguments, daemon=True).start()

    def close(self, request_id: str) -> None:
        if completion := self._running.pop(request_id, None):
            completion.close()

    def _read_out(self, request_id: str, completion: Any, messages: list, params: dict, started: int) -> None:
        pieces = []
        try:
            for piece in completion:
                if piece:
                    pieces.append(piece)
                    self._send(request_id, "text", piece)
            # Traced before the end is told: whoever hears of it may stop the server.
            if self._sampling and random.random() < self._sampling:
                self._trace(request_id, completion, messages, params, started, "".join(pieces))
            usage = completion.prompt_tokens, completion.completion_tokens
            self._send(request_id, "end", usage, completion.finish_reason)
        except Exception as error:
            self._fail(request_id, error)
        finally:
            self._running.pop(request_id, None)

    def _send(self, *message: Any) -> None:
        with self._lock:
            self._pipe.send(message)

    def _fail(self, request_id: str, error: Exception) -> None:
        """A ValueError is the caller's, and says what to change; anything else stays in the log."""
        if isinstance(error, ValueError):
            self._send(request_id, "error", 400, str(error))
            return
        log.error("%s failed", request_id, exc_info=error)
        self._send(
            request_id, "error", 500, "The model failed. The server's log has more under the request id."
        )

    def _trace(
        self, request_id: str, completion: Any, messages: list, params: dict, started: int, text: str
    ) -> None:
        import mlflow

        served = self._served
        span = mlflow.start_span_no_context(
            "chat.completions",
            span_type="CHAT_MODEL",
            inputs={"messages": messages, **params},
            attributes={"model": served.name, "model_version": served.version},
            tags={"request_id": request_id, "model": served.name, "model_version": served.version},
            metadata={"mlflow.modelId": served.model_id} if served.model_id else None,
            start_time_ns=started,
        )
        tokens = completion.prompt_tokens, completion.completion_tokens
        usage = dict(
            zip(("input_tokens", "output_tokens", "total_tokens"), (*tokens, sum(tokens)), strict=True)
        )
        span.set_attribute("mlflow.chat.tokenUsage", usage)
        message = {"role": "assistant", "content": text}
        span.set_outputs({"choices": [{"message": message, "finish_reason": completion.finish_reason}]})
        span.end()
