"""One server for a class: thirty learners at once, kept over a restart, closed to others."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import psutil
import pytest
import requests
from support import between, connected, left

from helpers import ROOT, processes, tracking
from helpers.__main__ import main
from helpers.workshop import classroom

pytestmark = pytest.mark.classroom

LEARNERS = 30


@pytest.fixture(scope="module")
def server(postgres, postgres_folder, restarted) -> Iterator[str]:
    """The URI of a server over the folder that has seen a restart."""
    with classroom.running(postgres_folder, port=None, allowed_hosts="teacher.local") as uri:
        yield uri


@contextmanager
def command(folder: Path) -> Iterator[tuple[str, subprocess.Popen, list[psutil.Process], list[str]]]:
    """`python -m helpers classroom` once it is ready: URI, process, its family, and what it prints."""
    port = processes.free_port()
    arguments = ["classroom", "--folder", folder, "--port", port, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers", *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    try:
        shown: list[str] = []
        for line in process.stdout:
            shown.append(line)
            if "Ctrl-C" in line:
                break
        assert "Ctrl-C" in "".join(shown[-1:]), shown
        family = psutil.Process(process.pid).children(recursive=True)
        yield f"http://127.0.0.1:{port}", process, family, shown
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def restarted(postgres, postgres_folder) -> dict:
    """What a run looks like after its server was killed and started again, and how both ended."""
    found = {}
    with command(postgres_folder) as (uri, process, family, shown):
        found["shown"], found["uri"] = "".join(shown), uri
        with connected(uri), mlflow.start_run() as run:
            mlflow.log_metric("seconds", 1.5)
            mlflow.log_text("The capital of Spain is Madrid.", "answer.txt")
        process.send_signal(signal.SIGKILL)  # the laptop's battery is empty
        process.wait()
        found["left after SIGKILL"] = left(family)
    with command(postgres_folder) as (uri, process, family, _):
        with connected(uri):
            found["metrics"] = mlflow.get_run(run.info.run_id).data.metrics
            found["answer"] = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/answer.txt")
        found["owners of PostgreSQL"], found["listens on TCP"] = set(), []
        for each in family:
            with suppress(psutil.NoSuchProcess):  # PostgreSQL ends some of its processes after a moment.
                if each.name() == "postgres":
                    found["owners of PostgreSQL"].add(each.username())
                    found["listens on TCP"] += each.net_connections()
        process.send_signal(signal.SIGTERM)
        found["last words"] = process.stdout.read()
        found["exit code"] = process.wait(300)
        found["left after SIGTERM"] = left(family)
    return found


def test_it_says_what_learners_set_and_nothing_about_danger_on_loopback(restarted):
    assert f'tracking_uri = "{restarted["uri"]}"' in restarted["shown"]
    assert "no encryption" not in restarted["shown"]


def test_what_was_logged_is_there_after_a_kill_and_a_restart(restarted):
    assert restarted["metrics"] == {"seconds": 1.5}
    assert restarted["answer"] == "The capital of Spain is Madrid."


def test_nothing_runs_on_after_it_ends_however_it_ends(restarted):
    assert restarted["left after SIGKILL"] == []
    assert restarted["left after SIGTERM"] == []
    assert restarted["exit code"] == 0
    assert "goes on with it" in restarted["last words"]


def test_postgresql_never_runs_as_root_and_has_no_port(restarted):
    assert len(restarted["owners of PostgreSQL"]) == 1
    assert "root" not in restarted["owners of PostgreSQL"]
    assert restarted["listens on TCP"] == []


def test_thirty_learners_log_at_once_and_nothing_is_lost(
    server, postgres_folder, tiny_phi3_onnx, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import classroom as benchmark

    before = mlflow.get_tracking_uri()
    try:
        found = benchmark.measure(server, postgres_folder, LEARNERS, steps=5)
    finally:
        tracking.connect(before, "fixtures")
    assert found["errors"] == []
    assert found["runs logged"] == found["runs expected"] == LEARNERS * benchmark.RUNS
    assert found["runs lost"] == 0
    assert found["models registered"] == LEARNERS
    assert found["requests answered"] > found["runs expected"] * 10
    assert found["answered 5xx"] == 0


def test_a_worker_too_busy_for_its_supervisor_keeps_its_place_and_its_learners(server):
    family = psutil.Process().children(recursive=True)
    (supervisor,) = [each for each in family if {"uvicorn", server.rpartition(":")[2]} <= set(each.cmdline())]
    workers = [each for each in supervisor.children() if "spawn_main" in " ".join(each.cmdline())]
    assert len(workers) == 4
    with ThreadPoolExecutor() as learner:
        for worker in workers:
            worker.suspend()
        answer = learner.submit(requests.get, f"{server}/version", timeout=300)
        time.sleep(7)  # By default uvicorn kills them after 5.
        for worker in workers:
            worker.resume()
        assert answer.result().status_code == 200
    assert all(map(processes.runs, workers))


@pytest.fixture
def busy(server) -> Iterator[str]:
    """A way to the server that delays two answers about itself for longer than MLflow waits, and loses one.

    The lost one would say that the learner's experiment has been made.
    """
    delays, losses = [4, 4], ["experiments/create"]

    def meddle(path: str) -> bool:
        if "server-info" in path and delays:
            time.sleep(delays.pop())
        return bool(losses and losses[0] in path and losses.pop())

    with between(server, meddle) as uri:
        yield uri
    assert delays == losses == []


def test_a_learner_gets_in_on_a_server_that_is_busy_with_twenty_nine_others(busy):
    with connected(busy, "Dora"):
        with mlflow.start_run() as run:
            mlflow.log_metric("seconds", 1.5)
        found = mlflow.get_run(run.info.run_id)
        assert found.data.metrics == {"seconds": 1.5}
        assert found.info.experiment_id == mlflow.get_experiment_by_name("Dora").experiment_id
        assert mlflow.search_registered_models() == []


@pytest.mark.timeout(1800)  # two notebooks, on any machine
def test_both_notebooks_log_to_it_headless_into_a_workspace_of_their_own(server, tmp_path):
    given = {"model": "tiny-phi3", "max_new_tokens": 9, "serve": False, "precision": "fp32", "questions": 20}
    given |= {"tracking_uri": server, "experiment": "Anna B."}
    parameters = [part for name, value in given.items() for part in ("-p", name, str(value))]
    result = subprocess.run(
        [sys.executable, "-m", "helpers", "run", *parameters, "--output", tmp_path],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"},
    )
    assert result.returncode == 0, result.stderr
    before = mlflow.get_tracking_uri()
    try:
        tracking.connect(server, "Anna B.")
        runs = mlflow.search_runs(experiment_names=["Anna B."])
        assert set(runs.status) == {"FINISHED"}
        for name, alias in [("slm-transformers", "candidate"), ("slm-onnx", "champion")]:
            version = mlflow.MlflowClient().get_model_version_by_alias(name, alias)
            assert version.run_id in set(runs.run_id)
        assert "evaluation_run" in version.tags  # the gate lets at least the reference pass
        tracking.connect(server, "Ben")
        assert mlflow.MlflowClient().search_registered_models() == []
    finally:
        tracking.connect(before, "fixtures")
    assert "MLFLOW_WORKSPACE" not in os.environ


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "teacher.local:{port}"}, 200),
        ({"Host": "teacher.local:{port}", "Origin": "http://teacher.local:{port}"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "teacher.local:{port}", "Origin": "https://elsewhere.example"}, 403),
    ],
    ids=["a learner", "a learner's browser", "another name", "another page in the browser"],
)
def test_only_requests_to_its_own_names_and_from_its_own_pages_are_answered(server, headers, status):
    headers = {name: value.format(port=server.rpartition(":")[2]) for name, value in headers.items()}
    asked = requests.post(
        f"{server}/api/2.0/mlflow/experiments/search", json={"max_results": 1}, headers=headers, timeout=120
    )
    assert asked.status_code == status


def test_a_second_server_over_the_same_folder_is_refused(server, postgres_folder):
    with (
        pytest.raises(RuntimeError, match="already runs over"),
        classroom.running(postgres_folder, port=processes.free_port()),
    ):
        pytest.fail("two servers over one database")


def refused(capsys, *arguments) -> tuple[int, str]:
    code = main(["classroom", *map(str, arguments)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return code, error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0"], "Say under which names"),
        (["--allowed-hosts", "*"], "allowed_hosts='*' is not a name"),
        (["--allowed-hosts", "http://teacher.local"], "allowed_hosts='http://teacher.local' is not a name"),
        (["--workers", "0"], "--workers 0 is not a whole number from 1 to 64"),
    ],
)
def test_bad_values_end_before_anything_is_made(postgres, arguments, sentence, tmp_path, capsys):
    code, error = refused(capsys, "--folder", tmp_path / "room", *arguments)
    assert code == 2
    assert sentence in error
    assert not (tmp_path / "room").exists()


def test_a_port_in_use_is_named(postgres, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = refused(capsys, "--folder", tmp_path / "room", "--port", port)
    assert code == 1
    assert re.search(rf"port {port} .*in use.*--port 5050", error)
    assert not (tmp_path / "room").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL runs as another user")
def test_a_folder_that_postgresql_s_user_cannot_reach_is_named(postgres, tmp_path, capsys):
    tmp_path.chmod(0o700)
    code, error = refused(capsys, "--folder", tmp_path / "room", "--port", processes.free_port())
    assert code == 1
    assert "cannot enter" in error
    assert not (tmp_path / "room" / "database").exists()


def test_without_postgresql_it_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(classroom, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    code, error = refused(capsys, "--folder", tmp_path / "room")
    assert code == 1
    assert "sudo apt-get install postgresql" in error
    assert not (tmp_path / "room").exists()


def test_on_windows_it_says_where_it_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.delattr(os, "geteuid")
    code, error = refused(capsys, "--folder", tmp_path / "room")
    assert code == 1
    assert "needs Linux or macOS" in error
    assert not (tmp_path / "room").exists()


def test_on_a_public_address_it_says_what_is_not_protected():
    text = classroom._instructions("http://192.168.1.20:5000", Path("classroom"), "192.168.1.20")
    assert "no log-in and no encryption" in text
