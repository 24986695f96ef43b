"""Live servers and kernels listen on this machine only, and no command line shows a key."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import nbformat
import psutil
import pytest
from support import connected, make

from helpers import ROOT, processes
from helpers.serving import mlflow_server, openai_server
from helpers.workshop import notebooks

pytestmark = pytest.mark.server

LOOPBACK = {"127.0.0.1", "::1"}


# What a shell may say of proxies and certificates; nobody listens on port 9.
SHELLS = {
    "a SOCKS proxy": {"ALL_PROXY": "socks5://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9"},
    "a proxy of no known kind": {"http_proxy": "carrier-pigeon://127.0.0.1:9"},
    "dead proxies": {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"},
    "proxies but for one name": {"http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.10, example.org"},
    "no certificates": {"SSL_CERT_FILE": "/nonexistent", "REQUESTS_CA_BUNDLE": "/nonexistent"},
}
# The notebook's own lines ask servers that run already.
ASK = """
import contextlib, nbformat, types
cells = {{cell.id: cell.source for cell in nbformat.read({path!r}, as_version=4).cells}}
exec(cells["cell-01"].replace("%matplotlib inline", ""))
mlflow_server = types.SimpleNamespace(serve=lambda uri: contextlib.nullcontext({rest!r}))
openai_server = types.SimpleNamespace(running=lambda uri, **options: contextlib.nullcontext({openai!r}))
serve, prompt, max_new_tokens = True, "What is the capital of Spain?", 12
table_of_prompts = pd.DataFrame({{"prompt": [[prompt]]}})
exec(cells["cell-49"])
exec(cells["cell-52"])
"""


def listening(root: psutil.Process) -> list[tuple[str, int]]:
    """Address and port of every TCP socket that a process and what it started listen on."""
    found = []
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has ended since it was listed
            connections = process.net_connections("tcp")
            found += [tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN]
    return found


def environment(**variables: str) -> dict[str, str]:
    """Of these tests, without settings of JupyterLab and MLflow."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "MLFLOW"))}
    return own | variables


def test_mlflows_server_listens_on_this_machine_only_and_reads_no_pickle(tiny_uri, store):
    with connected(store), mlflow_server.serve(tiny_uri) as url:
        heard = listening(psutil.Process())
        served = [child.environ() for child in psutil.Process().children(recursive=True)]
    assert served
    assert {each["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] for each in served} == {"false"}
    assert int(url.rpartition(":")[2]) in {port for _, port in heard}
    assert {address for address, _ in heard} <= LOOPBACK


def test_the_openai_server_listens_on_this_machine_only_and_its_key_is_on_no_command_line(tiny_uri, store):
    key = "sk-not-for-others"
    with connected(store), openai_server.running(tiny_uri, api_key=key) as url:
        heard = listening(psutil.Process())
        lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).is_success
    assert int(url.rpartition(":")[2]) in {port for _, port in heard}
    assert {address for address, _ in heard} <= LOOPBACK
    assert any("helpers.serving.openai_server" in line for line in lines)
    assert not [line for line in lines if key in line]


def test_mlflows_pages_listen_on_this_machine_only_and_the_store_is_on_no_command_line(tmp_path):
    port = processes.free_port()
    store = f"sqlite:///{tmp_path}/mlflow.db"
    own = environment(PORT=str(port), TRACKING_URI=store)
    with make("ui", f"http://127.0.0.1:{port}/health", env=own) as process:
        heard = listening(process)
        lines = [" ".join(child.cmdline()) for child in process.children(recursive=True)]
    assert port in {port for _, port in heard}
    assert {address for address, _ in heard} <= LOOPBACK
    assert not [line for line in lines if store in line]


def test_jupyterlab_and_its_kernels_listen_on_this_machine_only(tmp_path):
    (tmp_path / "jupyter_server_config.py").write_text(
        "c.ServerApp.open_browser = False\nc.ServerApp.allow_root = True\n",  # tests may run as root
        encoding="utf-8",
    )
    port, token = processes.free_port(), "a-token-of-the-tests"
    own = environment() | {
        "JUPYTER_CONFIG_DIR": str(tmp_path),
        "JUPYTER_DATA_DIR": str(tmp_path),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "run"),
        "JUPYTER_PORT": str(port),
        "JUPYTER_TOKEN": token,
    }
    url = f"http://127.0.0.1:{port}/api"
    with make("lab", url, env=own) as process:
        headers = {"Authorization": f"token {token}"}
        assert httpx.get(f"{url}/kernels").status_code == 403
        assert httpx.post(f"{url}/kernels", headers=headers, json={}, timeout=60).status_code == 201
        deadline = time.monotonic() + 300
        while (
            len(heard := listening(process)) < 6 and time.monotonic() < deadline
        ):  # a kernel has five sockets
            time.sleep(0.2)
    assert port in {port for _, port in heard}
    assert len(heard) >= 6
    assert {address for address, _ in heard} <= LOOPBACK


def test_the_kernel_of_a_headless_run_listens_on_this_machine_only(tmp_path):
    code = (
        "import json, psutil\n"
        "found = psutil.Process().net_connections('tcp')\n"
        "print(json.dumps([c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN]))"
    )
    parameters = nbformat.v4.new_code_cell("model: str = 'x'", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(code)], metadata=kernel)
    nbformat.write(book, tmp_path / "page.ipynb")
    notebooks.run({tmp_path / "page.ipynb": {}}, tmp_path / "out")
    executed = nbformat.read(tmp_path / "out" / "page.ipynb", as_version=4)
    heard = set(json.loads(executed.cells[-1].outputs[0].text))
    assert heard
    assert heard <= LOOPBACK


@pytest.fixture(scope="module")
def urls(tiny_uri, store) -> Iterator[dict[str, str]]:
    with connected(store), mlflow_server.serve(tiny_uri) as rest, openai_server.running(tiny_uri) as openai:
        yield {"rest": rest, "openai": openai}


@pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS)
def test_the_notebook_asks_its_servers_past_what_the_shell_says_of_proxies_and_certificates(urls, shell):
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "requests_ca_bundle")
    own = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    code = ASK.format(path=str(notebooks.NOTEBOOKS["02"]), **urls)
    shown = subprocess.run(
        [sys.executable, "-c", code], env=own | shell, cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "{'predictions': [" in shown.stdout
    assert "'completion_tokens': " in shown.stdout


@pytest.mark.parametrize("before", ["", "example.org", "127.0.0.10", "localhost", "*", "a, b"])
def test_no_proxy_names_this_machine_and_keeps_what_was_there(before):
    code = "import helpers, os; print(os.environ['no_proxy'], os.environ['NO_PROXY'])"
    own = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=own | {"NO_PROXY": before}, cwd=ROOT, capture_output=True, text=True
    )
    lower, upper = shown.stdout.split()
    assert lower == upper
    names = lower.split(",")
    assert names == ["*"] if before == "*" else {"127.0.0.1", "localhost", "::1"} <= set(names)
    assert {name.strip() for name in before.split(",") if name} <= set(names)
