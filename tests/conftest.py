"""What tests share: real models, fetched or built once into the normal weights folder."""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from reasons import pytest_collection_modifyitems  # noqa: F401 (pytest calls it)

# Tests that run side by side share the cores, and so does all that they start: two pools of threads on the
# same cores wait for each other most of the time. PyTorch counts the cores when it is imported.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    every, cores = int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), sorted(os.sched_getaffinity(0))
    number = int(worker.removeprefix("gw"))
    os.sched_setaffinity(0, cores[number::every] or [cores[number % len(cores)]])

from helpers import ROOT, environment, tracking  # first: importing helpers turns telemetry off
from helpers.models import catalog, export, fetch, onnx_chat_model
from helpers.workshop import classroom

import mlflow  # isort: skip

os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # nothing in this project needs a pickle
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)  # a make that a test starts is not a part of the `make test` around it
# Tests, and the notebooks they start, never write to the reader's own store.
_STORE = tempfile.TemporaryDirectory(prefix="mlflow-tests-", ignore_cleanup_errors=True)
_STORE_URI = f"sqlite:///{_STORE.name}/mlflow.db"
os.environ["MLFLOW_TRACKING_URI"] = _STORE_URI


@pytest.fixture(scope="module", autouse=True)
def _own_store():
    """What comes next, and a notebook's kernel, starts from the tests' own store, whatever this file used."""
    yield
    mlflow.set_tracking_uri(_STORE_URI)  # which sets MLFLOW_TRACKING_URI too


@pytest.fixture(autouse=True)
def _same_store():
    """A store that a test chooses lies in its own folder, and goes with it."""
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory, request) -> Iterator[Callable[[str], Path]]:
    """module_folder(name): a folder for a module's tests. pytest keeps its own until the whole run has ended;
    this one goes after the last of them, unless a test has failed and somebody wants to look.
    """
    made = []

    def make(name: str) -> Path:
        made.append(tmp_path_factory.mktemp(name))
        return made[-1]

    yield make
    if not request.session.testsfailed:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_phi3_checkpoint() -> Path:
    """A Transformers folder with Phi-3's architecture at toy size and random weights."""
    return fetch.checkpoint(catalog.find("tiny-phi3"))


@pytest.fixture(scope="session")
def tiny_phi3_onnx() -> Path:
    """The same model as an fp32 ONNX folder."""
    return export.onnx_folder(catalog.find("tiny-phi3"), "fp32")


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Path:
    """A Transformers folder with the embedded chat model, float32."""
    return fetch.checkpoint(catalog.find("smollm2-135m"))


@pytest.fixture(scope="session")
def smollm2_onnx() -> Path:
    """The embedded chat model as an int4 ONNX folder."""
    return export.onnx_folder(catalog.find("smollm2-135m"), "int4")


@pytest.fixture(scope="session")
def log_wrapper() -> Callable[..., mlflow.models.model.ModelInfo]:
    """Log and register an ONNX folder behind the wrapper, as notebook 02 does: log_wrapper(folder, …)."""

    def log(folder: Path, defaults: dict | None = None, **options):
        example = {"prompt": "What is the capital of Spain?"}
        defaults = onnx_chat_model.DEFAULT_PARAMS | (defaults or {})
        return mlflow.pyfunc.log_model(
            name="phi3-mlflow-model",
            python_model=onnx_chat_model.__file__,
            artifacts={"phi3-mini-onnx": str(folder)},
            signature=mlflow.models.infer_signature(example, ["Madrid"], defaults),
            input_example=(example, defaults),
            pip_requirements=tracking.requirements("mlflow-skinny", "pandas", "onnxruntime-genai"),
            registered_model_name="slm-onnx",
            **options,
        )

    return log


@pytest.fixture(scope="session")
def registered_onnx(tiny_phi3_onnx, log_wrapper, tmp_path_factory) -> str:
    """URI of a store whose `models:/slm-onnx@champion` is tiny-phi3 in fp32, with answers of 12 tokens."""
    before = mlflow.get_tracking_uri()
    store = tracking.connect(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db", "fixtures")
    with mlflow.start_run():
        logged = log_wrapper(tiny_phi3_onnx, {"max_new_tokens": 12}, model_config={"threads": 1})
    mlflow.MlflowClient().set_registered_model_alias("slm-onnx", "champion", logged.registered_model_version)
    mlflow.set_tracking_uri(before)
    return store


@pytest.fixture(scope="session")
def postgres() -> Path:
    """The folder of PostgreSQL's programs."""
    return classroom.binaries() or pytest.skip("no PostgreSQL here; try apt-get install postgresql")


@pytest.fixture(scope="module")
def postgres_folder() -> Iterator[Path]:
    """A folder that PostgreSQL's own user can reach when root runs the tests, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def classroom_server(postgres, postgres_folder) -> Iterator[str]:
    """The URI of a classroom's server."""
    before = mlflow.get_tracking_uri()
    with classroom.running(postgres_folder, port=None, workers=2) as uri:
        yield uri
    mlflow.set_tracking_uri(before)
    mlflow.set_workspace(None)


@pytest.fixture(scope="session")
def uv_variables() -> dict[str, str]:
    """With these uv reads what pip is told on this machine and, on Linux, takes torch's CPU build."""
    settings = environment.uv_settings(environment.pip_configuration(Path(sys.executable)))
    if sys.platform == "linux" and "UV_FIND_LINKS" not in {*settings, *os.environ}:
        settings.setdefault("UV_TORCH_BACKEND", os.environ.get("UV_TORCH_BACKEND", "cpu"))
    settings["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return settings


@pytest.fixture
def uv_settings(uv_variables, monkeypatch) -> None:
    """Put `uv_variables` into this process's environment."""
    for name, value in uv_variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def pyspark_folder(tmp_path_factory) -> Path:
    """pyspark in a folder of its own, to be added to this environment for one process at a time."""
    return tmp_path_factory.mktemp("pyspark")


@pytest.fixture
def with_pyspark(pyspark_folder, uv_settings) -> dict[str, str]:
    """Environment variables with which a process finds pyspark."""
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        pytest.skip("Spark needs Java, and there is none here")
    if find_spec("pyspark") is None and not any(pyspark_folder.iterdir()):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        # fmt: off
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", sys.executable,
                        "--target", pyspark_folder, *project["optional-dependencies"]["spark"]], check=True)
        # fmt: on
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(pyspark_folder), str(ROOT)])}
