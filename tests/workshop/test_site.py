"""The static site: links that work, nothing from elsewhere, and pages that do not need eyes."""

import contextlib
import io
import itertools
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from helpers import ROOT
from helpers.__main__ import main
from helpers.workshop import notebooks, site

pytestmark = pytest.mark.command

EXTERNAL = re.compile(r"^(https?:)?//")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The site that the command makes of the saved notebooks."""
    place = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(site.build, "__defaults__", (place / "site",))
        assert main(["site"]) == 0
    assert said.getvalue() == f"Read it: {os.path.relpath(place / 'site' / 'index.html')}\n"
    return place / "site"


@pytest.fixture(scope="module")
def pages(folder) -> dict[Path, BeautifulSoup]:
    return {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in folder.glob("*.html")}


def test_it_has_the_start_page_both_notebooks_and_the_guides(folder, pages):
    names = {path.name for path in pages}
    assert names == {
        "index.html",
        "01_TransformerPipeline.html",
        "02_CustomPythonWrapper.html",
        "setup.html",
        "models.html",
        "serving.html",
        "classroom.html",
        "deploying.html",
        "glossary.html",
        "self-check.html",
        "teaching.html",
        "benchmarks.html",
        "deploy.html",
        "security.html",
    }
    for soup in pages.values():
        menu = soup.select_one(".jp-MarkdownOutput")
        assert {link["href"] for link in menu.select("a[href]")} == names


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


@pytest.mark.parametrize("name", ["index.html", "teaching.html"])
def test_the_guides_lead_to_other_pages(name, folder, pages):
    _menu, text = pages[folder / name].select(".jp-MarkdownOutput")
    linked = {urlsplit(link["href"]).path for link in text.select("a[href]")}
    assert {f"{path.stem}.html" for path in notebooks.NOTEBOOKS.values()} <= linked


def test_nothing_is_loaded_from_elsewhere_and_no_script_runs(pages):
    for soup in pages.values():
        assert not soup.select("script, iframe, object, embed")
        loaded = [tag.get("src") or tag.get("href") for tag in soup.select("img, link, source, video, audio")]
        assert not [address for address in loaded if EXTERNAL.match(address)]
    for page in pages:
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", page.read_text("utf-8"))


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
        for image in soup.select("img"):
            assert len(image["alt"]) > 30, image["alt"]
            assert "No description" not in image["alt"]
            figures += 1
    assert figures >= 5


def test_a_link_that_leads_nowhere_is_named_and_the_old_site_stays(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("notebooks", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, project / name)
    (project / "README.md").write_text("# A project\n\nSee [the plan](PLAN.md).\n", encoding="utf-8")
    monkeypatch.setattr(site, "ROOT", project)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("the old one", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md links to 'PLAN\.md', which is no file"):
        site.build(tmp_path / "site")
    assert (tmp_path / "site" / "index.html").read_text("utf-8") == "the old one"
