"""The teacher's board: what the checks of the exercises found, kept in MLflow and shown on one page.

Each check calls `report`. On a server with workspaces (`make classroom`) it leaves one run for each exercise
in the experiment `exercises` of the learner's own workspace: tags `exercise`, `state` and `hint`, metrics
`attempts` and `last_attempt` (seconds since 1970). Neither code nor answers are sent, and on any other store
nothing is. `serve` and `text` read the runs back, from any machine that reaches the server.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import parameters, processes

if TYPE_CHECKING:
    from fastapi import FastAPI
    from mlflow import MlflowClient
    from mlflow.entities import Run, Workspace

EXERCISES = ("1.1", "1.2", "1.3", "1.4", "2.1", "2.2", "2.3", "2.4", "2.5")
EXPERIMENT = "exercises"
CLASSROOM = "http://127.0.0.1:5000"  # what `make classroom` starts
# Somebody needs help after this many attempts, or this many minutes after the last one.
MANY_ATTEMPTS = 5
LONG_SILENCE = 10
READERS = 8  # workspaces that are read at the same time
EXIT_SECONDS = 3  # for what is still queued when a kernel ends

_queue: queue.Queue[tuple] = queue.Queue(maxsize=100)
_experiments: dict[tuple[str, str], str] = {}  # server and workspace → id, which saves half of the calls


# ---- a learner's kernel ----


def report(exercise: str, solved: bool, hint: str) -> None:
    """Leave the outcome of a check in the learner's workspace. Returns at once, and never raises.

    A background thread sends it; an outcome is dropped if the server cannot be reached.

    Args:
        exercise: its number: "1.2".
        hint: what the check advised; it must not hold what the learner wrote.
    """
    import mlflow

    uri, workspace = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_WORKSPACE")
    if not workspace or not uri.startswith(("http://", "https://")):
        return
    with contextlib.suppress(queue.Full):
        _queue.put_nowait((uri, workspace, exercise, solved, hint[:500]))
    _start_sender()


@functools.cache
def _start_sender() -> None:
    threading.Thread(target=_send_all, name="board", daemon=True).start()
    atexit.register(wait, EXIT_SECONDS)


def wait(seconds: float) -> None:
    """Wait until all outcomes are sent or dropped, but no longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while _queue.unfinished_tasks and time.monotonic() < deadline:
        time.sleep(0.05)


def _send_all() -> None:
    from mlflow import MlflowClient

    while True:
        uri, workspace, *outcome = _queue.get()
        # MLflow takes the workspace from the environment, and the learner may have left this one by now.
        if os.environ.get("MLFLOW_WORKSPACE") == workspace:
            with contextlib.suppress(Exception):  # A check goes well without the board.
                _keep(MlflowClient(uri), *outcome)
        _queue.task_done()


