"""Notebook 02's own Spark cell on a standalone cluster; one of its two machines is killed in the middle."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import nbformat
import pandas as pd
import psutil
import pytest
from support import left, wait_until_it_answers

from helpers import processes, tracking
from helpers.models import onnx_chat_model
from helpers.workshop import notebooks

pytestmark = pytest.mark.spark

CITIES = ["Rom", "Łódź", "東京"]
ROWS = [[f"row {number}", f"Say {number} in {CITIES[number % 3]}:"] for number in range(1000)]
# The model that is logged: it also writes down what each worker did, in the worker's own folder.
WATCHED = """

class Watched(Phi3Model):
    def load_context(self, context):
        super().load_context(context)
        self.threads = context.model_config["threads"]
        self.folder = context.artifacts["phi3-mini-onnx"]

    def predict(self, context, model_input, params=None):
        answers = super().predict(context, model_input, params)
        if "WORKER_FOLDER" in os.environ:
            settings = [os.environ.get("MLFLOW_ALLOW_PICKLE_DESERIALIZATION"), self.threads, self.folder]
            with open(Path(os.environ["WORKER_FOLDER"]) / "answered.jsonl", "a", encoding="utf-8") as log:
                print(json.dumps([len(answers), os.getpid(), *settings]), file=log)
        return answers


mlflow.models.set_model(Watched())
"""
# What stands around notebook 02's cell: its parameters, and the table of the section before.
DRIVER = """
import json, sys
import mlflow, pandas as pd
from helpers import parameters, scoring

with open(sys.argv[1], encoding="utf-8") as file:
    cell, store, spark, rows = json.load(file)
parameters.check(model="tiny-phi3", spark=spark, tracking_uri=store)
mlflow.set_tracking_uri(store)
countries, prompts = zip(*rows)
table_of_prompts = pd.DataFrame({"prompt": prompts})
shown = []
display = shown.append
exec(cell)
print(json.dumps(shown[0].values.tolist()))
"""
NO_WORKER = """
import sys
from helpers import scoring

scoring.WORKER_SECONDS = 5
try:
    scoring.spark_session(sys.argv[1])
except RuntimeError as error:
    print(error)
"""


@dataclass
class Worker:
    """A machine of the cluster: its processes, and the folder that it has for itself."""

    process: psutil.Popen
    folder: Path

    def answered(self) -> list[list]:
        """A line for each batch: rows, process, pickle's switch, threads, folder of the weights."""
        log = self.folder / "answered.jsonl"
        return [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []

    def rows(self) -> int:
        return sum(line[0] for line in self.answered())


@dataclass
class Cluster:
    address: str
    start_worker: Callable[[], Worker]


@pytest.fixture
def cluster(with_pyspark, tmp_path) -> Iterator[Cluster]:
    """A standalone master on loopback, and how to start workers of one core each."""
    find = [sys.executable, "-c", "import pyspark; print(pyspark.__path__[0])"]
    found = subprocess.run(find, env=with_pyspark, capture_output=True, text=True, check=True)
    home = Path(found.stdout.strip())
    port, page = processes.free_port(), processes.free_port()
    address, names = f"spark://127.0.0.1:{port}", iter(("master", "one", "other"))
    with ExitStack() as stack:

        def start(role: str, *options: object) -> Worker:
            folder = tmp_path / next(names)
            (folder / "tmp").mkdir(parents=True)
            own = dict.fromkeys(("TMPDIR", "SPARK_LOCAL_DIRS"), str(folder / "tmp"))
            own |= dict.fromkeys(("WORKER_FOLDER", "SPARK_WORKER_DIR"), str(folder))
            env = with_pyspark | own | {"SPARK_HOME": str(home), "SPARK_LOCAL_IP": "127.0.0.1"}
            words = [home / "bin" / "spark-class", f"org.apache.spark.deploy.{role}", "--host", "127.0.0.1"]
            return Worker(stack.enter_context(program([*words, *options], folder, env)), folder)

        def start_worker() -> Worker:
            limits = ("--cores", 1, "--memory", "1g", "--webui-port", 0)
            return start("worker.Worker", *limits, address)

        master = start("master.Master", "--port", port, "--webui-port", page)
        wait_until_it_answers(f"http://127.0.0.1:{page}", master.process)
        yield Cluster(address, start_worker)


@contextmanager
def program(words: list, folder: Path, env: dict[str, str]) -> Iterator[psutil.Popen]:
    """A program in a folder of its own, ended with all that it started."""
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        started = psutil.Popen(list(map(str, words)), cwd=folder, env=env, stdout=log, stderr=log)
        try:
            yield started
        finally:
            processes.end([started], seconds=10)
            started.wait()


@pytest.fixture
def registry(tiny_phi3_onnx, tmp_path) -> Iterator[str]:
    """An MLflow server that also hands out the artifacts; its `slm-onnx@champion` is the watched model."""
    port = processes.free_port()
    # fmt: off
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
               "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
               "--serve-artifacts", "--artifacts-destination", (tmp_path / "artifacts").as_uri()]
    # fmt: on
    (tmp_path / "watched.py").write_text(
        Path(onnx_chat_model.__file__).read_text("utf-8") + WATCHED, encoding="utf-8"
    )
    with processes.running(command, port, "MLflow", 300) as url:
        tracking.connect(url, "cluster")
        with mlflow.start_run():
            logged = mlflow.pyfunc.log_model(
                name="watched",
                python_model=str(tmp_path / "watched.py"),
                artifacts={"phi3-mini-onnx": str(tiny_phi3_onnx)},
                signature=mlflow.models.infer_signature(
                    {"prompt": "Hi"}, ["Ho"], onnx_chat_model.DEFAULT_PARAMS
                ),
                model_config={"threads": 2},
                pip_requirements=tracking.requirements("mlflow", "onnxruntime-genai"),
                registered_model_name="slm-onnx",
            )
        client = mlflow.MlflowClient()
        client.set_registered_model_alias("slm-onnx", "champion", logged.registered_model_version)
        yield url


