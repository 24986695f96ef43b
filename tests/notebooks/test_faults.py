"""Kernels are killed, disks fill, databases lock, servers go: what the reader reads, and what is left.

The scenes are real runs of the notebooks with a fault at a chosen call (see `fault_hook.py`). They run two at
a time beside the tests, which wait for the scene they speak of.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlflow
import nbformat
import pytest
from faults_support import Ended, Fault, HeadlessRun

from helpers import processes, tracking
from helpers.models import folders
from helpers.serving import mlflow_server

# The first test waits for several runs of the notebooks, on any machine.
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

NO_SERVER = ("-p", "serve", "False")
PAUSE = "import time; time.sleep(600)"
# One for each kind of step: (notebook, what it does then) → where it is killed.
STAGES = {
    ("01", "fetching"): Fault("fetch.checkpoint(", "from_pretrained"),
    ("01", "tracing"): Fault("@mlflow.trace", "update_current_trace"),
    ("02", "logging"): Fault("my-own-wrapper", "finalize_logged_model"),
    ("02", "registering"): Fault("client.set_registered_model_alias", "set_registered_model_alias"),
    ("02", "evaluating"): Fault("evaluation.compare(", "footprints"),
    ("01", "serving"): Fault("mlflow_server.serve(", "post"),
}
SPARK = Fault("scoring.spark_session(", "load_stream")  # not in STAGES: pyspark is installed for one test


def killed(folder: Path) -> dict[str, Ended]:
    """One kill in every stage, all in one store, and then a run of notebook 02 without one ("afterwards").

    Of tiny-phi3 there is all but what notebook 02 converts first. The last run takes what was converted as a
    folder of its own, so that it has one candidate to measure.
    """
    place, weights = f"sqlite:///{folder}/mlflow.db", folder / "weights"
    missing = shutil.ignore_patterns("onnx-int4", ".*")
    shutil.copytree(folders.weights_dir() / "tiny-phi3", weights / "tiny-phi3", ignore=missing)

    def run(name: str, *arguments: str, fault: Fault | None = None) -> HeadlessRun:
        given = {"store": place, "fault": fault, "WEIGHTS_DIR": str(weights)}
        return HeadlessRun(folder / name, *arguments, **given)

    converting = run("converting", "02", *NO_SERVER)  # by the command itself, before there is a kernel
    while not list(weights.glob("tiny-phi3/.onnx-int4.*-try/log.txt")):
        assert converting.process.poll() is None
        time.sleep(0.02)
    converting.process.kill()
    ended = {"converting": converting.end()}
    for (number, stage), fault in STAGES.items():
        serve = () if stage == "serving" else NO_SERVER
        ended[stage] = run(stage, number, *serve, fault=fault).end()
    own = ("-p", "model", str(weights / "tiny-phi3" / "onnx-int4"))
    ended["afterwards"] = run("afterwards", "02", *NO_SERVER, *own).end()
    return ended


def stopped(folder: Path) -> dict[str, Ended]:
    """The command is killed and then terminated while a run is open."""
    place, output = f"sqlite:///{folder}/mlflow.db", folder / "out"
    ended = {}
    for name, number in {"killed": signal.SIGKILL, "terminated": signal.SIGTERM}.items():
        pause = Fault("transformers.log_model(", "log_artifacts", PAUSE)
        run = HeadlessRun(folder / name, "01", *NO_SERVER, store=place, fault=pause, output=output)
        run.wait_until_struck()
        run.process.send_signal(number)
        ended[name] = run.end()
    return ended


def full_disk(folder: Path) -> Ended:
    """A disk of 16 MB for the store, on which all but 300 kB is taken as the model is written to it."""
    small = folder / "small"
    small.mkdir()
    fill = f"""
