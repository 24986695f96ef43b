"""Both notebooks run headless with other parameters, from any folder, and say clearly what is wrong."""

import subprocess
import sys

import mlflow
import nbformat
import papermill
import pytest

from helpers import tracking
from helpers.workshop import notebooks

TINY = {"model": "tiny-phi3", "max_new_tokens": 9, "experiment": "a headless run"}


def helpers(*arguments, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "helpers", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def printed(path) -> str:
    book = nbformat.read(path, as_version=4)
    return "".join(o.get("text", "") for c in book.cells if c.cell_type == "code" for o in c.outputs)


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_papermill_runs_it_from_another_folder_with_other_parameters(name, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    extra = {"precision": "fp32", "threads": 1} if name == "02" else {}
    executed = tmp_path / f"{name}.ipynb"
    papermill.execute_notebook(
        notebooks.NOTEBOOKS[name],
        executed,
        parameters={**TINY, "tracking_uri": store, **extra},
        progress_bar=False,
    )
    assert not any((tmp_path / "elsewhere").iterdir())  # nothing is left where it happened to be started
    tracking.connect(store, TINY["experiment"])
    runs = mlflow.search_runs(experiment_names=[TINY["experiment"]])
    assert set(runs.status) == {"FINISHED"}


def test_the_command_line_runs_both_and_leaves_notebooks_pages_and_candidates(tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    given = [part for name, value in TINY.items() for part in ("-p", name, value)]
    result = helpers("run", *given, "-p", "tracking_uri", store, "--output", tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "01_TransformerPipeline.html",
        "01_TransformerPipeline.ipynb",
        "02_CustomPythonWrapper.html",
        "02_CustomPythonWrapper.ipynb",
    ]
    tracking.connect(store, TINY["experiment"])
    chat = mlflow.pyfunc.load_model("models:/slm-transformers@candidate")
    completion = chat.predict({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5})[0]
    assert completion["usage"]["completion_tokens"] <= 5
    wrapper = mlflow.pyfunc.load_model("models:/slm-onnx@candidate")
    assert len(wrapper.predict({"prompt": ["Hi", "Ho"]}, params={"max_new_tokens": 5})) == 2


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["-p", "max_tokens", "5"], "'max_tokens' is not a parameter of"),
        (["-p", "max_new_tokens", "0"], "max_new_tokens=0 is not a whole number from 1"),
        (["-p", "offline", "maybe"], "offline='maybe' is not true or false"),
        (["-p", "precision", "int5"], "precision='int5' is not one of fp32, int8, int4"),
        (["-p", "model", "phi-33"], "phi-33"),
        (["01", "-p", "precision", "int4"], "'precision' is not a parameter of 01_TransformerPipeline.ipynb"),
        (["-p", "tracking_uri", "http://127.0.0.1:9"], "does not answer"),
    ],
)
def test_a_bad_parameter_ends_before_any_work_with_exit_code_2(given, sentence, tmp_path):
    result = helpers("run", *given, "--output", tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_papermill_itself_shows_the_same_sentence(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="offline='false' is not True or False"):
        papermill.execute_notebook(
            notebooks.NOTEBOOKS["01"],
            tmp_path / "01.ipynb",
            parameters={"offline": "false"},
            progress_bar=False,
        )


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_every_parameter_has_a_type_and_a_comment(name):
    declared = notebooks.declared(notebooks.NOTEBOOKS[name])
    assert all(about["help"] and about["inferred_type_name"] != "None" for about in declared.values())
    shared = {"model", "max_new_tokens", "tracking_uri", "experiment", "offline", "seed"}
    own = {"question"} if name == "01" else {"prompt", "precision", "threads"}
    assert shared | own <= set(declared)


def test_quotes_newlines_and_braces_in_a_parameter_stay_text(tmp_path):
    question = "Say 'a' \"b\"\n{x}\\ __import__('os').abort()"
    result = helpers(
        *("run", "01", "-p", "model", "tiny-phi3", "-p", "max_new_tokens", "4", "-p", "question", question),
        *("-p", "tracking_uri", f"sqlite:///{tmp_path}/mlflow.db", "--output", tmp_path / "out"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert f"Question: {question}" in printed(tmp_path / "out" / "01_TransformerPipeline.ipynb")
