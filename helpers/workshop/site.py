"""The small static site: the saved notebooks and the guides as nbconvert's pages, for reading offline."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from helpers import ROOT, places
from helpers.workshop import notebooks

if TYPE_CHECKING:
    from nbformat import NotebookNode

# Source → the page's file name and its label in the menu, in the menu's order.
PAGES = {
    "README.md": ("index.html", "Start"),
    "notebooks/01_TransformerPipeline.ipynb": ("01_TransformerPipeline.html", "Notebook 01"),
    "notebooks/02_CustomPythonWrapper.ipynb": ("02_CustomPythonWrapper.html", "Notebook 02"),
    "docs/setup.md": ("setup.html", "Set-up"),
    "docs/models.md": ("models.html", "Models"),
    "docs/serving.md": ("serving.html", "Serving"),
    "docs/deploying.md": ("deploying.html", "Deploying"),
    "docs/classroom.md": ("classroom.html", "Classroom"),
    "docs/glossary.md": ("glossary.html", "Glossary"),
    "docs/self-check.md": ("self-check.html", "Self-check"),
    "TEACHING.md": ("teaching.html", "For teachers"),
    "benchmarks/README.md": ("benchmarks.html", "Benchmarks"),
    "deploy/README.md": ("deploy.html", "Deploy"),
    "SECURITY.md": ("security.html", "Security"),
}


def build(output: Path = ROOT / "out" / "site") -> Path:
    """Write the site, after all links have been looked at.

    Args:
        output: the site's folder; pages that are there are written over.
    Returns:
        Its first page.
    Raises:
        ValueError: for a link or picture that leads nowhere; it names the file that has it.
    """
    copies: dict[str, Path] = {}
    pages = {name: _page(source, copies) for source, (name, _) in PAGES.items()}
    for copy, original in copies.items():
        (output / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, output / copy)
    for name, text in pages.items():
        (output / name).write_text(text, encoding="utf-8")
    return output / "index.html"


def _page(source: str, copies: dict[str, Path]) -> str:
    """The HTML of a page. Other files that it links to are added to `copies`: address in the site → file."""
    from bs4 import BeautifulSoup
    from nbformat import v4

    book = _book(ROOT / source)
    here = Path(source).parent
    menu = [f"[{label}]({places.relative(name, here)})" for name, (_, label) in PAGES.items()]
    book.cells.insert(0, v4.new_markdown_cell(" · ".join(menu)))
    soup = BeautifulSoup(notebooks.page(book, PAGES[source][1]), "html.parser")
    for link in soup.select("a[href]"):
        link["href"] = _address(link["href"], source, copies)
    for picture in soup.select("img[src]"):
        picture["src"] = _address(picture["src"], source, copies)
    for heading in soup.select("h1, h2, h3, h4, h5, h6"):
        heading["id"] = _anchor(heading.get_text())
    # An empty cell is no heading of a table.
    for cell in soup.select("th"):
        if not cell.get_text(strip=True):
            cell.name = "td"
    return str(soup)


def _book(source: Path) -> NotebookNode:
    """A page as a notebook: a Markdown file is one of one cell."""
    import nbformat
    from nbformat import v4

    if source.suffix == ".md":
        return v4.new_notebook(cells=[v4.new_markdown_cell(source.read_text("utf-8"))])
    return nbformat.read(source, as_version=4)


def _address(address: str, source: str, copies: dict[str, Path]) -> str:
    """Where a link or picture of a page leads in the site: to a page, to a copy of a file, or elsewhere."""
    url = urlsplit(address)
    anchor = f"#{_anchor(unquote(url.fragment))}" if url.fragment else ""
    if url.scheme or url.netloc:
        return address
    if not url.path:
        return anchor
    target = (ROOT / source).parent.joinpath(unquote(url.path)).resolve()
    name = places.relative(target, ROOT)
    if name in PAGES:
        return PAGES[name][0] + anchor
    if not target.is_file() or not target.is_relative_to(ROOT):
        raise ValueError(f"{source} links to {address!r}, which is no file of the project.")
    # LICENSE is to be shown, not downloaded.
    copy = f"files/{name}" if target.suffix else f"files/{name}.txt"
    copies[copy] = target
    return copy


def _anchor(text: str) -> str:
    """A heading's anchor as GitHub writes it; Jupyter keeps capitals and punctuation."""
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).strip().replace(" ", "-")
