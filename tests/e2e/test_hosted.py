"""Where JupyterLab is hosted, MLflow's pages open from its launcher, on a path of the same address."""

import os
import secrets
from collections.abc import Iterator
from urllib.parse import urlsplit

import mlflow
import pytest
import requests

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; `make setup` installs it")
from playwright.sync_api import Page, expect
from support import make

from helpers import processes

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

BASE = "/user/reader/"  # as JupyterHub and Binder give it to each user


@pytest.fixture(scope="module")
def store(registered_onnx) -> str:
    """A store with a run, a registered champion and a trace; its URI."""
    mlflow.set_tracking_uri(registered_onnx)
    mlflow.set_experiment("fixtures")
    with mlflow.start_span("answer", "CHAT_MODEL") as span:
        span.set_inputs({"prompt": "What is the capital of Spain?"})
        span.set_outputs("Madrid")
    mlflow.flush_trace_async_logging()
    return registered_onnx


@pytest.fixture(scope="module")
def hub(store, tmp_path_factory) -> Iterator[str]:
    """Address of what `make lab` starts below BASE. Its name is not that of this machine's loopback address.

    A browser finds every name below localhost on this machine, and MLflow by itself refuses this one.
    """
    home, port = tmp_path_factory.mktemp("home"), processes.free_port()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    own |= {"HOME": str(home), "JUPYTER_TOKEN": secrets.token_hex(16), "MLFLOW_TRACKING_URI": store}
    flags = f"--no-browser --ip 127.0.0.1 --port {port} --ServerApp.port_retries=0 --allow-root "
    flags += f"--ServerApp.base_url={BASE} --ServerApp.allow_remote_access=True"
    with make("lab", f"http://127.0.0.1:{port}{BASE}api", f"PARAMS={flags}", env=own):
        yield f"http://hub.localhost:{port}{BASE}lab?reset&token={own['JUPYTER_TOKEN']}"


@pytest.fixture(scope="module")
def pages(hub, page) -> Iterator[Page]:
    """MLflow's pages, opened by their tile in JupyterLab's launcher."""
    page.goto(hub)
    tile = page.locator(".jp-LauncherCard").filter(has_text="MLflow")
    with page.context.expect_page() as opened:
        tile.click()
    pages = opened.value
    pages.asked = []
    pages.on("request", lambda request: pages.asked.append(request.url))
    yield pages
    pages.close()


def test_the_tile_opens_mlflow_on_a_path_of_the_same_address(hub, pages):
    expect(pages).to_have_title("MLflow")
    opened, lab = urlsplit(pages.url), urlsplit(hub)
    assert opened.netloc == lab.netloc
    assert opened.path == f"{BASE}mlflow/"


def test_the_pages_show_the_runs_the_models_and_the_traces_of_this_store(pages):
    address = pages.url.partition("#")[0]
    experiment = mlflow.get_experiment_by_name("fixtures").experiment_id
    (run,) = mlflow.search_runs(experiment_names=["fixtures"], output_format="list")
    pages.goto(f"{address}#/experiments/{experiment}/runs")
    expect(pages.get_by_role("link", name=run.info.run_name).first).to_be_visible()
    pages.goto(f"{address}#/models/slm-onnx")
    expect(pages.get_by_role("row").filter(has_text="Version 1").get_by_text("@ champion")).to_be_visible()
    pages.goto(f"{address}#/experiments/{experiment}/traces")
    pages.get_by_role("button", name="Got it").click()  # a hint that a first visit shows
    expect(pages.get_by_role("row").filter(has_text="What is the capital of Spain?").first).to_be_visible()
    asked_for = [urlsplit(url) for url in pages.asked if not url.startswith(("data:", "blob:"))]
    assert {url.netloc for url in asked_for} == {urlsplit(address).netloc}
    assert [url.path for url in asked_for if not url.path.startswith(f"{BASE}mlflow/")] == []


def test_another_site_s_page_can_change_nothing_and_nobody_enters_without_the_token(pages):
    site = urlsplit(pages.url)
    # The browser alone finds this name, so Python asks the address behind it, with the browser's cookies.
    mlflow_url = f"http://127.0.0.1:{site.port}{BASE}mlflow/"
    cookies = {cookie["name"]: cookie["value"] for cookie in pages.context.cookies()}
    for origin, status in ((f"http://{site.netloc}", 200), ("http://another.example", 403), ("null", 403)):
        asked = requests.post(
            f"{mlflow_url}ajax-api/2.0/mlflow/experiments/create",
            json={"name": origin.replace("/", "-")},
            headers={"Host": site.netloc, "Origin": origin},
            cookies=cookies,
            timeout=60,
        )
        assert (origin, asked.status_code) == (origin, status), asked.text
    stranger = requests.get(mlflow_url, headers={"Host": site.netloc}, allow_redirects=False, timeout=60)
    assert stranger.status_code == 302
    assert "/login?" in stranger.headers["Location"]
