"""The audit looks every locked package up, names what is known, and says so when it cannot."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers import environment
from helpers.environment import ROOT

pytestmark = pytest.mark.command


@contextmanager
def database(flaws: dict[str, dict]):
    """A local server that speaks osv.dev's query API and knows these flaws, by package."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = query["package"]["name"]
            asked.append(name)
            body = json.dumps({"vulns": [flaws[name]]} if name in flaws else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """The tests' output is not a web server's log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_every_locked_package_is_looked_up_and_a_known_flaw_fails_the_audit(tmp_path, capsys):
    lock = tmp_path / "requirements.lock"
    lock.write_text("jinja2==3.1.2\nidna==3.10\nnothing==1.0 ; sys_platform == 'none'\n", encoding="utf-8")
    affected = {
        "package": {"name": "jinja2", "ecosystem": "PyPI"},
        "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.1.3"}]}],
    }
    flaw = {
        "id": "GHSA-h5c8-rqwp-cp95",
        "summary": "a flaw",
        "affected": [affected],
        "modified": "2024-01-11T00:00:00Z",
    }
    with database({"jinja2": flaw}) as (url, asked):
        assert environment.audit(lock, url) == 1
    assert sorted(asked) == ["idna", "jinja2"]
    assert ["jinja2", "3.1.2", "GHSA-h5c8-rqwp-cp95", "3.1.3"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]


def test_the_lock_itself_can_be_looked_up(capsys):
    with database({}) as (url, asked):
        assert environment.audit(service=url) == 0
    locked = [line for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines() if "==" in line]
    assert len(locked) - 20 < len(asked) <= len(locked)  # some are for other platforms
    assert "No known vulnerabilities found" in capsys.readouterr().out


def test_a_database_out_of_reach_is_one_sentence_and_no_clean_bill():
    with pytest.raises(RuntimeError, match=r"could not be looked up at http://127\.0\.0\.1:9") as caught:
        environment.audit(service="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    assert "Nothing was audited" in str(caught.value)
