"""Both notebooks run headless with other parameters, from any folder, and say clearly what is wrong."""

import ast
import base64
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import mlflow
import nbformat
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager
from papermill.translators import PythonTranslator

from helpers import ROOT, tracking
from helpers.__main__ import main
from helpers.workshop import notebooks, written

pytestmark = pytest.mark.command

NAMES = (
    "HF_TOKEN",
    "OPENAI_API_KEY",
    "OPENAI_SERVER_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_PASSWORD",
)
SECRETS = {name: f"a-secret-{number}-of-the-tests" for number, name in enumerate(NAMES)}
TINY = {"model": "tiny-phi3", "max_new_tokens": 9, "experiment": "a headless run"}


@pytest.fixture
def command(capsys, monkeypatch):
    """command(word, …, cwd=folder): exit code and complaints of the command line, in this process."""

    def run(*words, cwd) -> tuple[int, str]:
        monkeypatch.chdir(cwd)
        return main([str(word) for word in words]), capsys.readouterr().err

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def printed(path) -> str:
    book = nbformat.read(path, as_version=4)
    return "".join(o.get("text", "") for c in book.cells if c.cell_type == "code" for o in c.outputs)


def leaked(folder: Path) -> list[tuple[str, str]]:
    """The files below a folder that hold a secret, with the secret's name."""
    texts = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"mlflow.db", "MLmodel"} <= {path.name for path in texts}
    return [(str(path), name) for path in texts for name in SECRETS if SECRETS[name].encode() in texts[path]]


@pytest.mark.kernel
@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_papermill_runs_it_from_another_folder_with_other_parameters_and_servers(name, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for variable, secret in SECRETS.items():
        monkeypatch.setenv(variable, secret)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    extra = {"precision": "fp32", "threads": 1, "questions": 20} if name == "02" else {}
    executed = tmp_path / f"{name}.ipynb"
    given = {**TINY, "tracking_uri": store, **extra}
    papermill.execute_notebook(notebooks.NOTEBOOKS[name], executed, parameters=given, progress_bar=False)
    assert not any((tmp_path / "elsewhere").iterdir())  # nothing is left where it happened to be started
    tracking.connect(store, TINY["experiment"])
    runs = mlflow.search_runs(experiment_names=[TINY["experiment"]])
    assert set(runs.status) == {"FINISHED"}
    assert printed(executed).count("✓ Exercise") >= 4
    assert "✗" not in printed(executed)
    assert leaked(tmp_path) == []


@pytest.fixture(scope="module")
def finished(tiny_phi3_checkpoint, tiny_phi3_onnx, tmp_path_factory) -> tuple[Path, str, str]:
    """The folder of a run of each notebook with secrets in the environment, 01's question, what was printed.

    The question is full of code. Servers have tests of their own. An ONNX folder leaves notebook 02 one
    candidate to measure, where a model that is converted here would have five.
    """
    folder = tmp_path_factory.mktemp("run")
    shell = f"$(touch {folder}/pwned) `touch {folder}/pwned` !touch {folder}/pwned"
    question = f"Say 'a' \"b\"\n{{x}}\\ __import__('os').abort() {shell}\n<img src=x onerror=alert(1)>"
    shared = {"serve": False, "tracking_uri": f"sqlite:///{folder}/mlflow.db"}
    own = {"01": {"question": question}, "02": {"model": tiny_phi3_onnx, "questions": 20}}
    said = ""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        for number, values in own.items():
            wanted = TINY | shared | values
            given = [word for name, value in wanted.items() for word in ("-p", name, str(value))]
            command = [sys.executable, "-m", "helpers", "run", number, *given, "--output", folder / "out"]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            said += result.stdout + result.stderr
    return folder, question, said


@pytest.mark.key
@pytest.mark.kernel
def test_no_secret_of_the_environment_is_in_anything_that_a_run_leaves(finished):
    folder, _, output = finished
    assert leaked(folder) == []
    assert not [name for name in SECRETS if SECRETS[name] in output]


@pytest.mark.key
@pytest.mark.kernel
def test_code_in_a_parameter_stays_text_in_the_notebook_and_on_its_page(finished):
    folder, question, _ = finished
    executed = folder / "out" / "01_TransformerPipeline.ipynb"
    assert f"Question: {question}" in printed(executed)
    assert not (folder / "pwned").exists()
    assert "<img src=x" not in executed.with_suffix(".html").read_text("utf-8")


@pytest.mark.key
@pytest.mark.kernel
def test_the_command_line_leaves_notebooks_pages_and_candidates(finished):
    folder, _, _ = finished
    store = f"sqlite:///{folder}/mlflow.db"
    assert sorted(path.name for path in (folder / "out").glob("[!.]*")) == [
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
        (["-p", "offline", "maybe"], "offline='maybe' is not True or False"),
        (["-p", "precision", "int5"], "precision='int5' is not one of fp32, int8, int4"),
        (["-p", "model", "phi-33"], "model='phi-33' is not one of smollm2-135m, phi-3-mini"),
        (["01", "-p", "precision", "int4"], "'precision' is not a parameter of 01_TransformerPipeline.ipynb"),
        (["03"], "There is no notebook '03'. Run 01 or 02."),
        (["-p", "max_new_tokens", "9" * 5000], "is not a whole number"),
        (["-p", "seed", "nan"], "seed='nan' is not a whole number"),
        (["-p", "question", "caf\udce9"], "question='caf\\udce9' is not UTF-8 text"),
        (["-p", "tracking_uri", "http://127.0.0.1:9"], "does not answer"),
        (["-p", "tracking_uri", "postgresql://me@127.0.0.1:9/mlflow"], "cannot be opened (connection to"),
        (["-p", "tracking_uri", "postgresql://me:hunter2@db/mlflow"], "Set the environment variable"),
    ],
)
def test_a_bad_parameter_ends_before_any_work_with_exit_code_2(given, sentence, tmp_path, command):
    code, said = command("run", *given, "--output", tmp_path / "out", cwd=tmp_path)
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert said.count("Set it with") <= 1
    assert "hunter2" not in said
    assert not (tmp_path / "out").exists()


