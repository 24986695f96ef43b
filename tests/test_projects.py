"""`mlflow run` executes both notebooks in this environment (`test_environments.py`: in one made for it)."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import nbformat
import papermill
import pytest
import yaml
from mlflow.projects._project_spec import load_project

from helpers import tracking
from helpers.models import folders
from helpers.workshop import notebooks

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = {"transformer_pipeline": "01", "custom_python_wrapper": "02"}
AWKWARD = """He said: "it's 2 + 3 = 5" & {asked} `why` $HOME; -p \\n?"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A copy of what a clone holds, so that no run writes into this one; only the weights are shared."""
    for name in ("MLproject", "python_env.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("helpers", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("WEIGHTS_DIR", str(folders.weights_dir()))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def mlflow_run(
    project: Path, entry_point: str, env_manager: str, **parameters
) -> subprocess.CompletedProcess:
    given = [part for name, value in parameters.items() for part in ("-P", f"{name}={value}")]
    command = [sys.executable, "-m", "mlflow", "run", ".", "-e", entry_point, "--env-manager", env_manager]
    return subprocess.run([*command, *given], cwd=project, capture_output=True, text=True)


def executed(project: Path, entry_point: str) -> dict:
    """The parameters that the executed notebook was given."""
    path = project / "out" / notebooks.NOTEBOOKS[ENTRY_POINTS[entry_point]].name
    return nbformat.read(path, as_version=4).metadata.papermill.parameters


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_an_entry_point_has_the_notebooks_parameters_and_defaults_and_hands_all_of_them_on(entry_point):
    declared = papermill.inspect_notebook(str(notebooks.NOTEBOOKS[ENTRY_POINTS[entry_point]]))
    defaults = {name: ast.literal_eval(about["default"]) for name, about in declared.items()}
    entry = yaml.safe_load((ROOT / "MLproject").read_text("utf-8"))["entry_points"][entry_point]
    types = {bool: "string", str: "string", int: "float", float: "float"}
    assert entry["parameters"] == {
        name: {"type": types[type(value)], "default": str(value) if isinstance(value, bool) else value}
        for name, value in defaults.items()
    }
    handed_on = " ".join(f"-p {name} {{{name}}}" for name in defaults)
    assert entry["command"] == f"python -m helpers run {ENTRY_POINTS[entry_point]} {handed_on}"


@pytest.mark.command
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_project_parameter_of_any_type_cannot_start_a_program(entry_point, tmp_path):
    """MLflow's own command line for the entry point is run by a shell whose `python` shows its words."""
    (tmp_path / "python").write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))", encoding="utf-8"
    )
    (tmp_path / "python").chmod(0o755)
    entry = load_project(str(ROOT)).get_entry_point(entry_point)
    mark = tmp_path / "pwned"
    for attack in (
        f"x'; touch {mark}; '",
        f"$(touch {mark})",
        f"`touch {mark}`",
        f'1"; touch {mark} #',
        "a\nb",
    ):
        command = entry.compute_command(dict.fromkeys(entry.parameters, attack), str(tmp_path))
        path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
        shown = subprocess.run(["sh", "-c", command], env={"PATH": path}, capture_output=True, text=True)
        words = json.loads(shown.stdout)
        assert words[6::3] == [attack] * len(entry.parameters)
    assert not mark.exists()


@pytest.mark.kernel
def test_mlflow_run_executes_a_notebook_in_this_environment_with_awkward_values_unharmed(project):
    asked = {"question": AWKWARD, "experiment": "a project's run", "serve": False, "max_new_tokens": 48}
    result = mlflow_run(project, "transformer_pipeline", "local", model="tiny-phi3", **asked)
    assert result.returncode == 0, result.stderr
    given = executed(project, "transformer_pipeline")
    assert given["question"] == AWKWARD
    assert (given["max_new_tokens"], given["offline"], given["serve"]) == (48, False, False)

    tracking.connect(f"sqlite:///{project}/mlflow.db", "a project's run")
    runs = mlflow.search_runs(experiment_names=["Default", "a project's run"])
    assert set(runs.status) == {"FINISHED"}
    assert (runs["tags.mlflow.project.entryPoint"] == "transformer_pipeline").sum() == 1  # mlflow's own run
    assert "transformer-pipeline" in set(runs["tags.mlflow.runName"])  # the notebook's


@pytest.mark.kernel
def test_the_documented_command_runs_as_it_stands(project):
    """README's lines, in a shell that knew nothing of the environment; the store is the clone's own."""
    command = "mlflow run . -e custom_python_wrapper -P model=tiny-phi3 --env-manager local"
    assert command in (project / "MLproject").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = readme[readme.index("source .venv/bin/activate") : readme.index(command) + len(command)]
    (project / ".venv").symlink_to(sys.prefix)
    plain = os.environ | {"PATH": os.defpath}
    result = subprocess.run(
        ["bash", "-e", "-c", lines], cwd=project, capture_output=True, text=True, env=plain
    )
    assert result.returncode == 0, result.stderr
    assert executed(project, "custom_python_wrapper")["model"] == "tiny-phi3"
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    champion = mlflow.MlflowClient().get_model_version_by_alias("slm-onnx", "champion")
    assert champion.name == "slm-onnx"


@pytest.mark.command
def test_a_bad_parameter_ends_mlflow_run_with_the_sentence_that_says_why(project):
    result = mlflow_run(project, "custom_python_wrapper", "local", model="tiny-phi3", precision="int5")
    assert result.returncode != 0
    assert "precision='int5' is not one of fp32, int8, int4" in result.stderr
    assert not (project / "out").exists()
