"""Both notebooks in JupyterLab, as a person would: `make lab`, open, Run All Cells, look, save."""

import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import psutil
import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; `make setup` installs it")
from playwright.sync_api import Page, expect
from support import make

from helpers import ROOT, processes
from helpers.models import catalog, export
from helpers.workshop import editions, notebooks

MINUTE = 60_000  # ms
# Bars that are counted, and a stage of `progress.Progress` that is not.
DEBRIS = re.compile(r"it/s\]|s/it\]|\d+%\|| … \d+:\d\d")
MADE = re.compile(r"ready in \d+ s$")  # what a model's progress leaves

pytestmark = [pytest.mark.browser, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def folder(pictures) -> Iterator[Path]:
    """The full edition without outputs, in out/; for the toy model unless pictures are to be taken."""
    (ROOT / "out").mkdir(exist_ok=True)
    replaced = [] if pictures else [('model: str = "smollm2-135m"', 'model: str = "tiny-phi3"')]
    with tempfile.TemporaryDirectory(prefix="jupyterlab-", dir=ROOT / "out") as name:
        editions.write(Path(name))
        for path in notebooks.NOTEBOOKS.values():
            _set_parameters(Path(name, "full", path.name), replaced)
        yield Path(name, "full")


def _set_parameters(path: Path, replaced: list[tuple[str, str]]) -> None:
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (cell,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    for old, new in replaced:
        assert old in cell.source
        cell.source = cell.source.replace(old, new, 1)
    nbformat.write(book, path)


@pytest.fixture(scope="module")
def lab(folder, pictures, tmp_path_factory) -> Iterator[str]:
    """Address of what `make lab` starts, without anybody's settings; `{}` stands for a notebook's path.

    The toy model is made in the notebooks: from a model that is there, no progress could leave debris. Two of
    the precisions that one cell converts are there, for each costs a quarter of a minute.
    """
    home, port, token = tmp_path_factory.mktemp("home"), processes.free_port(), secrets.token_hex(16)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    own |= {
        "HOME": str(home),
        "JUPYTER_TOKEN": token,
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
    }
    if not pictures:
        own["WEIGHTS_DIR"] = str(home / "weights")
        for precision in ("int8", "int4-default"):
            there = export.onnx_folder(catalog.find("tiny-phi3"), precision)
            shutil.copytree(there, home / "weights" / "tiny-phi3" / there.name)
    flags = f"--no-browser --ip 127.0.0.1 --port {port} --ServerApp.port_retries=0"
    if os.geteuid() == 0:
        flags += " --allow-root"
    words = [f"NOTEBOOK={_within(folder, '01')}", f"PARAMS={flags}"]
    with make("lab", f"http://127.0.0.1:{port}/api", *words, env=own):
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"  # reset: only this one open


def _within(folder: Path, name: str) -> str:
    """A notebook's path in the project, as it is given to `make lab` and as JupyterLab shows it."""
    return (folder / notebooks.NOTEBOOKS[name].name).relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def requests(page) -> list[str]:
    """All addresses that the page asks for, in every test of this file."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    return asked


def test_the_first_visit_asks_neither_the_reader_nor_another_machine(lab, folder, requests, page):
    page.goto(lab.format(_within(folder, "01")))
    _wait_until_idle(page)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(2000)  # the question came when all else was there
    expect(page.locator(".Toastify__toast, .jp-Dialog")).to_have_count(0)
    addresses = [urlsplit(url) for url in requests]
    assert any(address.path.startswith("/api/kernels") for address in addresses)
    asked_of = {address.hostname for address in addresses if address.scheme not in ("data", "blob")}
    assert asked_of == {"127.0.0.1"}
    assert not [a.path for a in addresses if a.path in ("/lab/api/news", "/lab/api/update")]
    for endpoint in ("news", "update"):  # the server would have asked when it is asked
        answer = page.request.get(f"{lab.partition('/lab/')[0]}/lab/api/{endpoint}")
        assert answer.ok
        assert not any(answer.json().values())


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_a_notebook_opens_with_its_picture(theme, lab, folder, page, picture):
    server, _, query = lab.partition("/lab/tree/{}?reset&")
    settings = f"{server}/lab/api/settings/@jupyterlab/apputils-extension:themes?{query}"
    assert page.request.put(settings, data={"raw": json.dumps({"theme": f"JupyterLab {theme}"})}).ok
    for name in notebooks.NOTEBOOKS:
        page.goto(lab.format(_within(folder, name)))
        expect(page.locator("body")).to_have_attribute("data-jp-theme-name", f"JupyterLab {theme}")
        shown = page.locator(".jp-MarkdownOutput img").first
        shown.scroll_into_view_if_needed()
        assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 960
        picture(f"jupyterlab-{name}-opening-{theme.lower()}")


def test_make_lab_opens_in_the_notebooks_folder_with_this_environment_s_kernel(lab, folder, page, picture):
    page.goto(lab.format(_within(folder, "01")))
    _wait_until_idle(page)
    listed = page.locator(".jp-DirListing-itemText")
    for path in notebooks.NOTEBOOKS.values():
        expect(listed.filter(has_text=path.name)).to_be_visible()
    kernels = [p for p in psutil.Process().children(recursive=True) if "ipykernel_launcher" in p.cmdline()]
    assert kernels
    assert {Path(kernel.cmdline()[0]).parent for kernel in kernels} == {Path(sys.executable).parent}
    picture("jupyterlab")


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_run_all_cells_ends_without_errors_and_with_figures(name, lab, folder, page, pictures, picture):
    cells = _run_all(page, lab, _within(folder, name), picture)
    making = [cell for cell in cells if re.search(r"fetch\.checkpoint\(|export\.onnx_folder\(", cell.source)]
    assert making
    if not pictures:
        assert all(any(MADE.search(text) for text in _texts(cell)) for cell in making)
    texts = [text for cell in cells for text in _texts(cell)]
    assert sum(text.startswith("✓ Exercise") for text in texts) >= 4
    plotted = [cell for cell in cells if "plots." in cell.source]
    assert all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in plotted)
    figures = page.locator(".jp-RenderedImage img")
    expect(figures).to_have_count(len(plotted))
    for figure in figures.all():
        figure.scroll_into_view_if_needed()
        assert figure.evaluate("image => image.naturalWidth") > 0
    picture(f"jupyterlab-{name}-figure")
    answer = page.locator(".jp-OutputArea-output").filter(has_text="Answer:").first
    answer.evaluate("element => element.scrollIntoView({block: 'center'})")
    picture(f"jupyterlab-{name}", readme=name == "01")


def _run_all(page: Page, lab: str, file: str, picture) -> list[nbformat.NotebookNode]:
    """Open, Run All Cells, wait for the end, save; the code cells as saved, with neither error nor debris."""
    path = ROOT / file
    page.goto(lab.format(file))
    _wait_until_idle(page)
    _choose(page, "Run", "Run All Cells")
    last = page.locator(".jp-CodeCell .jp-InputPrompt").last
    noise = page.locator("[data-mime-type='application/vnd.jupyter.stderr']")  # errors have this type, too
    end = last.filter(has_text=f"[{len(_code(path))}]:").or_(noise)
    expect(end.first).to_be_visible(timeout=30 * MINUTE)
    picture(f"jupyterlab-{path.name[:2]}-end")
    assert noise.all_inner_texts() == []
    _wait_until_idle(page)

    _choose(page, "File", "Save Notebook")
    expect(page.locator(".jp-mod-dirty")).to_have_count(0)
    expect(page.locator(".jp-Dialog")).to_have_count(0)
    cells = _code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not [output for output in outputs if DEBRIS.search(str(output))]
    return cells


def _wait_until_idle(page: Page) -> None:
    kernel = page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) |")
    expect(kernel).to_have_text("Python 3 (ipykernel) | Idle", timeout=10 * MINUTE)


def _code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def _texts(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell's outputs read without their pictures."""
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]


def _choose(page: Page, menu: str, entry: str) -> None:
    page.get_by_role("menubar").first.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=entry).first.click()