def test_fetching_shows_a_bar_in_the_terminal_and_an_interrupt_ends_it(tmp_path):
    command = [sys.executable, "-m", "helpers", "run", "01", "-p", "model", "tiny-phi3"]
    given = ["-p", "tracking_uri", f"sqlite:///{tmp_path}/mlflow.db", "--output", str(tmp_path / "out")]
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    own = os.environ | {"WEIGHTS_DIR": str(tmp_path / "weights")}
    process = subprocess.Popen([*command, *given], env=own, stdout=end, stderr=end, cwd=tmp_path)
    os.close(end)
    shown = ""
    while "ready in" not in shown:
        shown += os.read(terminal, 1000).decode()
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    os.close(terminal)
    assert re.search(r"tiny-phi3: building … 00:0\d", shown)
    assert re.search(r"tiny-phi3: 0\.6 MB, ready in \d+ s", shown)


def test_files_that_cannot_be_had_stop_it_before_the_notebook_with_the_reason(tmp_path, command):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}", encoding="utf-8")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    given = ("-p", "model", "./mine", "-p", "tracking_uri", store, "--output", "out")
    code, said = command("run", "01", *given, cwd=tmp_path)
    assert code == 1
    assert said.startswith(f"error: 01_TransformerPipeline.ipynb was not started: {tmp_path}/mine is not")
    assert said.count("\n") == 1
    assert not list((tmp_path / "out").glob("0*"))


def test_a_folder_is_looked_for_where_the_reader_stands_and_found_by_the_kernel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine", "config.json").write_text("{}", encoding="utf-8")
    for values in notebooks.select([], {"model": "./mine"}).values():
        assert values == {"model": str(tmp_path / "mine")}
    for values in notebooks.select([], {"model": "tiny-phi3"}).values():
        assert values == {"model": "tiny-phi3"}


@pytest.mark.kernel
def test_papermill_itself_shows_the_same_sentence(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="offline='false' is not True or False"):
        papermill.execute_notebook(
            notebooks.NOTEBOOKS["01"],
            tmp_path / "01.ipynb",
            parameters={"offline": "false"},
            progress_bar=False,
        )


def a_folder_by_its_name(path):
    path.unlink()
    path.mkdir()


def an_added_cell(path):
    book = nbformat.read(path, as_version=4)
    book.cells.append(nbformat.v4.new_markdown_cell("What I learned"))
    nbformat.write(book, path)


def another_output(path):
    book = nbformat.read(path, as_version=4)
    book.cells[-1].outputs[0].text = "what my own run printed"
    nbformat.write(book, path)


