"""The pictures that open the notebooks are what the committed script draws, and everybody can read them."""

import re
import runpy
import xml.etree.ElementTree as ET

import nbformat
import pytest

from helpers.environment import ROOT
from helpers.workshop import notebooks

FOLDER = ROOT / "docs" / "images"
DRAWN = runpy.run_path(str(FOLDER / "draw.py"))
SVG = "{http://www.w3.org/2000/svg}"
every_picture = pytest.mark.parametrize("name", DRAWN["PICTURES"])


@every_picture
def test_the_committed_file_is_what_the_script_draws(name):
    drawn = DRAWN["draw"](DRAWN["PICTURES"][name])
    assert (FOLDER / name).read_text(encoding="utf-8") == drawn, "Draw it again: python docs/images/draw.py"


@every_picture
def test_it_has_a_title_and_a_description_and_loads_nothing(name):
    root = ET.parse(FOLDER / name).getroot()
    named = [root.find(f"{SVG}title"), root.find(f"{SVG}desc")]
    assert all(element.text for element in named)
    assert root.get("aria-labelledby").split() == [element.get("id") for element in named]
    assert not re.search(r"href|url\((?!#)|@import|<script", (FOLDER / name).read_text(encoding="utf-8"))


@every_picture
def test_its_texts_have_contrast_and_lie_inside(name):
    """Each text against the last rectangle drawn below it; 4.5 is what WCAG 2.1 asks for (1.4.3)."""
    root = ET.parse(FOLDER / name).getroot()
    width, height = float(root.get("width")), float(root.get("height"))
    rectangles = []
    for element in root:
        if element.tag == f"{SVG}rect" and element.get("fill") != "none":
            left, top = float(element.get("x")), float(element.get("y"))
            right, bottom = left + float(element.get("width")), top + float(element.get("height"))
            rectangles.append((left, top, right, bottom, element.get("fill")))
        elif element.tag == f"{SVG}text":
            x, y = float(element.get("x")), float(element.get("y"))
            assert 0 < x < width
            assert 0 < y < height
            below = [
                fill
                for left, top, right, bottom, fill in rectangles
                if left <= x <= right and top <= y <= bottom
            ]
            assert contrast(element.get("fill"), below[-1]) >= 4.5, element.text


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted(luminance(colour) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_a_notebook_opens_with_its_picture_and_names_mlflows_four_parts_with_their_sections(name):
    book = nbformat.read(notebooks.NOTEBOOKS[name], as_version=4)
    first = book.cells[0].source
    alt, address = re.search(r"!\[(.+)\]\((.+)\)", first.split("**What you'll do.**")[0]).groups()
    assert len(alt) > 100
    assert (notebooks.NOTEBOOKS[name].parent / address).resolve() == FOLDER / f"flow-{name}.svg"
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    headings = {
        line.removeprefix("## ").replace(" ", "-") for line in prose.splitlines() if line.startswith("## ")
    }
    rows = dict(
        re.findall(r"^\| (Tracking|Models|Model Registry|Projects) \|.*\| (.*) \|$", first, re.MULTILINE)
    )
    assert list(rows) == ["Tracking", "Models", "Model Registry", "Projects"]
    for sections in rows.values():
        assert set(re.findall(r"\(#(.+?)\)", sections)) <= headings
        assert "(#" in sections
    assert "mlflow run . -e" in prose.split("## Further on your own")[1]
