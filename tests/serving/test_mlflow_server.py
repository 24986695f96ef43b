"""MLflow's own server lives exactly as long as the block that started it."""

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys

import mlflow
import nbformat
import pandas as pd
import psutil
import pytest
import requests
from support import connected, left

from helpers.serving import mlflow_server
from helpers.workshop import notebooks

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def model_uri(tiny_uri, store):
    with connected(store):
        yield tiny_uri


@pytest.fixture(scope="module")
def served(model_uri):
    """URL of a server that was started where the environment is not on PATH, and what was printed."""
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setenv("PATH", "/usr/bin:/bin")
            url = running.enter_context(mlflow_server.serve(model_uri))
        yield url, printed.getvalue()


def test_several_rows_and_parameters_are_answered_as_in_python(served, model_uri):
    prompts, params = ["Hello", "Tell me a joke", "Hello"], {"max_new_tokens": 12, "stop": ["q"]}
    body = {"inputs": {"prompt": prompts}, "params": params}
    reply = requests.post(f"{served[0]}/invocations", json=body, timeout=300)
    assert reply.status_code == 200
    expected = mlflow.pyfunc.load_model(model_uri).predict({"prompt": prompts}, params=params)
    assert reply.json()["predictions"] == expected
    assert len(expected) == 3


def test_it_works_where_the_environment_is_not_on_the_path(served):
    assert requests.get(f"{served[0]}/version", timeout=60).text == mlflow.__version__


def test_progress_is_one_line(served, model_uri):
    url, printed = served
    assert printed.startswith(f"Starting MLflow's server for {model_uri} … ready at {url} after ")
    assert printed.count("\n") == 1


def test_it_ends_with_the_block_even_after_an_interrupt(model_uri):
    def interrupt_inside():
        with mlflow_server.serve(model_uri) as url:
            processes.extend(set(psutil.Process().children(recursive=True)) - others)
            assert requests.get(f"{url}/ping", timeout=60).status_code == 200
            raise KeyboardInterrupt

    processes: list[psutil.Process] = []
    others = set(psutil.Process().children(recursive=True))  # Helpers of tests before this one.
    with pytest.raises(KeyboardInterrupt):
        interrupt_inside()
    assert len(processes) >= 2
    assert left(processes, seconds=0) == []


def test_it_ends_when_its_kernel_is_killed(model_uri):
    code = (
        "import sys, time, mlflow; from helpers.serving import mlflow_server\n"
        f"mlflow.set_tracking_uri({mlflow.get_tracking_uri()!r})\n"
        f"with mlflow_server.serve({model_uri!r}): time.sleep(600)"
    )
    kernel = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        shown = b""
        while b"ready" not in shown and (part := os.read(kernel.stdout.fileno(), 1000)):
            shown += part
        assert b"ready" in shown
        processes = psutil.Process(kernel.pid).children(recursive=True)
    finally:
        kernel.send_signal(signal.SIGKILL)
        kernel.communicate()
    assert len(processes) >= 2
    assert left(processes) == []


def test_a_server_that_does_not_come_up_shows_its_last_log_lines(model_uri, capfd):
    def start():
        with mlflow_server.serve("models:/no-such-model@champion"):
            pytest.fail("served a model that does not exist")

    with pytest.raises(RuntimeError) as caught:
        start()
    first, *log = str(caught.value).splitlines()
    assert first == (
        "MLflow's server for models:/no-such-model@champion ended with exit code 1. Its last log lines:"
    )
    assert "Registered Model with name=no-such-model not found" in log[-1]
    assert capfd.readouterr().out.endswith("failed\n")


def test_a_server_that_is_too_slow_is_ended(model_uri):
    def start():
        with mlflow_server.serve(model_uri, startup_timeout=0.5):
            pytest.fail("nothing starts this fast")

    others = psutil.Process().children(recursive=True)
    with pytest.raises(RuntimeError, match=r"was not healthy within 0\.5 s"):
        start()
    assert set(psutil.Process().children(recursive=True)) <= set(others)


@pytest.mark.parametrize(("notebook", "cell"), [("01", "cell-33"), ("02", "cell-49")])
def test_a_request_over_its_time_is_shown_as_the_504_that_it_is(
    store, transformers_uri, tiny_uri, monkeypatch, notebook, cell
):
    """The notebooks' own lines; the server gets a second, and so many rows that no machine answers in it."""
    (source,) = [
        each.source for each in nbformat.read(notebooks.NOTEBOOKS[notebook], 4).cells if each.id == cell
    ]
    long = {"role": "user", "content": "Count to 49."}
    prompt = "<|user|>\nCount to 49.<|end|>\n<|assistant|>\n"
    names = {
        "serve": True,
        "requests": requests,
        "mlflow_server": mlflow_server,
        "max_new_tokens": 1000,
        "messages": [long],
        "table_of_prompts": pd.DataFrame({"prompt": [[prompt]] * 2_000}),
    }
    monkeypatch.setattr(mlflow_server, "serve", functools.partial(mlflow_server.serve, timeout=1))
    source = source.replace("timeout=seconds)", "timeout=1)").replace("] * 2}", "] * 2_000}")
    source = source.replace('{"max_new_tokens": 24, "stop": ["."]}', '{"max_new_tokens": 1000}')
    with connected(store):
        version = transformers_uri.rpartition("/")[2]
        mlflow.MlflowClient().set_registered_model_alias("slm-transformers", "candidate", version)
        with pytest.raises(AssertionError, match="504: Request processing time exceeded limit"):
            exec(source, names)  # noqa: S102


def test_the_notebook_s_server_gives_every_token_that_may_be_asked_for_its_time():
    """170 tokens in a minute were measured for Phi-3-mini on two cores; 4,096 may be asked for, twice."""
    cells = nbformat.read(notebooks.NOTEBOOKS["01"], 4).cells
    (source,) = [cell.source for cell in cells if cell.id == "cell-33"]
    (line,) = [line.strip() for line in source.splitlines() if line.strip().startswith("seconds = ")]
    for max_new_tokens in (1, 64, 4096):
        names = {"max_new_tokens": max_new_tokens}
        exec(line, names)  # noqa: S102
        assert names["seconds"] > 2 * max_new_tokens * 60 / 170
