"""The Azure ML files say what Azure's own package accepts, checked without an Azure account."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
AZURE = DEPLOY / "azureml"
# Of its own: azure-ai-ml and azureml-mlflow hold back packages that this project needs newer.
PACKAGE = "azure-ai-ml==1.35.2"
VALIDATE = """
import json, sys
from azure.ai.ml import load_model, load_online_deployment, load_online_endpoint

loaders = {"model": load_model, "endpoint": load_online_endpoint, "deployment": load_online_deployment}

def load(kind, path):
    try:
        return {"holds": dict(loaders[kind](path)._to_dict())}
    except Exception as error:
        return {"refused": str(error)}

print(json.dumps([load(kind, path) for kind, path in json.load(sys.stdin)]))
"""


@pytest.fixture
def validate(uv_settings, tmp_path):
    """Have azure-ai-ml read (kind, text) pairs; a list of {"holds": …} or {"refused": why}."""
    (tmp_path / "validate.py").write_text(VALIDATE, encoding="utf-8")
    # fmt: off
    command = ["uv", "run", "--quiet", "--no-project", "--python", sys.executable, "--with", PACKAGE,
               "python", str(tmp_path / "validate.py")]
    # fmt: on

    def run(*texts: tuple[str, str]) -> list[dict]:
        paths = [tmp_path / f"{number}.yml" for number in range(len(texts))]
        for path, (_, text) in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
        asked = json.dumps([(kind, str(path)) for path, (kind, _) in zip(paths, texts, strict=True)])
        return json.loads(
            subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout
        )

    return run


@pytest.mark.environment
def test_azures_own_package_accepts_the_three_files(validate):
    files = {kind: (AZURE / f"{kind}.yml").read_text("utf-8") for kind in ("model", "endpoint", "deployment")}
    model, endpoint, deployment = (loaded["holds"] for loaded in validate(*files.items()))
    assert (model["type"], Path(model["path"]).name) == ("mlflow_model", "model")
    assert deployment["endpoint_name"] == endpoint["name"]
    assert deployment["model"] == f"azureml:{model['name']}@latest"
    requests = deployment["request_settings"]
    assert requests["request_timeout_ms"] == 180_000
    assert requests["max_concurrent_requests_per_instance"] == 4
    assert deployment["liveness_probe"]["initial_delay"] == 600
    assert deployment["readiness_probe"]["timeout"] == 30
    assert deployment["environment_variables"] == {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "WORKER_COUNT": "1",
    }


@pytest.mark.environment
def test_azures_own_package_refuses_what_is_misspelt_mistyped_or_missing(validate):
    deployment = (AZURE / "deployment.yml").read_text("utf-8")
    wrong = {
        "request_timeout": deployment.replace("request_timeout_ms", "request_timeout"),
        "instance_count": deployment.replace("instance_count: 1", "instance_count: many"),
        "endpoint_name": re.sub(r"endpoint_name: .*\n", "", deployment),
    }
    for name, answer in zip(wrong, validate(*(("deployment", text) for text in wrong.values())), strict=True):
        assert name in answer["refused"]


@pytest.mark.command
def test_the_documented_command_puts_a_saved_model_where_model_yml_looks(registered_onnx, tmp_path):
    line = next(
        line
        for line in (DEPLOY / "README.md").read_text("utf-8").splitlines()
        if "artifacts download" in line
    )
    command = line.strip().replace("deploy/azureml", str(tmp_path)).split()
    env = os.environ | {"MLFLOW_TRACKING_URI": registered_onnx}
    subprocess.run([sys.executable, "-m", *command], env=env, check=True, capture_output=True)
    saved = mlflow.models.Model.load(tmp_path / "model")
    assert "python_function" in saved.flavors
    assert (tmp_path / "model" / "conda.yaml").is_file()  # what Azure installs


def test_the_page_uses_every_file_and_says_what_was_not_run():
    page = (DEPLOY / "README.md").read_text("utf-8")
    for path in AZURE.glob("*.*"):
        assert f"deploy/azureml/{path.name}" in page
    assert "not run against Azure" in page
