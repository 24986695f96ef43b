"""The board: what checks leave in MLflow, in whose workspace, and how a teacher reads it."""

import re
import socket
import threading
import time
from collections.abc import Iterator

import mlflow
import nbformat
import pytest
from fastapi.testclient import TestClient
from support import between

from helpers import ROOT, processes, tracking
from helpers.workshop import board, notebooks
from helpers.workshop.board import Learner, Outcome

SOLVED = Outcome(solved=True, attempts=3, minutes=40, hint="")
TRYING = Outcome(solved=False, attempts=2, minutes=4, hint="Look again.")
MANY = Outcome(solved=False, attempts=6, minutes=1, hint="Set the seed.")
SILENT = Outcome(solved=False, attempts=1, minutes=12, hint="Keep the id.")


# ---- without a server ----


@pytest.fixture
def workspace(monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_WORKSPACE", "anna")


@pytest.fixture
def tracking_uri() -> Iterator[None]:
    yield
    board.wait(60)


def test_the_board_knows_every_exercise_of_the_notebooks():
    cells = [
        cell for path in notebooks.NOTEBOOKS.values() for cell in nbformat.read(path, as_version=4).cells
    ]
    titles = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert tuple(re.findall(r"^### On your own, exercise (\d\.\d)", titles, re.MULTILINE)) == board.EXERCISES


@pytest.mark.parametrize("name", [None, "anna"])
def test_nothing_is_sent_on_a_store_of_ones_own(name, tracking_uri, monkeypatch, tmp_path):
    if name:
        monkeypatch.setenv("MLFLOW_WORKSPACE", name)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    board.report("1.1", True, "")
    assert board._queue.unfinished_tasks == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_sent_to_a_server_without_workspaces(tracking_uri, monkeypatch):
    monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    board.report("1.1", True, "")
    assert board._queue.unfinished_tasks == 0


@pytest.mark.parametrize("there", [False, True], ids=["gone", "silent"])
def test_a_check_never_waits_for_a_server_that_does_not_answer(there, workspace, tracking_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if there else processes.free_port()
        mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
        began = time.perf_counter()
        for _ in range(500):  # more than the queue takes
            board.report("1.1", False, "a hint")
        assert time.perf_counter() - began < 1
        assert {thread.name for thread in threading.enumerate() if not thread.daemon} >= {"MainThread"}
        while not board._queue.empty():  # so that the next test does not wait for these
            board._queue.get_nowait()
            board._queue.task_done()


def test_those_who_need_help_come_first_with_most_attempts_on_top():
    rows = [
        Learner("anna", {"1.1": SOLVED}),
        Learner("zoe", {}),
        Learner("ben", {"1.2": SILENT}),
        Learner("carla", {"1.2": TRYING}),
        Learner("dan", {"1.1": SOLVED, "1.2": MANY}),
    ]
    assert [row.name for row in sorted(rows, key=lambda row: row.rank)] == [
        "dan",
        "ben",
        "anna",
        "carla",
        "zoe",
    ]
    assert [row.name for row in rows if row.stuck] == ["ben", "dan"]


def test_the_last_hint_is_of_what_needs_help_or_else_of_what_was_tried_last():
    later = Outcome(solved=False, attempts=1, minutes=0, hint="Start with `def`.")
    assert Learner("anna", {"1.1": SILENT, "1.2": MANY, "1.3": later}).hint == "1.2: Set the seed."
    assert Learner("anna", {"1.1": SOLVED, "1.2": TRYING, "1.3": later}).hint == "1.3: Start with `def`."
    assert Learner("anna", {"1.1": SOLVED}).hint == Learner("zoe", {}).hint == ""


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///mlflow.db", "teacher.local"])
def test_without_a_classroom_it_says_what_to_start(uri):
    with pytest.raises(RuntimeError) as refused:
        board.text(uri)
    assert str(refused.value).startswith(f"--tracking-uri {uri} is no classroom's server (no answer, ")
    assert "`make classroom`" in str(refused.value)


# ---- on a classroom's server ----


@pytest.fixture(scope="module")
def lesson(classroom_server) -> str:
    """The server after a lesson of three learners, one of whom has done nothing yet."""
    for name, outcomes in {
        "Anna <b>": [("1.1", False, "Try\x1b[2J a seed."), ("1.1", True, ""), ("1.1", False, "broken later")],
        "ben": [("2.5", False, "the first hint")] * 4 + [("2.5", False, "Keep the <id>, say `<b>`.")],
        "carla": [],
    }.items():
        tracking.connect(classroom_server, name)
        for outcome in outcomes:
            board.report(*outcome)
        board.wait(120)
    return classroom_server


@pytest.mark.classroom
def test_each_outcome_is_a_run_in_the_learners_own_workspace(lesson):
    tracking.connect(lesson, "Anna <b>")
    (run,) = mlflow.search_runs(experiment_names=[board.EXPERIMENT], output_format="list")
    assert run.info.status == "FINISHED"
    tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
    assert tags == {"exercise": "1.1", "state": "solved", "hint": ""}  # solved once is solved
    assert run.data.metrics["attempts"] == 3
    assert time.time() - run.data.metrics["last_attempt"] < 600
    attempts = mlflow.MlflowClient().get_metric_history(run.info.run_id, "attempts")
    assert [point.value for point in attempts] == [1, 2, 3]


@pytest.mark.classroom
def test_the_text_has_a_line_for_each_learner(lesson):
    lines = board.text(lesson).splitlines()
    assert [line.split()[0] for line in lines] == ["ben", "anna-b", "carla", "solved,"]
    assert "2.5 ✗ 5, 0 min   needs help" in lines[0]
    assert "1.1 ✓ 3   1.2 –" in lines[1]
    assert len({line.index("2.5") for line in lines}) == 1  # in columns
    assert "1.1 1 1.2 0" in " ".join(lines[-1].split())
    assert [line.split()[0] for line in board.text(lesson, anonymous=True).splitlines()[:3]] == [
        "learner"
    ] * 3


@pytest.mark.classroom
def test_the_text_says_that_a_server_stopped_answering(lesson, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        between(lesson, lambda path: "runs/search" in path) as uri,
        pytest.raises(RuntimeError, match=f"{uri} does not answer any more: .* Ask again in a minute"),
    ):
        board.text(uri)


@pytest.mark.classroom
def test_the_page_shows_learners_hints_and_totals_as_text(lesson):
    page = TestClient(board.page(board._connect(lesson)), base_url="http://127.0.0.1").get("/")
    assert page.status_code == 200
    assert "3 learners, 1 needs help." in page.text
    assert page.text.index("ben") < page.text.index("anna-b") < page.text.index("carla")
    assert "2.5: Keep the &lt;id&gt;, say <code>&lt;b&gt;</code>." in page.text
    hidden = TestClient(board.page(board._connect(lesson), True), base_url="http://127.0.0.1").get("/").text
    assert not re.search("anna|ben<|carla", hidden)


@pytest.mark.classroom
def test_the_page_answers_only_under_this_machines_names(lesson):
    asked = TestClient(board.page(board._connect(lesson)), base_url="http://rebound.example").get("/")
    assert asked.status_code == 400


@pytest.mark.classroom
def test_a_page_whose_server_has_gone_says_so(lesson, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = mlflow.MlflowClient(f"http://127.0.0.1:{processes.free_port()}")
    shown = TestClient(board.page(client), base_url="http://127.0.0.1").get("/")
    assert shown.status_code == 503
    assert "does not answer" in shown.text


@pytest.mark.classroom
def test_thirty_learners_who_try_at_once_lose_no_outcome(classroom_server, monkeypatch, capfd):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import classroom as benchmark

    found = benchmark.exercises(classroom_server, 30)
    assert found["outcomes lost"] == found["outcomes attributed to another"] == 0, found
    assert capfd.readouterr().out == ""  # nothing appears in a learner's cell
