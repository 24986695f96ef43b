"""The student edition is the notebook without what a learner has to write, and nobody's work is lost."""

import os
import re
from pathlib import Path

import nbformat
import pytest

from helpers import ROOT
from helpers.__main__ import main
from helpers.workshop import editions, notebooks

pytestmark = pytest.mark.command

BOOKS = {name: nbformat.read(path, as_version=4) for name, path in notebooks.NOTEBOOKS.items()}
every_notebook = pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)


def tagged(book, tag):
    return [cell for cell in book.cells if tag in cell.metadata.get("tags", ())]


def of_kind(kind, book):
    return [cell for cell in book.cells if cell.cell_type == kind]


def test_a_function_keeps_its_signature_and_docstring_and_loses_its_body():
    source = (
        '@cache\ndef ask(\n    question, seed=7\n):\n    """Say\n    what."""\n    x = 1\n    return x\n\n\n'
    )
    head = '@cache\ndef ask(question, seed=7):\n    """Say\n    what."""\n    ...  # your code here'
    check = "exercises.check_tell(globals())"
    assert editions.blank(source + check) == f"{head}\n\n\n{check}"


def test_a_function_without_a_docstring_keeps_its_first_line():
    blank = editions.blank("def ask(question):\n  return question\nexercises.check_tell(globals())")
    assert blank.startswith("def ask(question):\n    ...  # your code here\n")


def test_an_assigned_name_stays_and_its_value_goes_with_all_that_leads_to_it():
    source = (
        "import os\n# a remark\nfor run in runs:\n    log(run)\nbest: str = find(\n    'secret'\n)['id']\n"
        "exercises.check_best_run(globals())"
    )
    assert editions.blank(source) == "best = ...  # your code here\n\n\nexercises.check_best_run(globals())"


@pytest.mark.parametrize("source", ["best = 1", "print(1)", "exercises.check_tell(globals())", ""])
def test_a_solution_without_a_name_to_fill_in_or_without_a_check_is_refused(source):
    with pytest.raises(ValueError, match="needs a name to fill in"):
        editions.blank(source)


@every_notebook
def test_the_student_edition_differs_in_the_solutions_only(book):
    student = editions.student(book)
    assert [cell.id for cell in student.cells] == [cell.id for cell in book.cells]
    changed = [new for new, old in zip(student.cells, book.cells, strict=True) if new.source != old.source]
    assert changed == tagged(student, "exercise")
    assert len(changed) == len(tagged(book, "solution")) >= 4
    assert not tagged(student, "solution")
    assert all(editions.BLANK in cell.source for cell in changed)


@every_notebook
def test_the_student_edition_has_no_outputs_and_none_of_our_code(book):
    student = editions.student(book)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in student.cells)
    assert "made_from" not in student.metadata
    written = "\n".join(cell.source for cell in student.cells).splitlines()
    for solution, exercise in zip(tagged(book, "solution"), tagged(student, "exercise"), strict=True):
        lines = set(solution.source.splitlines()) - set(exercise.source.splitlines())
        ours = {line for line in lines if line.strip("{}[]() ")}
        assert ours
        assert not ours & set(written)


@every_notebook
def test_every_exercise_has_its_task_before_it_and_its_check_at_the_end(book):
    solutions = tagged(book, "solution")
    for number, cell in enumerate(solutions, 1):
        task = book.cells[book.cells.index(cell) - 1]
        assert task.cell_type == "markdown"
        title = f"### On your own, exercise {list(BOOKS.values()).index(book) + 1}.{number}: "
        assert task.source.startswith(title)
        assert "A step further: " in task.source
        assert cell.source.splitlines()[-1].startswith("exercises.check_")


def test_the_command_writes_both_editions(tmp_path, capsys):
    assert main(["student", "--output", str(tmp_path)]) == 0
    names = [path.name for path in notebooks.NOTEBOOKS.values()]
    for edition in ("student", "full"):
        assert sorted(path.name for path in (tmp_path / edition).iterdir()) == names
    for path in (tmp_path / "full").iterdir():
        full = nbformat.read(path, as_version=4)
        root = Path(os.path.relpath(ROOT, path.parent)).as_posix()
        for cell in of_kind("markdown", full):
            cell.source = cell.source.replace(f"]({root}/", "](../")  # as it was before it moved
        assert full.cells == BOOKS[path.name[:2]].cells  # with its outputs
    assert capsys.readouterr().out.count("\n") == 4


@pytest.mark.parametrize("below", ["out", "."])
def test_links_lead_to_the_projects_files_from_where_an_edition_lies(below, tmp_path):
    editions.write(tmp_path / below)
    for path in tmp_path.rglob("*.ipynb"):
        prose = of_kind("markdown", nbformat.read(path, as_version=4))
        links = re.findall(r"\]\((\.[^)#]*)", "\n".join(cell.source for cell in prose))
        assert links
        assert all((path.parent / link).is_file() for link in links)


def test_a_second_call_writes_them_again_but_not_over_somebody_s_work(tmp_path, capsys):
    assert main(["student", "--output", str(tmp_path)]) == 0
    assert main(["student", "--output", str(tmp_path)]) == 0
    mine = tmp_path / "student" / "02_CustomPythonWrapper.ipynb"
    book = nbformat.read(mine, as_version=4)
    tagged(book, "exercise")[0].source += "\nprint('my work')"
    nbformat.write(book, mine)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.ipynb")}
    capsys.readouterr()
    assert main(["student", "--output", str(tmp_path)]) == 2
    assert "02_CustomPythonWrapper.ipynb has been worked in" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.ipynb")} == before


def test_a_file_that_is_no_notebook_is_not_overwritten_either(tmp_path, capsys):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "01_TransformerPipeline.ipynb").write_text("my notes", encoding="utf-8")
    assert main(["student", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "full").exists()
