"""The static site: links that work, nothing from elsewhere, and pages that do not need eyes or a mouse."""

import itertools
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup

from helpers.__main__ import main
from helpers.workshop import notebooks, site

EXTERNAL = re.compile(r"^(https?:)?//")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The site made of the saved notebooks."""
    place = tmp_path_factory.mktemp("site")
    return site.build(executed=place / "nothing ran here", output=place / "site").parent


@pytest.fixture(scope="module")
def pages(folder) -> dict[Path, BeautifulSoup]:
    return {path: BeautifulSoup(path.read_text(), "html.parser") for path in folder.glob("*.html")}


def test_it_has_the_start_page_both_notebooks_and_the_guides_that_are_there(folder, pages):
    names = {path.name for path in pages}
    assert names == {page.name for page in site.pages()}
    assert {"index.html", "01_TransformerPipeline.html", "02_CustomPythonWrapper.html"} <= names
    assert "benchmarks.html" in names
    assert ("teaching.html" in names) == (site.ROOT / "TEACHING.md").exists()
    for soup in pages.values():
        assert {link["href"] for link in soup.select("header a")} == names


def test_every_link_and_anchor_inside_the_site_leads_somewhere(pages):
    crawled = 0
    for path, soup in pages.items():
        for element in soup.select("[href], [src]"):
            address = urlsplit(element.get("href") or element.get("src"))
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            assert target.is_relative_to(path.parent), element
            assert target.is_file(), element
            if address.fragment:
                assert pages[target].find(id=unquote(address.fragment)), element
            crawled += 1
    assert crawled > 50


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs(folder, pages):
    for soup in pages.values():
        assert not soup.select("script, iframe, object, embed")
        loaded = [tag.get("src") or tag.get("href") for tag in soup.select("img, link, source, video, audio")]
        assert not [address for address in loaded if EXTERNAL.match(address)]
    for sheet in [folder / "style.css", *pages]:
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", sheet.read_text())


def test_headings_are_in_order_under_one_first_heading(pages):
    for soup in pages.values():
        levels = [int(heading.name[1]) for heading in soup.select("h1, h2, h3, h4, h5, h6")]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels


def test_figures_are_described_and_pages_say_their_language(pages):
    figures = 0
    for soup in pages.values():
        assert soup.html["lang"] == "en"
        assert soup.title.get_text(strip=True)
        assert soup.select_one("body > a.skip")["href"] == f"#{soup.main['id']}"
        for image in soup.select("img"):
            assert len(image["alt"]) > 30, image["alt"]
            assert "No description" not in image["alt"]
            figures += 1
    assert figures >= 5


def test_ids_are_unique(pages):
    for path, soup in pages.items():
        ids = [tag["id"] for tag in soup.select("[id]")]
        assert sorted(ids) == sorted(set(ids)), path.name


def test_a_notebook_that_ran_is_shown_as_it_ran_and_one_that_stopped_as_it_was_saved(tmp_path):
    for number, (name, error) in enumerate([("01", False), ("02", True)]):
        book = nbformat.read(notebooks.NOTEBOOKS[name], as_version=4)
        book.cells[1].outputs = [nbformat.v4.new_output("stream", text=f"printed by run {number}")]
        if error:
            book.cells[1].outputs.append(nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]))
        nbformat.write(book, tmp_path / notebooks.NOTEBOOKS[name].name)
    built = site.build(executed=tmp_path, output=tmp_path / "site").parent
    assert "printed by run 0" in (built / "01_TransformerPipeline.html").read_text()
    assert "printed by run 1" not in (built / "02_CustomPythonWrapper.html").read_text()


def test_a_link_that_leads_nowhere_is_named_and_the_old_site_stays(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("notebooks", "docs", "benchmarks"):
        shutil.copytree(site.ROOT / name, project / name)
    (project / "README.md").write_text("# A project\n\nSee [the plan](PLAN.md).\n")
    monkeypatch.setattr(site, "ROOT", project)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("the old one")
    with pytest.raises(ValueError, match=r"README\.md links to 'PLAN\.md', which is not there"):
        site.build(executed=tmp_path, output=tmp_path / "site")
    assert (tmp_path / "site" / "index.html").read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_the_command_says_where_to_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(site.build, "__defaults__", (tmp_path, tmp_path / "site"))
    assert main(["site"]) == 0
    assert capsys.readouterr().out.strip().endswith("index.html")
