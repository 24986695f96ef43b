"""The store is found from anywhere, made once, and pinned requirements fit every index."""

import contextlib
import os
import platform
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest

from helpers import ROOT, errors, faults, parameters, places, processes, tracking
from helpers.serving import openai_server
from helpers.workshop import classroom

pytestmark = pytest.mark.command


@pytest.fixture
def sqlite_uri(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


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


def test_a_relative_database_lies_in_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters, "ROOT", tmp_path / "project")
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert tracking.connect("sqlite:///my.db", "an experiment") == f"sqlite:///{tmp_path}/project/my.db"
    where = mlflow.get_experiment_by_name("an experiment").artifact_location
    assert where == (tmp_path / "project" / "mlruns").as_uri()
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.fixture(scope="module")
def postgresql_uri(postgres, postgres_folder):
    """A database of PostgreSQL, named as readers do: without a driver."""
    with classroom._database(postgres, postgres_folder, workers=1) as uri:
        yield uri.replace("postgresql+psycopg2:", "postgresql:")


@pytest.mark.server
def test_a_postgresql_database_is_a_store_here_and_for_child_processes(postgresql_uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters.check(model="tiny-phi3", tracking_uri=postgresql_uri)
    uri = tracking.connect(postgresql_uri, "an experiment")
    with mlflow.start_run() as run:
        mlflow.log_metric("seconds", 1.5)
    code = f"import mlflow; print(mlflow.get_run({run.info.run_id!r}).data.metrics)"
    own = os.environ | {"MLFLOW_TRACKING_URI": uri}
    child = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert child.stdout.strip() == "{'seconds': 1.5}", child.stderr
    assert run.info.artifact_uri.startswith((ROOT / "mlruns").as_uri())
    assert not any(tmp_path.iterdir())


def test_two_processes_may_make_the_store_at_once(sqlite_uri):
    code = f"from helpers import tracking; tracking.connect({sqlite_uri!r}, 'shared')"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [(p.wait(), p.stderr.read()) for p in processes] == [(0, ""), (0, "")]


def test_a_locked_database_is_reported_before_any_work(sqlite_uri, tmp_path, monkeypatch):
    tracking.connect(sqlite_uri, "an experiment")
    monkeypatch.setattr(faults, "LOCK_SECONDS", 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            errors.StoreFault, match=r"mlflow\.db: The database of the MLflow store is locked"
        ):
            tracking.connect(sqlite_uri, "an experiment")
    tracking.connect(sqlite_uri, "an experiment")


def test_a_deleted_experiment_is_named_with_the_way_to_restore_it(sqlite_uri):
    tracking.connect(sqlite_uri, "an experiment")
    number = mlflow.get_experiment_by_name("an experiment").experiment_id
    mlflow.delete_experiment(number)
    with pytest.raises(errors.StoreFault) as caught:
        tracking.connect(sqlite_uri, "an experiment")
    command = f"MLFLOW_TRACKING_URI={sqlite_uri} mlflow experiments restore --experiment-id {number}"
    assert f"'an experiment' was deleted, and its name stays taken. Restore it: {command} " in str(
        caught.value
    )
    assert "-p experiment 'an experiment-2'" in str(caught.value)
    words = [sys.executable, "-m", "mlflow", *command.split()[2:]]
    subprocess.run(
        words, check=True, env=os.environ | {"MLFLOW_TRACKING_URI": sqlite_uri}, capture_output=True
    )
    tracking.connect(sqlite_uri, "an experiment")


@pytest.mark.server
def test_the_experiment_of_traces_is_named_when_it_was_deleted(registered_onnx):
    tracking.connect(registered_onnx, "serving")
    number = mlflow.get_experiment_by_name("serving").experiment_id
    mlflow.delete_experiment(number)
    try:
        asked = openai_server.running("models:/slm-onnx@champion", trace_sampling=1.0)
        with pytest.raises(RuntimeError, match=r"'serving' was deleted.*serve without traces"), asked:
            pass
    finally:
        mlflow.MlflowClient().restore_experiment(number)


@pytest.mark.parametrize("damage", ["header", "page", "another program's file"])
def test_a_damaged_database_is_named(sqlite_uri, tmp_path, damage):
    tracking.connect(sqlite_uri, "an experiment")
    file = tmp_path / "mlflow.db"
    content = bytearray(file.read_bytes())
    if damage == "header":
        content[:16] = bytes(16)
    elif damage == "page":
        content[4096 * 3 : 4096 * 4] = b"?" * 4096
    else:
        content = b"a text of another program\n" * 100
    file.write_bytes(content)
    with pytest.raises(errors.StoreFault, match=r"mlflow\.db is damaged .* move it away"):
        tracking.connect(sqlite_uri, "an experiment")


def test_a_database_of_a_newer_mlflow_is_named_and_left_alone(sqlite_uri, tmp_path):
    tracking.connect(sqlite_uri, "an experiment")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'f00dfeed0001'")
        database.commit()
    before = (tmp_path / "mlflow.db").read_bytes()
    with pytest.raises(errors.StoreFault, match=r"mlflow\.db was written by a newer MLflow than 3\."):
        tracking.connect(sqlite_uri, "an experiment")
    assert (tmp_path / "mlflow.db").read_bytes() == before


def test_a_read_only_folder_is_named(tmp_path):
    code = f"from helpers import tracking; tracking.connect('sqlite:///{tmp_path}/mlflow.db', 'e')"
    script = f'mount --bind -o ro {tmp_path} {tmp_path} 2>/dev/null || exit 77; exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", code]
    child = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    if child.returncode == 77 or "unshare" in child.stderr:
        pytest.skip("this machine lets no user mount a folder read-only (unshare)")
    last = child.stderr.splitlines()[-1]
    assert last.startswith(
        f"helpers.errors.StoreFault: {tmp_path} cannot be written to (Read-only file system)"
    )
    assert "name another store" in last


def test_a_living_run_goes_on_when_the_clock_is_put_forward(sqlite_uri, tmp_path, monkeypatch):
    tracking.connect(sqlite_uri, "shared")
    with mlflow.start_run() as run:
        pending = mlflow.initialize_logged_model("half", source_run_id=run.info.run_id)
        half = places.local_path(pending.artifact_location)
        half.mkdir(parents=True)
        _put_the_clock_forward(tmp_path / "proc", monkeypatch)
        tracking.connect(sqlite_uri, "shared")
        assert mlflow.get_run(run.info.run_id).info.status == "RUNNING"
        assert half.is_dir()


def _put_the_clock_forward(proc: Path, monkeypatch) -> None:
    """Let psutil see this process on a machine whose start has moved by an hour, as Linux says it then."""
    if not psutil.LINUX:
        pytest.skip("only Linux counts a process's start from the machine's")
    before = psutil.Process().create_time()
    (proc / str(os.getpid())).mkdir(parents=True)
    for name in ("stat", "status"):
        content = Path(f"/proc/{os.getpid()}/{name}").read_text("utf-8")
        (proc / str(os.getpid()) / name).write_text(content, encoding="utf-8")
    stat = Path("/proc/stat").read_text("utf-8")
    later = re.sub(r"(?<=^btime )\d+", lambda found: str(int(found[0]) + 3600), stat, flags=re.MULTILINE)
    (proc / "stat").write_text(later, encoding="utf-8")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(proc))
    assert psutil.Process().create_time() == pytest.approx(before + 3600)