def a_text(path):
    path.write_bytes("Käse".encode("latin-1"))


def a_link_by_its_name(path):
    path.rename(path.with_suffix(".kept"))
    path.symlink_to(path.with_suffix(".kept"))


def no_notebook(path):
    path.write_text("[]", encoding="utf-8")


def json_of_another_kind(path):
    path.write_text('{"mine": 1}', encoding="utf-8")


def papermill_by_hand(path):
    papermill.execute_notebook(path, path, progress_bar=False)


def the_students_edition(path):
    book = nbformat.read(path, as_version=4)
    written.stamp(book, "student")
    nbformat.write(book, path)


def a_saved_page(path):
    path.write_text(path.read_text(encoding="utf-8").replace("a run", "my run"), encoding="utf-8")


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[Path, Path]:
    """A small notebook, and the folder of a run of it."""
    folder = tmp_path_factory.mktemp("small")
    cells = [
        nbformat.v4.new_markdown_cell("![How it flows](../docs/images/flow-01.svg)"),
        nbformat.v4.new_code_cell("word: str = 'run'  # what is printed", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print('a', word)"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(book, folder / "page.ipynb")
    notebooks.run({folder / "page.ipynb": {}}, folder / "out")
    return folder / "page.ipynb", folder / "out"


@pytest.mark.key
@pytest.mark.kernel
def test_one_run_executes_one_notebook_after_the_other(executed, tmp_path):
    source, _ = executed
    shutil.copy(source, tmp_path / "second.ipynb")
    pages = notebooks.run({source: {}, tmp_path / "second.ipynb": {}}, tmp_path / "out")
    assert [printed(page.with_suffix(".ipynb")) for page in pages] == ["a run\n", "a run\n"]


@pytest.mark.kernel
def test_a_run_writes_over_an_earlier_one_also_after_the_source_has_changed(executed, tmp_path):
    source, out = executed
    shutil.copytree(out, tmp_path / "moved")
    book = nbformat.read(source, as_version=4)
    book.cells[-1].source = "print('another', word)"
    nbformat.write(book, tmp_path / source.name)
    (page,) = notebooks.run({tmp_path / source.name: {"word": "text"}}, tmp_path / "moved")
    assert printed(page.with_suffix(".ipynb")) == "another text\n"
    assert "another text" in page.read_text(encoding="utf-8")


@pytest.mark.kernel
def test_pictures_are_found_from_where_the_executed_notebook_lies_and_are_part_of_its_page(executed):
    source, out = executed
    drawing = ROOT / "docs" / "images" / "flow-01.svg"
    picture = nbformat.read(out / source.name, as_version=4).cells[0].source
    assert (out / re.search(r"\((.*)\)", picture)[1]).resolve() == drawing
    embedded = base64.b64encode(drawing.read_bytes()).decode()
    assert embedded in (out / source.name).with_suffix(".html").read_text(encoding="utf-8")


@pytest.mark.kernel
def test_a_kernels_messages_are_encrypted_and_it_warns_of_nothing(executed, tmp_path, capfd):
    source, _ = executed
    notebooks.run({source: {}}, tmp_path)
    assert "WARNING" not in capfd.readouterr().err


@pytest.mark.kernel
def test_what_a_failed_run_left_is_written_over(executed, tmp_path):
    source, _ = executed
    book = nbformat.read(source, as_version=4)
    book.cells[-1].source = "1 / 0"
    nbformat.write(book, tmp_path / source.name)
    with pytest.raises(notebooks.NotebookError, match="ZeroDivisionError"):
        notebooks.run({tmp_path / source.name: {}}, tmp_path / "out")
    assert "1 / 0" in (tmp_path / "out" / source.name).read_text(encoding="utf-8")
    notebooks.run({source: {}}, tmp_path / "out")
    assert printed(tmp_path / "out" / source.name) == "a run\n"


@pytest.mark.kernel
def test_a_second_run_into_the_same_folder_waits_for_the_first(executed, tmp_path):
    book = nbformat.read(executed[0], as_version=4)
    go_on = tmp_path / "go on"
    book.cells[
        -1
    ].source += f"\nimport pathlib, time\nwhile not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.1)"
    source, out = tmp_path / "page.ipynb", tmp_path / "out"
    nbformat.write(book, source)
    code = (
        "import pathlib, sys; from helpers.workshop import notebooks;"
        "notebooks.run({pathlib.Path(sys.argv[1]): {}}, pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, source, out]
    with subprocess.Popen(command, cwd=ROOT) as first:
        while not (out / ".page.tmp").exists():
            assert first.poll() is None
            time.sleep(0.05)
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout.readline().startswith("Waiting: another run writes ")
            go_on.touch()
    assert (first.returncode, second.returncode) == (0, 0)
    assert printed(out / "page.ipynb") == "a run\n"
    assert not (out / ".page.tmp").exists()


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("change", "name"),
    [
        *((change, "page.ipynb") for change in (an_added_cell, another_output, a_text, no_notebook)),
        *((change, "page.ipynb") for change in (papermill_by_hand, the_students_edition)),
        (json_of_another_kind, "page.ipynb"),
        *((change, "page.html") for change in (a_saved_page, a_text)),
        *((a_folder_by_its_name, name) for name in ("page.ipynb", "page.html")),
        *((a_link_by_its_name, name) for name in ("page.ipynb", "page.html")),
    ],
)
def test_nothing_but_an_earlier_runs_own_file_is_written_over(change, name, executed, tmp_path):
    source, out = executed
    shutil.copytree(out, tmp_path / "out")
    change(tmp_path / "out" / name)
    before = everything_in(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} has been worked in, or was not written by `run`"):
        notebooks.run({source: {}}, tmp_path / "out")
    assert everything_in(tmp_path) == before


def everything_in(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("spelling", ["notebooks", "./notebooks/../notebooks/", "a link", "notebooks/01.txt"])
def test_the_notebooks_themselves_are_never_written_over(spelling, tmp_path, command):
    (tmp_path / "notebooks").mkdir()
    for path in notebooks.NOTEBOOKS.values():
        shutil.copy(path, tmp_path / "notebooks")
    (tmp_path / "notebooks" / "01.txt").write_text("a file where a folder should be", encoding="utf-8")
    (tmp_path / "a link").symlink_to("notebooks")
    before = everything_in(tmp_path)
    code, said = command("run", "02", "--output", spelling, cwd=tmp_path)
    assert code == 2
    assert said.count("\n") == 1
    assert "--output" in said
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("name", ["run", "student", "wheelhouse"])
@pytest.mark.parametrize("output", ["a file", "a file/below", "long" * 100])
def test_an_output_that_cannot_be_a_folder_is_refused_in_one_sentence(name, output, tmp_path, command):
    (tmp_path / "a file").write_text("mine", encoding="utf-8")
    code, said = command(name, "--output", output, cwd=tmp_path)
    assert code == 2
    assert said.count("\n") == 1
    assert output in said
    assert "cannot be used as a folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]
    assert (tmp_path / "a file").read_text("utf-8") == "mine"


def test_a_wheelhouse_is_not_made_among_other_files(tmp_path, command):
    (tmp_path / "requirements.txt").write_text("requests\n", encoding="utf-8")
    (tmp_path / "mine-1.0-py3-none-any.whl").write_bytes(b"my own wheel")
    before = everything_in(tmp_path)
    code, said = command("wheelhouse", "--output", ".", cwd=tmp_path)
    assert code == 2
    assert "requirements.txt is not of a wheelhouse" in said
    assert everything_in(tmp_path) == before


@pytest.mark.kernel
def test_a_long_folder_for_temporary_files_is_no_obstacle(executed, tmp_path, monkeypatch):
    long = tmp_path / ("a job of the scheduler, " * 5).strip()
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    source, _ = executed
    notebooks.run({source: {}}, long / "out")
    assert printed(long / "out" / source.name) == "a run\n"


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_every_parameter_has_a_type_and_a_comment(name):
    declared = notebooks.declared(notebooks.NOTEBOOKS[name])
    assert all(about["help"] and about["inferred_type_name"] != "None" for about in declared.values())
    shared = {"model", "max_new_tokens", "tracking_uri", "experiment", "offline", "seed"}
    own = {"question"} if name == "01" else {"prompt", "precision", "threads"}
    assert shared | own <= set(declared)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_no_text_at_all_can_become_code_in_a_notebook(text):
    """The cell that papermill writes, as IPython reads it, is one assignment of just this text."""
    cell = PythonTranslator.codify({"question": text})
    (statement,) = ast.parse(TransformerManager().transform_cell(cell)).body
    assert statement.targets[0].id == "question"
    assert ast.literal_eval(statement.value) == text
