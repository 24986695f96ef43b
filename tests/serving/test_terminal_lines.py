"""What the notebooks print for a terminal works there, line by line as it stands."""

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
from support import connected

from helpers import ROOT, processes

pytestmark = pytest.mark.server


def terminal_lines(notebook: str, port: int) -> tuple[str, str, str]:
    """What is typed before serving, the line that serves, and what a second terminal asks."""
    cells = nbformat.read(ROOT / "notebooks" / notebook, nbformat.NO_CONVERT).cells
    (cell,) = [cell.source for cell in cells if cell.source.startswith("The same from a terminal")]
    first, second = re.findall(r"```bash\n(.*?)```", cell, re.DOTALL)
    before, serve = first.strip().rsplit("\n", 1)
    assert serve.startswith("mlflow models serve ")
    assert "--port 5001" in serve
    assert ":5001/" in second
    # The test has an environment, a store and a port of its own.
    before = re.sub(r"^(source|export MLFLOW_TRACKING_URI=).*\n", "", before, flags=re.MULTILINE)
    return before, serve.replace("5001", str(port)), second.replace("5001", str(port))


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """answers(notebook, store) runs the lines over a store: the replies of `predict` and of each curl."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")

    def run(notebook: str, store: str) -> tuple[dict | list, list]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        port = processes.free_port()
        before, serve, asking = terminal_lines(notebook, port)

        def output(line: str) -> str:
            return subprocess.run(["bash", "-ec", line], stdout=subprocess.PIPE, text=True, check=True).stdout

        predicted = json.loads(output(before).splitlines()[-1])
        running = processes.running(["bash", "-c", f"exec {serve}"], port, "MLflow's server", 600)
        with connected(store), running:
            asked = [json.loads(output(line)) for line in asking.strip().splitlines()]
        return predicted, asked

    return run


def test_the_lines_of_notebook_01_give_an_answer_and_one_for_each_of_several_rows(
    answers, store, transformers_uri
):
    with connected(store):
        version = transformers_uri.rpartition("/")[2]
        mlflow.MlflowClient().set_registered_model_alias("slm-transformers", "candidate", version)
    (predicted,), ((asked,), rows) = answers("01_TransformerPipeline.ipynb", store)
    assert asked["choices"] == predicted["choices"]
    assert asked["usage"]["completion_tokens"] <= 16
    assert len(rows["predictions"]) == 2


def test_the_lines_of_notebook_02_answer_every_row_as_the_parameters_say(answers, store, tiny_uri):
    predicted, (asked,) = answers("02_CustomPythonWrapper.ipynb", store)
    assert asked == predicted
    assert len(asked["predictions"]) == 2
    assert not any("." in answer for answer in asked["predictions"])
