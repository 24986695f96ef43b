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
from collections.abc import Callable
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
    or ("error", status, message) with a code and a parameter, where there are any; one of the last two comes,
    once."""

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

    def listen(self, on_death: Callable[[], None], on_tokens: Callable[[int, int], None]) -> None:
        """Begin to pass the worker's events on.

        Args:
            on_death: called if the process ends by itself.
            on_tokens: called with the tokens read and written of every answer that ends, abandoned or not.
        """
        self._on_death, self._on_tokens = on_death, on_tokens
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), daemon=True, name="worker-events").start()

    def ask(self, request_id: str, messages: list[dict], params: dict) -> Answer:
        """Send a request; its events arrive in the answer."""
        answer = self.answers[request_id] = Answer(request_id)
        self._sender.submit(self._pipe.send, ("ask", request_id, messages, params))
        return answer

    def close(self, answer: Answer) -> bool:
        """Forget an answer and stop its work; whether there was any left."""
        running = self.answers.pop(answer.id, None) is not None
        if running:
            self._sender.submit(self._pipe.send, ("close", answer.id))
        return running

    def give_up(self, answer: Answer, status: int, reason: str) -> None:
        """Close an answer, and tell its reader why, if there is any work left."""
        if self.close(answer):
            answer.events.put_nowait(("error", status, reason))

    def stop(self, seconds: float = 5) -> None:
        """End the process, by force if it takes longer than `seconds`."""
        self.alive = False
        self._sender.submit(self._pipe.send, ("stop",))
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ends before the worker does
            try:
                while True:
                    loop.call_soon_threadsafe(self._deliver, *self._pipe.recv())
            except (EOFError, OSError):
                loop.call_soon_threadsafe(self._died)

    def _deliver(self, request_id: str, *event: Any) -> None:
        if event[0] == "end":
            self._on_tokens(*event[1])
        if answer := self.answers.get(request_id):
            answer.waiting = answer.waiting and event[0] != "text"
            answer.events.put_nowait(event)
            if event[0] in ("end", "error"):
                del self.answers[request_id]

    def _died(self) -> None:
        if self.alive:
            self.alive = False
            for answer in self.answers.values():
                answer.events.put_nowait(("error", 503, "The model's process has ended."))
            self._on_death()


def _work(pipe: Connection, model_uri: str, tracking_uri: str, trace_sampling: float) -> None:
    """The worker process: load the model, then answer until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach the group, but running answers must finish
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    import mlflow

    try:
        tracking.open_store(tracking_uri)
        tracking.refuse_if_gone(model_uri)
        served, model = chat_models.load(model_uri)
        if trace_sampling:
            # Beside the model, while `connect` would enter a server's workspace of that name.
            tracking.choose_experiment(TRACES, "serve without traces (trace sampling 0).")
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


@dataclass
class _Call:
    """What a trace tells of a request, apart from its completion."""

    id: str
    messages: list[dict]
    params: dict
    text: str = ""
    started: int = field(default_factory=time.time_ns)


class _Desk:
    """Answers requests side by side, each read out by a thread of its own."""

    def __init__(self, pipe: Connection, served: chat_models.ServedModel, model: Any, trace_sampling: float):
        self._pipe, self._served, self._model, self._sampling = pipe, served, model, trace_sampling
        self._lock = threading.Lock()
        self._running: dict[str, Any] = {}

    def ask(self, request_id: str, messages: list[dict], params: dict) -> None:
        """Begin an answer. A ValueError is the caller's and says what to change; the rest is logged."""
        call = _Call(request_id, messages, params)
        try:
            completion = self._running[request_id] = self._model.start(messages, params)
        except Exception as error:
            self._trace(call, error=error)
            if isinstance(error, chat_models.ContextLengthError):
                self._send(request_id, "error", 400, str(error), error.code, error.param)
            elif isinstance(error, ValueError):
                self._send(request_id, "error", 400, str(error))
            else:
                self._fail(request_id, error)
            return
        self._send(request_id, "started")
        threading.Thread(target=self._read_out, args=(call, completion), daemon=True).start()

    def close(self, request_id: str) -> None:
        if completion := self._running.pop(request_id, None):
            completion.close()

    def _read_out(self, call: _Call, completion: Any) -> None:
        # Traced before the end is told: whoever hears of it may stop the server.
        try:
            for piece in completion:
                if piece:
                    call.text += piece
                    self._send(call.id, "text", piece)
            self._trace(call, completion)
            usage = completion.prompt_tokens, completion.completion_tokens
            self._send(call.id, "end", usage, completion.finish_reason)
        except Exception as error:
            self._trace(call, completion, error)
            self._fail(call.id, error)
        finally:
            self._running.pop(call.id, None)

    def _send(self, *message: Any) -> None:
        with self._lock:
            self._pipe.send(message)

    def _fail(self, request_id: str, error: Exception) -> None:
        log.error("%s failed", request_id, exc_info=error)
        self._send(
            request_id, "error", 500, "The model failed. The server's log has more under the request id."
        )

    def _trace(self, call: _Call, completion: Any = None, error: Exception | None = None) -> None:
        """Leave a trace of a call that has ended, if it is one of the sample."""
        if not self._sampling or random.random() >= self._sampling:
            return
        import mlflow

        served = self._served
        names = {"model": served.name, "model_version": served.full_name}
        span = mlflow.start_span_no_context(
            "chat.completions",
            span_type="CHAT_MODEL",
            inputs={"messages": call.messages, **call.params},
            attributes=names,
            tags={"request_id": call.id, **names},
            metadata={"mlflow.modelId": served.model_id} if served.model_id else None,
            start_time_ns=call.started,
        )
        if completion:
            read, written = completion.prompt_tokens, completion.completion_tokens
            usage = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
            span.set_attribute("mlflow.chat.tokenUsage", usage)
            message = {"role": "assistant", "content": call.text}
            span.set_outputs({"choices": [{"message": message, "finish_reason": completion.finish_reason}]})
        if error:
            span.record_exception(error)
        span.end()
