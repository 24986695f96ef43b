"""The supervisor between a notebook and its server, and the question whether a server is up."""

import http.server
import subprocess
import sys
import threading

import psutil
import pytest
from serving_support import left

from helpers.serving import background

pytestmark = pytest.mark.command


def test_a_full_disk_costs_the_log_and_leaves_no_server_behind():
    command = [sys.executable, background.__file__, "sh", "-c", "echo started; exec sleep 600"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        supervisor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=full, stderr=subprocess.PIPE)
    family = psutil.Process(supervisor.pid)
    while not any(child.name() == "sleep" for child in family.children()):
        assert supervisor.poll() is None, supervisor.stderr.read()
    server = family.children()
    with pytest.raises(subprocess.TimeoutExpired):
        supervisor.wait(1)
    supervisor.communicate(timeout=300)
    assert left(server) == []


@pytest.fixture
def healthy_url():
    """A server on loopback whose every page is there."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_on_this_machine_is_asked_past_a_proxy(healthy_url, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    assert background.answers(healthy_url)
