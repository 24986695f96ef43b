"""The answers to the self-check say where to look, and what they quote stands there."""

import re

import nbformat
import pytest
from bs4 import BeautifulSoup

from helpers import ROOT
from helpers.workshop import notebooks

BOOKS = {name[:2]: nbformat.read(path, as_version=4) for name, path in notebooks.NOTEBOOKS.items()}
PAGE = (ROOT / "docs" / "self-check.md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"^## (.+)\n\n((?:\d\. .+\n)+)", PAGE, re.MULTILINE))
ANSWERS = [
    pytest.param(number, answer, id=f"{number}.{answer[0]}")
    for number in BOOKS
    for answer in PARTS[f"Answers to notebook {number}"].splitlines()
]


def sections(number: str) -> dict[str, str]:
    """Heading → what a reader sees in that section's outputs."""
    shown, heading = {}, ""
    for cell in BOOKS[number].cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^## (.+)$", cell.source, re.MULTILINE):
                shown[heading] = ""
            continue
        for output in cell.outputs:
            data = output.get("data", {})
            html = BeautifulSoup(data.get("text/html", ""), "html.parser").get_text(" ")
            shown[heading] = shown.get(heading, "") + output.get("text", data.get("text/plain", "")) + html
    return shown


@pytest.mark.parametrize("number", BOOKS)
def test_every_question_has_an_answer(number):
    for heading in (f"Notebook {number}", f"Answers to notebook {number}"):
        assert [line[0] for line in PARTS[heading].splitlines()] == list("12345678")


@pytest.mark.parametrize(("number", "answer"), ANSWERS)
def test_an_answer_names_sections_and_tests_that_exist(number, answer):
    named = set(re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", answer))
    tests = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`(?: sends \w+, as \"([^\"]+)\")?", answer)
    assert named or tests
    assert named <= sections(number).keys()
    for file, *texts in tests:
        assert all(text in (ROOT / file).read_text(encoding="utf-8") for text in texts)


@pytest.mark.parametrize(("number", "answer"), ANSWERS)
def test_a_quoted_output_is_a_saved_one(number, answer):
    """After "Output of *a section*" the quotes and code up to the end of the sentence are that output's."""
    for section, sentence in re.findall(r"Output of \*([^*]+)\*(.*?)(?:\. |$)", answer):
        shown = sections(number)[section]
        assert shown
        for quote in re.findall(r"[`\"]([^`\"]+)[`\"]", sentence):
            assert quote.removeprefix("… ") in shown, quote
