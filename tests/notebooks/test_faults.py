"""Kernels are killed, disks fill, databases lock, servers go: what the reader reads, and what is left.

The scenes are real runs of the notebooks with a fault at a chosen call (see `fault_hook.py`). They run two at
a time beside the tests, which wait for the scene they speak of.
"""

import json
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
    ("02", "logging"): Fault("custom-python-wrapper", "finalize_logged_model"),
    ("02", "registering"): Fault("client.set_registered_model_alias", "set_registered_model_alias"),
    ("02", "evaluating"): Fault("evaluation.compare(", "score"),
    ("02", "serving"): Fault("openai_server.running(", "create"),
}
SPARK = Fault("scoring.spark_session(", "load_stream")  # not in STAGES: pyspark is installed for one test


def killed(folder: Path) -> dict[str, Ended]:
    """One kill in every stage, all in one store, and then a run of both notebooks without one ("afterwards").

    Of tiny-phi3 there is all but what notebook 02 converts first.
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
    ended["afterwards"] = run("afterwards", *NO_SERVER).end()
    return ended


def two_at_once(folder: Path) -> list[Ended]:
    place, output = f"sqlite:///{folder}/mlflow.db", folder / "out"
    runs = [HeadlessRun(folder / name, "01", *NO_SERVER, store=place, output=output) for name in ("a", "b")]
    return [run.end() for run in runs]


def stopped(folder: Path) -> dict[str, Ended]:
    """The command is killed, interrupted and terminated while a run is open, and a cell raises in one."""
    place, output = f"sqlite:///{folder}/mlflow.db", folder / "out"
    log_model, ended, temporary = "transformers.log_model(", {}, None
    for name, number in {
        "killed": signal.SIGKILL,
        "interrupted": signal.SIGINT,
        "terminated": signal.SIGTERM,
    }.items():
        pause = Fault(log_model, "log_artifacts", PAUSE)
        places = {"store": place, "output": output, "temporary": temporary}
        run = HeadlessRun(folder / name, "01", *NO_SERVER, fault=pause, **places)
        run.wait_until_struck()
        run.process.send_signal(number)
        ended[name] = run.end(keep_temporary=name == "killed")
        temporary = run.temporary if name == "killed" else None
    fault = Fault(log_model, "log_artifacts", "raise ValueError('a mistake')")
    ended["raised"] = HeadlessRun(folder / "raised", "01", *NO_SERVER, store=place, fault=fault).end()
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


def corrupted(folder: Path) -> Ended:
    shutil.copytree(folders.weights_dir() / "tiny-phi3", folder / "weights" / "tiny-phi3")
    weights = folder / "weights" / "tiny-phi3" / "checkpoint" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 0xFF
    weights.write_bytes(content)
    place = f"sqlite:///{folder}/mlflow.db"
    return HeadlessRun(
        folder / "run", "01", *NO_SERVER, store=place, WEIGHTS_DIR=str(folder / "weights")
    ).end()


SCENES = {
    "killed": killed,
    "locked": locked,
    "server gone": server_gone,
    "stopped": stopped,
    "full disk": full_disk,
    "corrupted": corrupted,
    "two at once": two_at_once,
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
def test_a_kernel_killed_while_spark_scores_leaves_nothing(with_pyspark, tmp_path):
    place = {"store": f"sqlite:///{tmp_path}/mlflow.db", "PYTHONPATH": with_pyspark["PYTHONPATH"]}
    given = ("02", *NO_SERVER, "-p", "spark", "True", "-p", "precision", "fp32")
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


@pytest.mark.parametrize(
    ("how", "code", "sentence"),
    [
        ("interrupted", 130, "Interrupted."),
        ("terminated", 130, "Interrupted."),
        ("raised", 1, "ValueError: a mistake"),
    ],
)
def test_a_run_is_failed_after_an_interrupt_or_an_exception(how, code, sentence, scene):
    folder, ended = scene("stopped")
    assert ended[how].code == code
    assert sentence in ended[how].error
    assert (ended[how].processes, ended[how].files) == ([], [])
    assert sorted(statuses(folder).values()) == [
        *["transformer-pipeline FAILED"] * 3,
        "transformer-pipeline KILLED",
    ]
    with reader(folder) as client:
        experiment = client.get_experiment_by_name("faults").experiment_id
        models = client.search_logged_models([experiment])
        assert [model.status for model in models] == ["FAILED"] * 4  # none is left PENDING


def test_a_killed_command_leaves_no_process_and_the_next_one_removes_its_temporary_files(scene):
    _, ended = scene("stopped")
    assert ended["killed"].code == -signal.SIGKILL
    assert ended["killed"].processes == []
    assert len(ended["killed"].files) == 1  # what the kernel wrote
    assert ended["interrupted"].files == []  # it had the same folder


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


def test_a_corrupted_file_of_the_same_size_is_noticed_with_its_fix(scene):
    _, ended = scene("corrupted")
    assert ended.code == 1
    assert "was not started: model.safetensors in" in ended.error
    assert "Delete the folder, and the next run makes it " in ended.error
    assert (ended.processes, ended.files) == ([], [])


def test_two_runs_at_once_in_one_checkout_both_end_correctly(scene):
    folder, ended = scene("two at once")
    assert [run.code for run in ended] == [0, 0], [run.error for run in ended]
    assert sum("Waiting: another run writes" in run.output for run in ended) == 1
    assert all(run.output.count("Read it:") == 1 for run in ended)
    assert {line.rpartition(" ")[2] for line in statuses(folder).values()} == {"FINISHED"}
    with reader(folder) as client:
        assert len(client.search_model_versions("name = 'slm-transformers'")) == 2
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        assert len(mlflow.pyfunc.load_model("models:/slm-transformers@candidate").predict(chat)) == 1
    pages = [path for path in (folder / "out").iterdir() if path.suffix == ".html"]
    assert len(pages) == 1
    for notebook in (folder / "out").glob("*.ipynb"):
        assert "StoreFault" not in json.dumps(nbformat.read(notebook, as_version=4))
    assert [run.processes for run in ended] == [[], []]
    # The one that ends first may still see the folder that the other works in; afterwards there is none.
    assert not list((folder / "out").glob(".*.tmp-*"))
    assert not [name for run in ended for name in run.files if ".tmp-" not in name]


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
