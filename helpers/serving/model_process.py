"""The process that holds the model, and the server's handle on it.

A language model that reads a long prompt holds Python's global lock for seconds. In a process of its own it
does not delay the server's other answers. The two send each other lines of JSON through standard input and
output. The input ends with the server, however that goes, and the model's process with the input: see
`processes.when_parent_ends`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any, TextIO

from helpers import faults, processes, tracking
from helpers.serving import chat_models, metrics
from helpers.serving.chat_request import ApiError

log = logging.getLogger("helpers.serving")
TRACES = "serving"  # The experiment that traces go to.
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
STOP_SECONDS = 5  # How long the process may take to send its last traces.
LONGEST_LINE = 2**26  # Bytes of one event.


# The server's side.


class ModelProcess:
    """The server's handle on the model's process. It belongs to one event loop.

    The events of an answer are ("started",), ("text", piece), ("end", usage, finish_reason) or ("error",
    status, message) with a code and a parameter, where there are any. One of the last two comes, once.
    """

    def __init__(self, process: asyncio.subprocess.Process, model: chat_models.ServedModel):
        self._process = process
        self.model = model
        # The events of the answers in progress, by the request's id.
        self.answers: dict[str, asyncio.Queue] = {}
        self.alive = True

    def ask(self, request_id: str, messages: list[dict], params: dict) -> asyncio.Queue:
        """Send a request; its events arrive in the queue."""
        events = self.answers[request_id] = asyncio.Queue()
        _write(self._process, "ask", request_id, messages, params)
        return events

    def close(self, request_id: str) -> asyncio.Queue | None:
        """Stop the work on an answer, and give its queue, which gets no more events; None if it has ended."""
        if events := self.answers.pop(request_id, None):
            _write(self._process, "close", request_id)
        return events

    def give_up(self, request_id: str, status: int, reason: str) -> None:
        """Close an answer, and send its reader an error, if it has not ended."""
        if events := self.close(request_id):
            events.put_nowait(("error", status, reason))

    async def read_events(self) -> None:
        """Pass the model's events on to their answers, until its process ends."""
        while line := await self._process.stdout.readline():
            request_id, *event = json.loads(line)
            if event[0] == "end":
                # Also of an answer that was closed.
                metrics.TOKENS_IN.inc(event[1]["prompt_tokens"])
                metrics.TOKENS_OUT.inc(event[1]["completion_tokens"])
            if events := self.answers.get(request_id):
                events.put_nowait(event)
                if event[0] in ("end", "error"):
                    del self.answers[request_id]
        self.alive = False
        for events in self.answers.values():
            events.put_nowait(("error", 503, "The model's process has ended."))


@contextlib.asynccontextmanager
async def running(
    model_uri: str, tracking_uri: str, trace_sampling: float = 0.0
) -> AsyncIterator[ModelProcess]:
    """Load a model in a process of its own, and end that with the block.

    Args:
        model_uri, tracking_uri: which model to load, from which store.
        trace_sampling: share of the answers that leave an MLflow trace, 0.0 to 1.0.
    Raises:
        RuntimeError: in one sentence, if the model could not be loaded.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "helpers.serving.model_process"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LONGEST_LINE,
    )
    try:
        # Not on the command line, which every user of the machine can read: the store may have a password.
        _write(process, model_uri, tracking_uri, trace_sampling)
        line = await process.stdout.readline()
        loaded = json.loads(line) if line else f"its process ended with exit code {await process.wait()}"
        if isinstance(loaded, str):
            raise RuntimeError(f"{model_uri} could not be loaded: {loaded}")
        yield ModelProcess(process, chat_models.ServedModel(**loaded))
        _write(process, "stop")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _write(process: asyncio.subprocess.Process, *message: Any) -> None:
    process.stdin.write(json.dumps(message).encode() + b"\n")


# The model's side.


def main() -> None:
    """Load the model, then answer until the server says stop or has gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # They may be sent to the server's whole group, but answers in progress must finish.
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    processes.when_parent_ends(lambda: os._exit(0), messages.put)
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What a model or a library prints goes to the log.
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    import mlflow

    model_uri, tracking_uri, trace_sampling = json.loads(messages.get())
    try:
        tracking.open_store(tracking_uri)
        served, start = chat_models.load(model_uri)
        os.environ["MLFLOW_TRACE_SAMPLING_RATIO"] = str(trace_sampling)
        if trace_sampling:
            # Beside the model, while `connect` would enter a server's workspace of that name.
            tracking.choose_experiment(TRACES, "serve without traces (trace sampling 0).")
        else:
            mlflow.tracing.disable()
    except Exception as error:
        log.debug("loading failed", exc_info=True)
        print(json.dumps(faults.explain(error) or str(error) or repr(error)), file=events, flush=True)
        return
    print(json.dumps(asdict(served)), file=events, flush=True)
    worker = Worker(served, start, events)
    while (message := json.loads(messages.get()))[0] != "stop":
        {"ask": worker.ask, "close": worker.close}[message[0]](*message[1:])
    worker.stop()
    mlflow.flush_trace_async_logging()
    os._exit(0)  # At once: a thread that still decodes must not keep the process.


