"""What tests of several folders share: stores, processes that end, servers that answer, make's targets."""

import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import psutil
import pytest
import requests

from helpers import ROOT, processes, tracking


@contextmanager
def connected(uri: str, experiment: str = "models") -> Iterator[None]:
    """Use a store, and the former one again afterwards."""
    before = mlflow.get_tracking_uri()
    tracking.connect(uri, experiment)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        mlflow.set_workspace(None)


def left(family: list[psutil.Process], seconds: float = 120) -> list[psutil.Process]:
    """Those that still run after a while; one that only waits to be reaped by the first process does not."""
    eventually(lambda: not any(map(processes.runs, family)), seconds)
    return [each for each in family if processes.runs(each)]


def eventually(check: Callable[[], object], seconds: float = 120) -> object:
    """What `check` gives, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (result := check()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return result


def wait_until(condition: Callable[[], object], seconds: float = 600) -> None:
    """Wait until a condition holds; fail if it never does."""
    assert eventually(condition, seconds), "it never came"


def wait_until_it_answers(url: str, process: subprocess.Popen, log=None) -> None:
    """Ask `url` until it is answered; fail with what stands in the file `log` if `process` ends before."""
    deadline = time.monotonic() + 600
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(url, timeout=5).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                if log:
                    log.seek(0)
                pytest.fail(f"{url} does not answer.\n{log.read() if log else ''}")
            time.sleep(0.2)
        else:
            return


@contextmanager
def between(server: str, meddle: Callable[[str], object]) -> Iterator[str]:
    """A way to a server. `meddle` sees the path of a request first; if it says so, the answer is lost."""

    class Forward(BaseHTTPRequestHandler):
        def do_GET(self):
            lost = meddle(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name != "Host"}
            answer = requests.request(self.command, server + self.path, data=body, headers=headers)
            if lost:
                return
            with suppress(ConnectionError):  # The client may have gone.
                self.send_response(answer.status_code)
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Forward) as forwarder:
        threading.Thread(target=forwarder.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{forwarder.server_port}"
        forwarder.shutdown()


@contextmanager
def make(target: str, url: str, *words: str, env: dict[str, str]) -> Iterator[psutil.Process]:
    """`make TARGET WORDS` with this environment, once `url` is answered; ended with all that it started."""
    # `-o setup`: this must not set up the environment that the tests run in.
    command = ["make", "-C", str(ROOT), "-o", "setup", target, f"VENV={Path(sys.executable).parent}", *words]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(command, env=env, stdout=log, stderr=log) as process,
    ):
        root = psutil.Process(process.pid)
        try:
            wait_until_it_answers(url, process, log)
            yield root
        finally:
            processes.end([root], seconds=30)
