"""Both notebooks in JupyterLab, as a person would: open, Run All Cells, look, save."""

import os
import re
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, expect

from helpers.serving import background
from helpers.workshop import notebooks

MINUTE = 60_000  # ms
DEBRIS = re.compile(r"it/s\]|s/it\]|\d+%\|")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory) -> Path:
    """Copies of the notebooks without outputs, for the toy model unless pictures are to be taken."""
    folder = tmp_path_factory.mktemp("lab")
    for path in notebooks.NOTEBOOKS.values():
        book = nbformat.read(path, as_version=4)
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            if "parameters" in cell.metadata.get("tags", ()) and not pictures:
                assert 'model: str = "smollm2-135m"' in cell.source
                cell.source = cell.source.replace("smollm2-135m", "tiny-phi3", 1)
        nbformat.write(book, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory) -> Iterator[str]:
    """Address of a JupyterLab without anybody's settings; `{}` stands for a notebook's file name."""
    home, port, token = tmp_path_factory.mktemp("home"), background.free_port(), secrets.token_hex(16)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # no question on the first visit
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    own |= {
        "HOME": str(home),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTER_TOKEN": token,
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    # fmt: off
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip", "127.0.0.1", "--port", str(port),
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    # fmt: on
    if os.geteuid() == 0:
        command.append("--allow-root")
    with (
        (home / "lab.log").open("w") as log,
        subprocess.Popen(command, env=own, stdout=log, stderr=log) as server,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}/api", server, Path(log.name))
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"  # reset: only this one open
        finally:
            server.terminate()


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")
            time.sleep(0.2)


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_run_all_cells_ends_without_errors_and_with_figures(name, lab, folder, page, picture, tmp_path):
    path = folder / notebooks.NOTEBOOKS[name].name
    page.goto(lab.format(path.name))
    kernel = page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) |")
    expect(kernel).to_have_text("Python 3 (ipykernel) | Idle", timeout=2 * MINUTE)
    _choose(page, "Run", "Run All Cells")

    last = page.locator(".jp-CodeCell .jp-InputPrompt").last
    noise = page.locator("[data-mime-type='application/vnd.jupyter.stderr']")  # errors have this type, too
    end = last.filter(has_text=f"[{len(_code(path))}]:").or_(noise)
    expect(end.first).to_be_visible(timeout=10 * MINUTE)
    page.screenshot(path=tmp_path / "end.png")
    assert noise.all_inner_texts() == []
    expect(kernel).to_have_text("Python 3 (ipykernel) | Idle")

    _choose(page, "File", "Save Notebook")
    expect(page.locator(".jp-mod-dirty")).to_have_count(0)
    expect(page.locator(".jp-Dialog")).to_have_count(0)
    cells = _code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not [output for output in outputs if DEBRIS.search(str(output))]

    plotted = [cell for cell in cells if "plots." in cell.source]
    assert all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in plotted)
    figures = page.locator(".jp-RenderedImage img")
    expect(figures).to_have_count(len(plotted))
    for figure in figures.all():
        figure.scroll_into_view_if_needed()
        assert figure.evaluate("image => image.naturalWidth") > 0
    answer = page.locator(".jp-OutputArea-output").filter(has_text="Answer:").first
    answer.evaluate("element => element.scrollIntoView({block: 'center'})")
    picture(f"jupyterlab-{name}")


def _code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def _choose(page: Page, menu: str, entry: str) -> None:
    page.get_by_role("menubar").first.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=entry).first.click()