class Worker:
    """Answers requests side by side, each read out by a thread of its own."""

    def __init__(self, served: chat_models.ServedModel, start: chat_models.Start, events: TextIO):
        self._served = served
        self._start = start
        self._events = events
        self._lock = threading.Lock()
        self._running: dict[str, Any] = {}

    def ask(self, request_id: str, messages: list[dict], params: dict) -> None:
        """Begin an answer. A ValueError is the caller's and says what to change; the rest is logged."""
        trace = functools.partial(self._trace, request_id, messages, params, time.time_ns())
        try:
            completion = self._running[request_id] = self._start(messages, params)
        except Exception as error:
            trace(error=error)
            if isinstance(error, ApiError):
                self._send(request_id, "error", error.status, str(error), error.code, error.param)
            elif isinstance(error, ValueError):
                self._send(request_id, "error", 400, str(error))
            else:
                self._fail(request_id, error)
        else:
            self._send(request_id, "started")
            threading.Thread(target=self._read_out, args=(request_id, completion, trace), daemon=True).start()

    def close(self, request_id: str) -> None:
        """Stop the work on an answer."""
        if completion := self._running.get(request_id):
            completion.close()

    def stop(self) -> None:
        """Close all answers, and wait until their traces are written."""
        for request_id in list(self._running):
            self.close(request_id)
        while self._running:
            time.sleep(0.01)

    def _read_out(self, request_id: str, completion: Any, trace: Callable[..., None]) -> None:
        # The trace is written before "end" is sent: a client may stop the server as soon as it sees the end.
        text = ""
        try:
            for piece in completion:
                if piece:
                    text += piece
                    self._send(request_id, "text", piece)
            trace(completion, text)
            read, written = completion.prompt_tokens, completion.completion_tokens
            usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
            self._send(request_id, "end", usage, completion.finish_reason)
        except Exception as error:
            trace(completion, text, error)
            self._fail(request_id, error)
        finally:
            del self._running[request_id]

    def _send(self, *event: Any) -> None:
        with self._lock:
            print(json.dumps(event), file=self._events, flush=True)

    def _fail(self, request_id: str, error: Exception) -> None:
        log.error("%s failed", request_id, exc_info=error)
        reason = "The model failed. The server's log has more under the request id."
        self._send(request_id, "error", 500, reason)

    def _trace(
        self,
        request_id: str,
        messages: list[dict],
        params: dict,
        started: int,
        completion: Any = None,
        text: str = "",
        error: Exception | None = None,
    ) -> None:
        """Leave a trace of a request that has ended, if it is one of the sample."""
        import mlflow

        served = self._served
        names = {"model": served.name, "model_version": served.full_name}
        span = mlflow.start_span_no_context(
            "chat.completions",
            span_type="CHAT_MODEL",
            inputs={"messages": messages, **params},
            attributes=names,
            tags={"request_id": request_id, **names},
            metadata={"mlflow.modelId": served.model_id} if served.model_id else None,
            start_time_ns=started,
        )
        if completion:
            read, written = completion.prompt_tokens, completion.completion_tokens
            usage = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
            span.set_attribute("mlflow.chat.tokenUsage", usage)
            message = {"role": "assistant", "content": text}
            span.set_outputs({"choices": [{"message": message, "finish_reason": completion.finish_reason}]})
        if error:
            span.record_exception(error)
        span.end()


if __name__ == "__main__":
    main()
