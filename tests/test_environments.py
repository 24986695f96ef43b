"""The environment logged with each model, made again from nothing by uv, gives the same greedy answer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

pytestmark = pytest.mark.slow

QUESTION = "What is the capital of Spain?"
REQUESTS = {
    "slm-onnx": [{"prompt": QUESTION}, {"prompt": "Tell me a joke about an atom."}],
    "slm-transformers": {"messages": [{"role": "user", "content": QUESTION}]},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """A store that both notebooks have filled, run as a reader runs them, with the toy model."""
    folder = tmp_path_factory.mktemp("notebooks")
    store = f"sqlite:///{folder}/mlflow.db"
    given = {"model": "tiny-phi3", "precision": "fp32", "tracking_uri": store, "serve": False}
    command = [sys.executable, "-m", "helpers", "run", "01", "02", "--output", folder]
    for name, value in given.items():
        command += ["-p", name, str(value)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).resolve().parents[1])
    return store


@pytest.fixture
def replay(store, uv_settings, tmp_path, capfd):
    """Predict in an environment made for this one call; (answer, {package: version} of what uv installed)."""

    def run(name: str) -> tuple[object, dict[str, str]]:
        mlflow.set_tracking_uri(store)
        answer = tmp_path / "answer.json"
        mlflow.models.predict(
            f"models:/{name}@candidate",
            input_data=REQUESTS[name],
            output_path=str(answer),
            env_manager="uv",
        )
        installed = dict(re.findall(r"^ \+ ([\w.-]+)==(\S+)", capfd.readouterr().err, re.MULTILINE))
        return json.loads(answer.read_text("utf-8")), installed

    return run


def requirements(name: str) -> dict[str, str]:
    lines = Path(mlflow.pyfunc.get_model_dependencies(f"models:/{name}@candidate")).read_text("utf-8").split()
    return dict(line.split("==") for line in lines)  # each names one version, or this fails


def test_the_onnx_model_answers_alike_in_an_environment_without_torch_and_transformers(replay):
    replayed, installed = replay("slm-onnx")
    here = mlflow.pyfunc.load_model("models:/slm-onnx@candidate").predict(REQUESTS["slm-onnx"])
    assert replayed["predictions"] == here
    assert requirements("slm-onnx").items() <= installed.items()
    assert not {"torch", "transformers", "tokenizers", "accelerate"} & installed.keys()


def test_the_transformers_model_answers_alike_in_an_environment_without_cuda(replay):
    (replayed,), installed = replay("slm-transformers")
    (here,) = mlflow.pyfunc.load_model("models:/slm-transformers@candidate").predict(
        REQUESTS["slm-transformers"]
    )
    assert replayed["choices"] == here["choices"]
    assert replayed["usage"] == here["usage"]
    public = {
        package: found.partition("+")[0] for package, found in installed.items()
    }  # 2.13.0+cpu is 2.13.0
    assert requirements("slm-transformers").items() <= public.items()
    assert not any(package.startswith("nvidia") for package in installed)
