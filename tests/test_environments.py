"""`mlflow run` in an environment made from nothing by uv, and the environment that it logs with its model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import nbformat
import pytest

from helpers.environment import ROOT
from helpers.models import folders
from helpers.workshop import notebooks

pytestmark = pytest.mark.environment

PROMPTS = [{"prompt": "What is the capital of Spain?"}, {"prompt": "Tell me a joke about an atom."}]
CANDIDATE = "models:/slm-onnx@candidate"


@pytest.fixture(scope="module")
def project(uv_variables, module_folder) -> Path:
    """A clone after `mlflow run` of notebook 02 for the toy model, in an environment made for it."""
    folder = module_folder("project")
    for name in ("MLproject", "python_env.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    for name in ("helpers", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    chosen = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    own |= uv_variables | {
        "WEIGHTS_DIR": str(folders.weights_dir()),
        "MLFLOW_ENV_ROOT": f"{folder}/environments",
    }
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "run",
        ".",
        "-e",
        "custom_python_wrapper",
        "--env-manager",
        "uv",
    ]
    for name, value in {"model": "tiny-phi3", "precision": "fp32", "questions": 20, "serve": False}.items():
        command += ["-P", f"{name}={value}"]
    ran = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder


def test_mlflow_run_executes_a_notebook_in_an_environment_made_from_nothing(project):
    executed = nbformat.read(project / "out" / notebooks.NOTEBOOKS["02"].name, as_version=4)
    assert executed.metadata.papermill.parameters["model"] == "tiny-phi3"
    (environment,) = (project / "environments").iterdir()
    installed = {path.name.split("-")[0] for path in environment.glob("lib/*/site-packages/*.dist-info")}
    assert {"mlflow", "onnxruntime_genai", "torch"} <= installed
    assert not any(name.startswith("nvidia") for name in installed)  # gigabytes that a CPU never uses


def test_the_logged_model_answers_alike_in_an_environment_without_torch_and_transformers(
    project, uv_settings, tmp_path, capfd
):
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    answer = tmp_path / "answer.json"
    mlflow.models.predict(CANDIDATE, input_data=PROMPTS, output_path=str(answer), env_manager="uv")
    installed = dict(re.findall(r"^ \+ ([\w.-]+)==(\S+)", capfd.readouterr().err, re.MULTILINE))
    assert json.loads(answer.read_text("utf-8"))["predictions"] == mlflow.pyfunc.load_model(
        CANDIDATE
    ).predict(PROMPTS)
    lines = Path(mlflow.pyfunc.get_model_dependencies(CANDIDATE)).read_text(encoding="utf-8").split()
    assert dict(line.split("==") for line in lines).items() <= installed.items()  # each names one version
    assert not {"torch", "transformers", "tokenizers", "accelerate"} & installed.keys()