with open("{small}/ballast", "wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(bytes(65536))
    except OSError:
        ballast.truncate(ballast.tell() - 300_000)
"""
    # The disk is there for this command only; what it holds is copied before it goes.
    script = f"""
mount -t tmpfs -o size=16m none {small} && "$@"; code=$?
rm -f {small}/ballast; cp -r {small} {folder}/copy; exit $code
"""
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    place, fault = f"sqlite:///{small}/mlflow.db", Fault("transformers.log_model(", "log_artifacts", fill)
    return HeadlessRun(folder / "run", "01", *NO_SERVER, store=place, fault=fault, prefix=prefix).end()


def locked(folder: Path) -> Ended:
    """While the model is being logged, another connection takes the right to write and keeps it."""
    hold = f"import sqlite3; held = sqlite3.connect('{folder}/mlflow.db'); held.execute('BEGIN IMMEDIATE')"
    fault = Fault("transformers.log_model(", "log_artifacts", hold)
    place = f"sqlite:///{folder}/mlflow.db"
    return HeadlessRun(folder / "run", "01", *NO_SERVER, store=place, fault=fault).end()


def server_gone(folder: Path) -> Ended:
    port = processes.free_port()
    # fmt: off
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
               "--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"]
    # fmt: on
    with (folder / "server.txt").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        log = folder / "server.txt"
        processes._wait_until_healthy(address, server, 300, "MLflow's server", log, processes.answers)
        fault = Fault(
            "length-study", "log_metrics", f"import signal; os.killpg({server.pid}, signal.SIGKILL)"
        )
        return HeadlessRun(
            folder / "run",
            *("01", *NO_SERVER),
            store=address,
            fault=fault,
            MLFLOW_HTTP_REQUEST_MAX_RETRIES="2",  # for the test's time; `tracking.connect` sets 4
        ).end()
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


SCENES = {
    "killed": killed,
    "locked": locked,
    "server gone": server_gone,
    "stopped": stopped,
    "full disk": full_disk,
}


@pytest.fixture(scope="module")
def scenes(tiny_phi3_checkpoint, tiny_phi3_onnx, tmp_path_factory):
    """Name → (folder, result to come) of every scene; all are under way."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in SCENES}
    with ThreadPoolExecutor(2) as pool:
        yield {name: (folders[name], pool.submit(scene, folders[name])) for name, scene in SCENES.items()}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def scene(scenes):
    """scene(name) waits for a scene: its folder, and what it returned."""

    def wait(name: str):
        folder, result = scenes[name]
        assert isinstance(result, Future)
        return folder, result.result()

    return wait


@contextmanager
def reader(place: Path):
    """A fresh start in a store, as the next notebook makes it."""
    before = mlflow.get_tracking_uri()
    tracking.connect(f"sqlite:///{place}/mlflow.db", "faults")
    try:
        yield mlflow.MlflowClient()
    finally:
        mlflow.set_tracking_uri(before)


def statuses(place: Path) -> dict[str, list[str]]:
    """Name of runs → their states as the database has them, before any fresh start."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")
    try:
        runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    finally:
        mlflow.set_tracking_uri(before)
    return {run.info.run_id: f"{run.info.run_name} {run.info.status}" for run in runs}


def kept_output(run: Path) -> str:
    """What the executed notebook, as far as it came, has printed."""
    (executed,) = (run / "out").glob("*.ipynb")
    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("stage", [stage for _, stage in STAGES])
def test_a_kernel_killed_in_any_kind_of_step_is_reported_and_leaves_no_process_and_no_temporary_file(
    stage, scene, record_property
):
    ended = scene("killed")[1][stage]
    assert ended.struck
    assert ended.code == 1
    assert "its kernel was killed" in ended.error
    assert "Run it again" in ended.error
    if stage == "serving":
        assert ended.struck["children"]  # the server was up
    assert Path(ended.struck["temporary"]).parent.name == "out"  # on the output's disk, not in memory
    counts = {
        "processes before": 1 + len(ended.struck["children"]),
        "processes after": len(ended.processes),
        "temporary before": len(ended.struck["files"]),
        "temporary after": len(ended.files),
    }
    print(f"{stage}:", ", ".join(f"{name} {count}" for name, count in counts.items()))
    for name, count in counts.items():
        record_property(name, count)
    assert (ended.processes, ended.files) == ([], [])


def test_after_a_kill_in_every_kind_of_step_the_same_store_carries_a_run_to_its_end(scene):
    folder, ended = scene("killed")
    assert ended["afterwards"].code == 0, ended["afterwards"].error
    states = {line.rpartition(" ")[2] for line in statuses(folder).values()}
    assert states == {"FINISHED", "KILLED"}  # none is left RUNNING
    with reader(folder) as client:
        experiment = client.get_experiment_by_name("faults").experiment_id
        models = {model.model_id: model.status for model in client.search_logged_models([experiment])}
        assert set(models.values()) == {"READY", "FAILED"}  # none is left PENDING
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        for name, aliases, payload in [
            ("slm-transformers", {"candidate"}, chat),
            ("slm-onnx", {"candidate", "champion"}, {"prompt": ["Hi"]}),
        ]:
            assert set(client.get_registered_model(name).aliases) == aliases
            for alias in aliases:
                assert len(mlflow.pyfunc.load_model(f"models:/{name}@{alias}").predict(payload)) == 1
            for version in client.search_model_versions(f"name = '{name}'"):
                source = mlflow.models.get_model_info(f"models:/{name}/{version.version}").model_id
                assert models[source] == "READY"


@pytest.mark.spark
def test_a_kernel_killed_while_spark_scores_leaves_nothing(with_pyspark, tiny_phi3_onnx, tmp_path):
    place = {"store": f"sqlite:///{tmp_path}/mlflow.db", "PYTHONPATH": with_pyspark["PYTHONPATH"]}
    given = ("02", *NO_SERVER, "-p", "spark", "True", "-p", "model", str(tiny_phi3_onnx))
    killed = HeadlessRun(tmp_path / "killed", *given, fault=SPARK, **place).end()
    assert killed.code == 1
    assert "its kernel was killed" in killed.error
    assert killed.struck["children"]  # Java, and the workers it started
    assert (killed.processes, killed.files) == ([], [])


def test_what_a_killed_kernel_had_written_of_a_model_is_dropped(scene):
    folder, _ = scene("killed")
    with reader(folder) as client:
        experiment = client.get_experiment_by_name("faults").experiment_id
        for model in client.search_logged_models([experiment]):
            artifacts = Path(mlflow.utils.file_utils.local_file_uri_to_path(model.artifact_location))
            assert (artifacts / "MLmodel").exists() == (model.status == "READY")


def test_a_conversion_that_was_killed_leaves_no_process_and_the_next_run_makes_it_again(scene):
    folder, ended = scene("killed")
    assert ended["converting"].code == -signal.SIGKILL
    assert ended["converting"].processes == []
    names = {path.name for path in (folder / "weights" / "tiny-phi3").iterdir()}
    assert "onnx-int4" in names
    assert not [name for name in names if name.endswith("-try")]


def test_a_run_is_failed_after_the_command_was_terminated(scene):
    folder, ended = scene("stopped")
    assert ended["terminated"].code == 130
    assert "Interrupted." in ended["terminated"].error
    assert (ended["terminated"].processes, ended["terminated"].files) == ([], [])
    assert sorted(statuses(folder).values()) == ["transformer-pipeline FAILED", "transformer-pipeline KILLED"]
    with reader(folder) as client:
        experiment = client.get_experiment_by_name("faults").experiment_id
        models = client.search_logged_models([experiment])
        assert [model.status for model in models] == ["FAILED"] * 2  # none is left PENDING


def test_a_killed_command_leaves_no_process_and_the_next_one_removes_its_temporary_files(scene):
    _, ended = scene("stopped")
    assert ended["killed"].code == -signal.SIGKILL
    assert ended["killed"].processes == []
    assert len(ended["killed"].files) == 1  # what the kernel wrote
    assert ended["terminated"].files == []  # it had the same folder


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode != 0,
    reason="a small disk can be mounted where Linux grants user namespaces",
)
def test_a_full_disk_is_reported_the_run_is_failed_and_nothing_is_half_registered(scene):
    folder, ended = scene("full disk")
    assert ended.struck
    assert ended.code == 1
    assert f"The disk is full ({folder}/small/mlruns/" in ended.error  # where it is full
    assert "Traceback" not in ended.error
    assert (ended.processes, ended.files) == ([], [])
    assert list(statuses(folder / "copy").values()) == ["transformer-pipeline FAILED"]
    with reader(folder / "copy") as client:
        assert client.search_registered_models() == []
        experiment = client.get_experiment_by_name("faults").experiment_id
        assert [model.status for model in client.search_logged_models([experiment])] == ["FAILED"]
    assert not list((folder / "copy" / "mlruns").rglob("*.safetensors"))  # what was half-written is gone


def test_a_locked_database_is_waited_for_and_then_reported_in_one_sentence(scene):
    folder, ended = scene("locked")
    assert ended.struck
    assert ended.code == 1
    assert "StoreFault: The database of the MLflow store is locked" in ended.error
    assert "sqlalche" not in ended.error
    (executed,) = (folder / "run" / "out").glob("*.ipynb")
    assert "sqlalchemy" not in executed.read_text("utf-8")
    assert (ended.processes, ended.files) == ([], [])
    with reader(folder):  # nobody holds it any more
        assert "transformer-pipeline KILLED" in statuses(folder).values()


def test_a_tracking_server_that_dies_is_reported_and_local_work_is_kept(scene):
    folder, ended = scene("server gone")
    assert ended.struck
    assert ended.code == 1
    assert "does not answer any more. Start it again" in ended.error
    assert (ended.processes, ended.files) == ([], [])
    assert "one completion, from the assistant" in kept_output(folder / "run")
    assert list((folder / "artifacts").rglob("MLmodel"))
    with reader(folder):  # a fresh start after the server's
        ended_runs = sorted(statuses(folder).values())
    assert ended_runs == ["8 tokens KILLED", "length-study KILLED", "transformer-pipeline FINISHED"]


def test_a_taken_port_is_reported_in_one_sentence_and_its_holder_does_not_pass_for_our_server(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "helpers", "serve", "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert f"port={port} of 127.0.0.1 is in use by another program" in result.stderr
        with (
            pytest.raises(RuntimeError, match=f"port={port} of 127.0.0.1 is in use"),
            mlflow_server.serve("models:/slm-onnx@champion", port=port),
        ):
            pass
