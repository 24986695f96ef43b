"""What a reader sees without running anything: clean, whole, and made from the code that stands here."""

import base64
import re

import nbformat
import pytest

from helpers import ROOT, environment
from helpers.workshop import notebooks

BOOKS = {name: nbformat.read(path, as_version=4) for name, path in notebooks.NOTEBOOKS.items()}
# Absolute paths of this machine, also in file: and sqlite: addresses, but not in those of servers.
MACHINE_PATH = re.compile(
    r"(?:(?<![\w:/.-])|(?<=\bfile:)|(?<=\bfile://)|(?<=\bsqlite:///))/(?:home|root|Users|tmp|work|var|private|opt|mnt)/"
    r"|\b[A-Z]:[\\/]{1,2}\w"
)
every_notebook = pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def outputs(book):
    return [output for cell in code_cells(book) for output in cell.outputs]


def text_of(output) -> str:
    data = output.get("data", {})
    return output.get("text", "") + "".join(
        str(value) for kind, value in data.items() if kind.startswith("text/")
    )


@every_notebook
def test_cells_were_executed_once_from_top_to_bottom(book):
    assert [cell.execution_count for cell in code_cells(book)] == list(range(1, len(code_cells(book)) + 1))


@every_notebook
def test_no_error_and_no_noise_on_stderr_was_saved(book):
    assert not [
        output for output in outputs(book) if output.output_type == "error" or output.get("name") == "stderr"
    ]


@every_notebook
def test_no_path_of_a_machine_was_saved(book):
    assert not [text_of(output) for output in outputs(book) if MACHINE_PATH.search(text_of(output))]
    assert "papermill" not in book.metadata


@pytest.mark.parametrize(
    "text",
    [
        "/home/me/mlruns",
        "['/tmp/x']",
        "file:///home/me/mlruns",
        "file:/home/me/mlruns",
        "sqlite:////root/x/mlflow.db",
        "at C:\\Users\\me",
        "'C:\\\\Users\\\\me'",
        "file:///D:/work",
    ],
)
def test_a_path_of_a_machine_is_recognised(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/home/me",
        "mlflow-artifacts:/root/model",
        "models:/slm-onnx@candidate",
        "../tmp/x",
        "out/var/x",
        "sqlite:///mlflow.db",
        "Q:\nA: 1/2",
    ],
)
def test_what_means_the_same_on_every_machine_is_none(text):
    assert not MACHINE_PATH.search(text)


@every_notebook
def test_no_warning_or_progress_debris_was_saved(book):
    debris = re.compile(r"WARNING|Warning\b|Deprecat|it/s\]|\d+%\|")
    assert not [text_of(output) for output in outputs(book) if debris.search(text_of(output))]


@every_notebook
def test_outputs_were_made_from_the_sources_that_stand(book):
    assert book.metadata.get("made_from") == notebooks.fingerprint(book), (
        "stale outputs: run `make notebooks`"
    )


@every_notebook
def test_the_versions_it_prints_first_are_the_locked_ones(book):
    printed = dict(line.split() for line in text_of(code_cells(book)[0].outputs[0]).strip().split(" · "))
    assert "mlflow" in printed
    locked = environment.locked()
    assert {name: version.partition("+")[0] for name, version in printed.items()} == {
        name: locked[name] for name in printed
    }


@every_notebook
def test_a_sentence_stands_before_every_code_cell(book):
    for before, cell in zip(book.cells, book.cells[1:], strict=False):
        if cell.cell_type == "code" and before.cell_type == "code":
            pytest.fail(f"no sentence before:\n{cell.source}")


@every_notebook
def test_the_story_stays_short_enough_for_one_reading(book):
    assert len(code_cells(book)) <= 40


@every_notebook
def test_every_saved_solution_passed_its_check(book):
    solutions = [cell for cell in code_cells(book) if "solution" in cell.metadata.get("tags", ())]
    assert len(solutions) >= 4
    for cell in solutions:
        assert [text_of(output)[:10] for output in cell.outputs] == ["✓ Exercise"], cell.source


def test_the_saved_answer_names_madrid():
    for book in BOOKS.values():
        assert any("Madrid" in text_of(output) for output in outputs(book))


def test_question_answer_and_usage_stand_in_the_documented_layout():
    printed = "".join(text_of(output) for output in outputs(BOOKS["01"]))
    layout = (
        r"Question: What is the capital of Spain\?\n\nAnswer: .*Madrid.*\n\nUsage: \{'prompt_tokens': \d+, "
    )
    assert re.search(layout, printed)


def test_the_readme_s_figure_is_the_one_that_notebook_02_drew():
    drawn = [
        output.data["image/png"] for output in outputs(BOOKS["02"]) if "image/png" in output.get("data", {})
    ]
    picture = (ROOT / "docs" / "images" / "precision.png").read_bytes()
    assert picture == base64.b64decode(drawn[-1]), (
        "copy the figure of the saved notebook to docs/images/precision.png"
    )
