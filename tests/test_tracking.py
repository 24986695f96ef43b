"""The store is found from anywhere, made once, and pinned requirements fit every index."""

import subprocess
import sys

import mlflow
import pytest

from helpers import tracking


@pytest.fixture
def sqlite_uri(tmp_path):
    before = mlflow.get_tracking_uri()
    yield f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(before)


def test_artifacts_lie_beside_the_database_wherever_the_process_was_started(
    sqlite_uri, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tracking.connect(sqlite_uri, "an experiment")
    with mlflow.start_run() as run:
        mlflow.log_text("hello", "note.txt")
    assert run.info.artifact_uri.startswith((tmp_path / "mlruns").as_uri())
    assert not any((tmp_path / "elsewhere").iterdir())


def test_connecting_twice_uses_the_same_experiment(sqlite_uri):
    tracking.connect(sqlite_uri, "an experiment")
    first = mlflow.get_experiment_by_name("an experiment")
    tracking.connect(sqlite_uri, "an experiment")
    assert mlflow.get_experiment_by_name("an experiment").experiment_id == first.experiment_id


def test_two_processes_may_make_the_store_at_once(sqlite_uri):
    code = f"from helpers import tracking; tracking.connect({sqlite_uri!r}, 'shared')"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [(p.wait(), p.stderr.read()) for p in processes] == [(0, ""), (0, "")]


def test_without_a_uri_the_store_is_the_environment_s_or_the_project_s(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.default_uri() == "http://127.0.0.1:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.default_uri() == f"sqlite:///{tracking.ROOT / 'mlflow.db'}"


def test_requirements_are_pinned_without_a_build_tag():
    pins = tracking.requirements("mlflow", "torch")
    assert pins[0] == f"mlflow=={mlflow.__version__}"
    assert pins[1].startswith("torch==")
    assert "+" not in pins[1]
