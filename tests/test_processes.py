"""The supervisor between a notebook and its server, and the question whether a server is up."""

import ast
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from support import left

from helpers import ROOT, processes
from helpers.errors import ChildFailed

pytestmark = pytest.mark.command

# As on Windows.
WITHOUT = "import os, signal\ndel os.killpg, os.getpgid, os.setsid, signal.SIGKILL\n"
BLOCK = """
import json, psutil, sys
from helpers import processes
port = processes.free_port()
with processes.running([sys.executable, "-c", {parent!r}, str(port)], port, "a server", 60):
    family = psutil.Process().children(recursive=True)
    print(json.dumps([each.pid for each in family]), flush=True)
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


def test_servers_end_where_there_are_no_process_groups_and_no_sigkill(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    shown = subprocess.run(
        [sys.executable, "-c", BLOCK.format(parent=PARENT)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert shown.stderr == ""
    family = json.loads(shown.stdout.splitlines()[-1])
    assert len(family) == 3  # The supervisor, the server and its child.
    rest = [psutil.Process(pid) for pid in family if psutil.pid_exists(pid)]
    assert left(rest, seconds=0) == []


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


def test_a_program_ends_with_its_parent_though_the_disk_for_its_log_is_full():
    command = [sys.executable, "-m", "helpers.processes", "sh", "-c", "echo started; exec sleep 600"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        supervisor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=full, stderr=full, cwd=ROOT)
    family = psutil.Process(supervisor.pid)
    while not any(child.name() == "sleep" for child in family.children()):
        assert supervisor.poll() is None
    program = family.children()
    with pytest.raises(subprocess.TimeoutExpired):
        supervisor.wait(1)
    supervisor.communicate(timeout=300)
    assert left(program) == []


def failure_of(code: str, folder: Path) -> str:
    """How a module with some code fails in a child process."""
    (folder / "failing.py").write_text(code, encoding="utf-8")
    paths = os.pathsep.join([str(folder), str(ROOT)])
    with pytest.raises(ChildFailed) as caught:
        processes.run_module(
            "failing", log=folder / "log.txt", watch=lambda output: None, what="Converting", PYTHONPATH=paths
        )
    return str(caught.value)


def test_a_module_that_fails_is_reported_by_its_exception_its_signal_or_its_last_lines(tmp_path):
    raised = failure_of("print('Loading')\nraise OSError('No space left on device')", tmp_path)
    assert raised == "Converting failed: OSError: No space left on device"
    assert "was ended by signal 9" in failure_of("import os; os.kill(os.getpid(), 9)", tmp_path)
    assert failure_of("print('no such model'); exit(3)", tmp_path) == "Converting failed: no such model"


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