def _keep(client: MlflowClient, exercise: str, solved: bool, hint: str) -> None:
    """Count one more attempt. An exercise that was solved once stays solved."""
    from mlflow.entities import Metric, RunTag

    run = _run_of(client, exercise)
    solved = solved or run.data.tags.get("state") == "solved"
    attempts, now = run.data.metrics.get("attempts", 0) + 1, time.time()
    tags = {"state": "solved" if solved else "trying", "hint": "" if solved else hint}
    metrics = {"attempts": attempts, "last_attempt": now}
    client.log_batch(
        run.info.run_id,
        [Metric(key, value, int(1000 * now), int(attempts)) for key, value in metrics.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )


def _run_of(client: MlflowClient, exercise: str) -> Run:
    """The run of an exercise in the current workspace, made where it is missing."""
    from mlflow import MlflowException

    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # The other notebook may have made it just now.
            client.create_experiment(EXPERIMENT)
        experiment = client.get_experiment_by_name(EXPERIMENT)
    chosen = f"tags.exercise = '{exercise}'"
    if found := client.search_runs([experiment.experiment_id], chosen, max_results=1):
        return found[0]
    tags = {"exercise": exercise}
    run = client.create_run(experiment.experiment_id, tags=tags, run_name=f"exercise {exercise}")
    # Later attempts are added to a finished run, so that it does not show as running for ever. MLflow's
    # `set_terminated` (3.17) would print a link into the learner's cell.
    client.update_run(run.info.run_id, status="FINISHED")
    return run


# ---- the teacher's machine ----


@dataclass(frozen=True)
class Outcome:
    """How far a learner is with an exercise; `minutes` have passed since the last attempt."""

    solved: bool
    attempts: int
    minutes: int
    hint: str

    @property
    def needs_help(self) -> bool:
        return not self.solved and (self.attempts >= MANY_ATTEMPTS or self.minutes >= LONG_SILENCE)

    def __str__(self) -> str:
        return f"✓ {self.attempts}" if self.solved else f"✗ {self.attempts}, {self.minutes} min"


@dataclass(frozen=True)
class Learner:
    """A row of the board: exercise → outcome, where there was an attempt."""

    name: str
    outcomes: dict[str, Outcome]

    @property
    def stuck(self) -> dict[str, Outcome]:
        return {number: outcome for number, outcome in self.outcomes.items() if outcome.needs_help}

    @property
    def hint(self) -> str:
        """The last hint that led to no solution, with its exercise; of one that needs help, if any does."""
        tried = self.stuck or {number: one for number, one in self.outcomes.items() if not one.solved}
        last = max(tried, key=lambda number: (-tried[number].minutes, number), default="")
        return f"{last}: {tried[last].hint}" if last else ""

    @property
    def rank(self) -> tuple:
        """Sorts those who need help to the top, and all others by name."""
        attempts, minutes = max(((one.attempts, one.minutes) for one in self.stuck.values()), default=(0, 0))
        return not self.stuck, -attempts, -minutes, self.name


def read(client: MlflowClient, anonymous: bool = False) -> list[Learner]:
    """One row for each learner, those who need help first.

    Args:
        anonymous: call them by their rows' numbers.
    Raises:
        MlflowException: if the server does not answer.
    """
    spaces = [space for space in client.list_workspaces() if space.name != "default"]
    with ThreadPoolExecutor(READERS) as pool:
        rows = sorted(pool.map(functools.partial(_row, client), spaces), key=lambda row: row.rank)
    return [replace(row, name=f"learner {n}") if anonymous else row for n, row in enumerate(rows, 1)]


def _row(client: MlflowClient, space: Workspace) -> Learner:
    import mlflow

    mlflow.set_workspace(space.name)  # It holds for this thread.
    key = client.tracking_uri, space.name
    if key not in _experiments and (found := client.get_experiment_by_name(EXPERIMENT)):
        _experiments[key] = found.experiment_id
    outcomes = {}
    for run in client.search_runs([_experiments[key]]) if key in _experiments else ():
        tags, metrics = run.data.tags, run.data.metrics
        if tags.get("exercise") in EXERCISES and "last_attempt" in metrics:
            outcomes[tags["exercise"]] = Outcome(
                solved=tags.get("state") == "solved",
                attempts=int(metrics["attempts"]),
                minutes=max(0, int(time.time() - metrics["last_attempt"]) // 60),
                hint=_printable(tags.get("hint", "")),
            )
    return Learner(_printable(space.description or space.name), dict(sorted(outcomes.items())))


def _printable(text: str) -> str:
    """A learner's text without control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def _totals(learners: list[Learner]) -> dict[str, int]:
    """Exercise → how many have solved it."""
    solved = [number for row in learners for number, outcome in row.outcomes.items() if outcome.solved]
    return {number: solved.count(number) for number in EXERCISES}


def _connect(tracking_uri: str) -> MlflowClient:
    """A client of the classroom's server. Raises RuntimeError if there is none, or it has no workspaces."""
    from mlflow import MlflowClient, MlflowException

    uri = (tracking_uri or CLASSROOM).rstrip("/")
    try:
        processes.answers(uri)  # MLflow's client would try for minutes
        client = MlflowClient(uri)
        client.list_workspaces()
    except (OSError, ValueError, MlflowException) as error:
        reason = getattr(error, "reason", error)
        wrong = "it has no workspaces" if isinstance(error, MlflowException) else f"no answer, {reason}"
        raise RuntimeError(
            f"--tracking-uri {parameters.without_password(uri)} is no classroom's server ({wrong}). "
            "Start one with `make classroom`, or name its address: make board TRACKING_URI=http://192.168.1.20:5000"
        ) from None
    return client


def text(tracking_uri: str = "", anonymous: bool = False) -> str:
    """The board for a terminal: one line a learner, and one with the totals.

    Raises as `_connect`, and RuntimeError if the server stops answering.
    """
    from mlflow import MlflowException

    client = _connect(tracking_uri)
    try:
        learners = read(client, anonymous)
    except MlflowException as error:
        raise RuntimeError(
            f"{client.tracking_uri} does not answer any more: {error.message}. Ask again in a minute."
        ) from None
    rows = []
    for learner in learners:
        cells = [f"{number} {learner.outcomes.get(number, '–')}" for number in EXERCISES]
        rows.append([learner.name, *cells, "needs help" if learner.stuck else ""])
    totals = [f"{number} {count}" for number, count in _totals(learners).items()]
    rows.append([f"solved, of {len(learners)}", *totals, ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def page(client: MlflowClient, anonymous: bool = False) -> FastAPI:
    """The board as a page at `/`. It answers only under this machine's own names."""
    import jinja2
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse
    from mlflow import MlflowException
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    source = Path(__file__).with_name("board.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True).from_string(source)
    application = FastAPI(openapi_url=None)
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @application.get("/")
    def show() -> HTMLResponse:
        try:
            learners = read(client, anonymous)
        except MlflowException:
            return HTMLResponse(template.render(away=True), status_code=503)
        values = {"exercises": EXERCISES, "totals": _totals(learners), "learners": learners}
        return HTMLResponse(template.render(values))

    return application


def serve(tracking_uri: str = "", port: int = 8050, anonymous: bool = False) -> None:
    """Show the board at http://127.0.0.1:port until Ctrl-C. Raises as `_connect`, and for a port in use."""
    import uvicorn

    # MLflow's client asks for four minutes by default; the page is to say soon that nothing answers.
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    application = page(_connect(tracking_uri), anonymous)
    processes.refuse_if_taken(port)
    print(f"The board is at http://127.0.0.1:{port} until Ctrl-C.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(application, host="127.0.0.1", port=port, log_level="warning")