def spark_cell() -> str:
    """Notebook 02's cell with `spark_udf`, as it stands."""
    book = nbformat.read(notebooks.NOTEBOOKS["02"], as_version=4)
    (cell,) = (cell for cell in book.cells if cell.cell_type == "code" and "spark_udf" in cell.source)
    return cell.source


def test_a_worker_killed_in_the_middle_costs_no_row_and_every_answer_is_the_models_own(
    cluster, registry, with_pyspark, tmp_path
):
    workers = [cluster.start_worker(), cluster.start_worker()]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([spark_cell(), registry, cluster.address, ROWS]), encoding="utf-8")
    (tmp_path / "driver").mkdir()
    words = [sys.executable, "-c", DRIVER, asked]
    with program(words, tmp_path / "driver", with_pyspark) as driver:
        log = tmp_path / "driver" / "log.txt"
        deadline = time.monotonic() + 300
        while not all(worker.rows() for worker in workers):
            assert driver.poll() is None, log.read_text("utf-8")[-4000:]
            assert time.monotonic() < deadline, log.read_text("utf-8")[-4000:]
            time.sleep(0.02)
        killed, survivor = workers
        family = [killed.process, *killed.process.children(recursive=True)]
        for member in family:
            member.kill()
        assert not left(family)
        assert driver.wait(300) == 0, log.read_text("utf-8")[-4000:]
    lost = killed.rows()
    print(f"{lost} rows were answered by the worker that was killed, {survivor.rows()} by the other")
    # It was in the middle: what it had answered went with it, and the other worker answered all rows.
    assert 0 < lost < len(ROWS) / 2
    assert survivor.rows() >= len(ROWS)
    prompts = pd.DataFrame([prompt for _, prompt in ROWS], columns=["prompt"])
    model = mlflow.pyfunc.load_model("models:/slm-onnx@champion")
    answers = model.predict(prompts, params={"max_new_tokens": 24})
    scored = json.loads(log.read_text("utf-8").splitlines()[-1])
    assert scored == [[key, answer] for (key, _), answer in zip(ROWS, answers, strict=True)]
    assert len(set(answers)) > len(ROWS) / 2
    for worker in workers:
        ((pickle, threads, weights),) = {tuple(line[2:]) for line in worker.answered()}
        assert len({line[1] for line in worker.answered()}) == 1  # one process, so one load
        assert pickle == "false"
        assert threads == 2  # as it was logged: MLflow does not hand spark_udf's model_config on to a cluster
        assert Path(weights).is_relative_to(worker.folder)


def test_a_cluster_without_a_worker_is_given_up_in_one_sentence(cluster, with_pyspark, tmp_path):
    words = [sys.executable, "-c", NO_WORKER, cluster.address]
    done = subprocess.run(words, env=with_pyspark, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"No worker of {cluster.address} took work: none within 5 s.")
    assert "spark=True" in done.stdout
