"""The table of what was run with what, and what the newest releases are tried with."""

import runpy
import sys

import pytest

from helpers import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "elsewhere.py"))


def row(python: str, mlflow: str, tests: str) -> list[str]:
    return ["2026-11-28", "Linux x86_64", python, mlflow, "5.23.0", "2.13.0", "passed", "passed", tests, "9"]


def test_a_new_result_replaces_the_one_of_the_same_system_python_and_mlflow():
    page = TOOL["with_rows"]("# Title\n\nText.\n\n", [row("3.13", "3.17.2", "8 passed")])
    page = TOOL["with_rows"](page, [row("3.12", "3.17.2", "7 passed"), row("3.13", "3.18.0", "9 passed")])
    page = TOOL["with_rows"](page, [row("3.13", "3.17.2", "8 passed, 1 failed")])
    head, *table = page.split("|", 1)
    assert head == "# Title\n\nText.\n\n"
    lines = f"|{table[0]}".splitlines()
    assert [line.split(" | ")[2:4] + line.split(" | ")[8:9] for line in lines[2:]] == [
        ["3.12", "3.17.2", "7 passed"],
        ["3.13", "3.17.2", "8 passed, 1 failed"],
        ["3.13", "3.18.0", "9 passed"],
    ]


def test_the_committed_table_has_the_columns_that_the_command_writes():
    page = TOOL["TABLE"].read_text(encoding="utf-8")
    assert TOOL["with_rows"](page, []) == page


@pytest.mark.command
def test_a_python_that_is_here_is_found_and_one_that_is_not_is_none():
    own = "{}.{}".format(*sys.version_info)
    assert TOOL["find_python"](own)
    assert TOOL["find_python"]("3.99") is None


def test_only_the_lesson_s_packages_lose_their_upper_bounds():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changed = TOOL["without_upper_bounds"](project)
    before, after = project.splitlines(), changed.splitlines()
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {old.split(">=")[0].strip(' "') for old, _ in pairs} == set(TOOL["WATCHED"])
    assert not [new for _, new in pairs if "<" in new]


@pytest.mark.parametrize("arguments", [[], ["older"], ["pythons", "3.9"], ["newest", "3.12"]])
def test_bad_input_is_refused_in_one_sentence(arguments, capsys):
    assert TOOL["main"](arguments) == 2
    assert capsys.readouterr().out.startswith("error: ")
