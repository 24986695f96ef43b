"""The supervisor between a notebook and its server, and the question whether a server is up."""

import ast
import http.server
import json
import os
import subprocess
import sys
import threading

import psutil
import pytest
from serving_support import left

from helpers import processes
from helpers.environment import ROOT

pytestmark = pytest.mark.command

WITHOUT = "import os, signal\ndel os.killpg, os.getpgid, os.setsid, signal.SIGKILL\n"  # as on Windows
BLOCK = """
import json, mlflow, psutil
from helpers.serving import mlflow_server, openai_server
for serve in (mlflow_server.serve, openai_server.running):
    with serve({model_uri!r}) as url:
        family = psutil.Process().children(recursive=True)
        print(json.dumps([(each.pid, each.create_time()) for each in family]), flush=True)
print("done")
"""
PARENT = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
class Page(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
"""
STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(flush=True)\ntime.sleep(600)"
)


@pytest.mark.server
def test_servers_end_where_there_are_no_process_groups_and_no_sigkill(tiny_uri, store, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    shown = subprocess.run(
        [sys.executable, "-c", BLOCK.format(model_uri=tiny_uri)],
        env=os.environ | {"PYTHONPATH": paths, "MLFLOW_TRACKING_URI": store},
        capture_output=True,
        text=True,
    )
    assert shown.stderr == ""
    *_, done = lines = shown.stdout.splitlines()
    assert done == "done"
    families = [json.loads(line) for line in lines if line.startswith("[[")]
    assert [len(family) >= 2 for family in families] == [True, True]
    started = {pid: created for family in families for pid, created in family}
    running = [each for each in psutil.process_iter() if each.pid in started]
    assert left([each for each in running if each.create_time() == started[each.pid]], seconds=0) == []


POSIX_ONLY = {"curses", "fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}


def test_no_module_of_ours_needs_posix_to_be_imported():
    for path in (ROOT / "helpers").rglob("*.py"):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        names = {alias.name for each in statements if isinstance(each, ast.Import) for alias in each.names}
        names |= {each.module for each in statements if isinstance(each, ast.ImportFrom)}
        assert not names & POSIX_ONLY, path


@pytest.mark.server
@pytest.mark.parametrize("how", ["the block ends", "the server is killed"])
def test_a_child_in_a_session_of_its_own_ends_with_its_server(how):
    port, others = processes.free_port(), set(psutil.Process().children())
    with processes.running([sys.executable, "-c", PARENT, str(port)], port, "a server", 60):
        (supervisor,) = set(psutil.Process().children()) - others
        (server,) = supervisor.children()
        (child,) = server.children()
        if how == "the server is killed":
            server.kill()
            assert left([supervisor, child]) == []
    assert left([supervisor, server, child], seconds=0) == []


def test_a_process_that_takes_no_hint_is_ended_by_force():
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {STUBBORN!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        root = psutil.Process(process.pid)
        family = [root, *root.children()]
        processes.end([root], seconds=0.5)
        assert left(family, seconds=0) == []


def test_a_full_disk_costs_the_log_and_leaves_no_server_behind():
    command = [sys.executable, processes.__file__, "sh", "-c", "echo started; exec sleep 600"]
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
    assert processes.answers(healthy_url)
