"""The small static site: both executed notebooks, the guides and the benchmarks, to be read offline.

Every page goes through nbconvert's template `basic` (a Markdown file as a notebook of one cell), gets links
that work in the site, and is put into page.html.j2. No script, no font, no picture comes from elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from helpers import ROOT
from helpers.workshop import notebooks

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from nbformat import NotebookNode

TEMPLATE = Path(__file__).with_name("page.html.j2")
STYLE = Path(__file__).with_name("page.css")
GUIDES = {"setup": "Set-up", "models": "Models", "serving": "Serving", "classroom": "Classroom"}


@dataclass(frozen=True)
class Page:
    """A file of the project as a page: where it comes from, the page's file name, its label in the menu."""

    source: Path
    name: str
    label: str


def pages() -> list[Page]:
    """The site's pages in the order of the menu."""
    return [
        Page(ROOT / "README.md", "index.html", "Start"),
        *(Page(path, f"{path.stem}.html", f"Notebook {name}") for name, path in notebooks.NOTEBOOKS.items()),
        *(Page(ROOT / "docs" / f"{name}.md", f"{name}.html", label) for name, label in GUIDES.items()),
        Page(ROOT / "TEACHING.md", "teaching.html", "For teachers"),
        Page(ROOT / "benchmarks" / "README.md", "benchmarks.html", "Benchmarks"),
        Page(ROOT / "deploy" / "README.md", "deploy.html", "Deploy"),
        Page(ROOT / "SECURITY.md", "security.html", "Security"),
    ]


def build(executed: Path = ROOT / "out", output: Path = ROOT / "out" / "site") -> Path:
    """Write the site, whole or not at all.

    Args:
        executed: folder of a headless run; a notebook that ran there as it stands now, with its defaults
            and without an error, is shown as it ran, otherwise as it was saved in the project.
        output: the site's folder; an older site there is replaced.
    Returns:
        Its first page.
    Raises:
        ValueError: for a link or picture that leads nowhere; it names the file that has it. Also if `output`
            is something else than an older site.
    """
    if os.path.lexists(output) and not _is_site(output):
        raise ValueError(f"{os.path.relpath(output)} is not a site that was written here. Move it away.")
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for page in pages():
            _write(page, executed, partial)
        (partial / "style.css").write_text(STYLE.read_text("utf-8") + _highlighting(), encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output / "index.html"


def _is_site(folder: Path) -> bool:
    """Whether it is an empty folder, or holds nothing but what `build` writes."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    ours = {"files", "style.css", *(page.name for page in pages())}
    return {path.name for path in folder.iterdir()} <= ours


def _write(page: Page, executed: Path, output: Path) -> None:
    from bs4 import BeautifulSoup
    from jinja2 import Environment
    from nbconvert import HTMLExporter

    book, origin = _read(page.source, executed)
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True)
    body, _ = exporter.from_notebook_node(book)
    soup = BeautifulSoup(body, "html.parser")
    for link in soup.select("a[href]"):
        _redirect(link, page, output)
    for image in soup.select("img[src]"):
        image["src"] = _copied(image["src"], page, output) or image["src"]
    _name_headings(soup)
    _make_accessible(soup)
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text("utf-8"))
    text = template.render(
        title=soup.h1.get_text(),
        name=page.name,
        pages=pages(),
        sections=[{"id": heading["id"], "text": heading.get_text()} for heading in soup.select("h2")],
        body=str(soup),
        origin=origin,
    )
    (output / page.name).write_text(text, encoding="utf-8")


def _read(source: Path, executed: Path) -> tuple[NotebookNode, str]:
    """The page as a notebook, and a sentence on where it comes from."""
    import nbformat
    from nbformat import v4

    if source.suffix != ".ipynb":
        cell = v4.new_markdown_cell(source.read_text("utf-8"))
        return v4.new_notebook(cells=[cell]), f"Made from {source.relative_to(ROOT)}."
    saved = nbformat.read(source, as_version=4)
    if (executed / source.name).exists():
        ran = nbformat.read(executed / source.name, as_version=4)
        outputs = [output for cell in ran.cells for output in cell.get("outputs", ())]
        # papermill puts given parameters into a cell of their own, so these differ, too
        same = [cell.source for cell in ran.cells] == [cell.source for cell in saved.cells]
        if same and not any(output.output_type == "error" for output in outputs):
            return ran, f"As it ran headless: {source.name}."
    return saved, f"As it was saved with the project: {source.name}."


def _redirect(link, page: Page, output: Path) -> None:
    """Point a link between the project's files to the page or the copy that stands for its target."""
    address = urlsplit(link["href"])
    if address.scheme or address.netloc:
        return
    anchor = f"#{_anchor(unquote(address.fragment))}" if address.fragment else ""
    if not address.path:
        link["href"] = anchor
        return
    target = _target(link["href"], page)
    names = {known.source: known.name for known in pages()}
    if target in names:
        link["href"] = names[target] + anchor
    elif target.is_dir():
        link.unwrap()  # a folder has no page
    else:
        link["href"] = _copied(link["href"], page, output)


def _copied(address: str, page: Page, output: Path) -> str | None:
    """Copy a file of the project into the site; its address there, or None if it is not one."""
    if urlsplit(address).scheme:
        return None
    target = _target(address, page)
    copy = output / "files" / target.relative_to(ROOT)
    if not copy.suffix:
        copy = copy.with_suffix(".txt")  # LICENSE: to be shown, not downloaded
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(target, copy)
    return copy.relative_to(output).as_posix()


def _target(address: str, page: Page) -> Path:
    target = (page.source.parent / unquote(urlsplit(address).path)).resolve()
    if not target.exists() or not target.is_relative_to(ROOT):
        raise ValueError(f"{os.path.relpath(page.source, ROOT)} links to {address!r}, which is not there.")
    return target


def _name_headings(soup: BeautifulSoup) -> None:
    """Give every heading the anchor that GitHub gives it."""
    seen: Counter[str] = Counter()
    for heading in soup.select("h1, h2, h3, h4, h5, h6"):
        name = _anchor(heading.get_text().strip())
        heading["id"] = f"{name}-{seen[name]}" if seen[name] else name
        seen[name] += 1


def _anchor(text: str) -> str:
    """A heading's anchor as GitHub writes it; Jupyter keeps capitals and punctuation."""
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def _make_accessible(soup: BeautifulSoup) -> None:
    """What the notebook's HTML lacks for keyboards and screen readers; scripts would not run anyway."""
    for script in soup.select("script"):
        script.decompose()
    for pre in soup.select("pre"):
        pre["tabindex"] = "0"  # wide lines are scrolled by keyboard
    for number, table in enumerate(soup.select("table"), 1):
        for cell in table.select("th"):
            if not cell.get_text(strip=True):
                cell.name = "td"
            else:
                cell["scope"] = "col" if cell.find_parent("thead") else "row"
        label = f"Table {number}"
        table.wrap(
            soup.new_tag(
                "div", attrs={"class": "scroll", "tabindex": "0", "role": "region", "aria-label": label}
            )
        )


def _highlighting() -> str:
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="default").get_style_defs(".highlight")