def test_a_run_whose_process_number_belongs_to_another_process_is_ended(sqlite_uri):
    tracking.connect(sqlite_uri, "shared")
    run = mlflow.MlflowClient().create_run(mlflow.get_experiment_by_name("shared").experiment_id)
    tag = f"{platform.node()}:{os.getpid()}:1.00"  # this number, but not this process's beginning
    mlflow.MlflowClient().set_tag(run.info.run_id, tracking.OWNER, tag)
    tracking.connect(sqlite_uri, "shared")
    assert mlflow.get_run(run.info.run_id).info.status == "KILLED"


def test_a_process_that_has_ended_and_waits_to_be_reaped_counts_as_gone():
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    child.stdout.read()
    while not tracking._process(child.pid).endswith(":"):
        time.sleep(0.01)
    child.wait()


def test_runs_of_a_process_that_was_killed_are_ended_and_those_of_living_ones_go_on(sqlite_uri, capsys):
    code = f"""
import os, mlflow
from helpers import tracking
tracking.connect({sqlite_uri!r}, "shared")
mlflow.start_run(run_name="of a killed process")
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    tracking.connect(sqlite_uri, "another")
    assert capsys.readouterr().out == ""  # an experiment is put right when it is used
    mlflow.set_experiment("shared")
    with mlflow.start_run(run_name="of a living process"):
        tracking.connect(sqlite_uri, "shared")
        runs = mlflow.search_runs(output_format="list")
        states = {run.info.run_name: run.info.status for run in runs}
    assert states == {"of a killed process": "KILLED", "of a living process": "RUNNING"}
    assert "'of a killed process' had not been ended; it is marked KILLED now" in capsys.readouterr().out


def test_without_a_uri_the_store_is_the_environment_s_or_the_project_s(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.default_uri() == "http://127.0.0.1:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.default_uri() == f"sqlite:///{ROOT / 'mlflow.db'}"


def test_requirements_are_pinned_without_a_build_tag():
    pins = tracking.requirements("mlflow", "torch")
    assert pins[0] == f"mlflow=={mlflow.__version__}"
    assert pins[1].startswith("torch==")
    assert "+" not in pins[1]


@pytest.mark.parametrize(
    ("experiment", "name"),
    [
        ("small-language-models", "small-language-models"),
        ("Anna B.", "anna-b"),
        ("Zoë", "zoe"),
        ("张三", "learner-1d841bc0ee98"),
        ("x", "learner-2d711642b726"),
        ("a" * 39 + " b", "a" * 39),
    ],
)
def test_an_experiment_s_workspace_has_a_name_that_mlflow_takes(experiment, name):
    from mlflow.store.workspace.abstract_store import WorkspaceNameValidator

    assert tracking._workspace_name(experiment) == name
    WorkspaceNameValidator.validate(name)


@pytest.mark.server
def test_a_server_without_workspaces_is_used_as_it_is(sqlite_uri):
    port = processes.free_port()
    # fmt: off
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", sqlite_uri,
               "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # fmt: on
    with processes.running(command, port, "MLflow", 600) as url:
        tracking.connect(url, "Anna")
        with mlflow.start_run() as run:
            mlflow.log_param("kept", "yes")
        assert mlflow.get_run(run.info.run_id).data.params == {"kept": "yes"}
    assert "MLFLOW_WORKSPACE" not in os.environ
