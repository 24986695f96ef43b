"""A short soak of the OpenAI endpoint, and what the long one, `make soak`, has measured."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from helpers.environment import ROOT

BENCHMARKS = ROOT / "benchmarks"
TINY = ("--model", "tiny-phi3", "--precision", "fp32")


def command(*arguments: object) -> list[str]:
    return list(map(str, [sys.executable, BENCHMARKS / "soak.py", *arguments]))


def soak(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True)


def result(folder: Path) -> dict:
    return json.loads((folder / "soak.json").read_text("utf-8"))


def answered(process: psutil.Process) -> float:
    """How many requests a process has answered, if it is the server."""
    for each in process.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN:
            lines = httpx.get(f"http://127.0.0.1:{each.laddr.port}/metrics", timeout=60).text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("chat_requests_total{"))
    return 0


@pytest.mark.soak
def test_eight_clients_get_no_wrong_answer_leave_nothing_behind_and_growth_fails_the_soak(
    tmp_path, monkeypatch
):
    run = soak("--minutes", 0.5, *TINY, "--growth", 0.1, "--output", tmp_path)  # no memory shrinks like that
    assert run.returncode == 1, run.stdout + run.stderr
    assert "FAILED: memory, MB, last ÷ first quarter: " in run.stderr
    measured = result(tmp_path)
    assert {sentence.partition(",")[0].partition(" ")[0] for sentence in measured["failed"]} == {
        "memory",
        "handles",
    }
    figures = measured["figures"]
    for name in ("wrong answers", "stack traces leaked", "answered 5xx", "server processes that died"):
        assert figures[name] == 0
    assert figures["requests left in progress"] == figures["processes left after SIGTERM"] == 0
    assert figures["compared with the greedy reference"] > 8  # each client had some
    assert figures["refused 4xx"] > 0
    assert figures["left by the client"] > 0
    parts = [figures[name] for name in ("answered 200", "refused 4xx", "left by the client")]
    assert sum(parts) == figures["requests"]  # each is counted once
    for name in ("whole answer, s", "streamed answer, s", "first streamed text, s"):
        assert 0 < figures[f"{name}: p50"] <= figures[f"{name}: p95"] <= figures[f"{name}: p99"]
    assert len(figures["memory, MB, by quarter"]) == len(figures["handles, by quarter"]) == 4
    # Half a minute cannot tell growth from filling caches; half an hour has (see the last test).
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert importlib.import_module("soak").checks(figures, 2) == []


@pytest.mark.soak
def test_a_server_that_dies_fails_the_soak_which_still_shows_its_table(tmp_path):
    run = subprocess.Popen(
        command("--minutes", 5, *TINY, "--output", tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 600
    # Each of the eight clients waits for its first answer before its second, so some answers have arrived.
    while not (servers := [child for child in psutil.Process(run.pid).children() if answered(child) > 16]):
        assert time.monotonic() < deadline, "no server came"
        time.sleep(0.5)
    servers[0].kill()
    out, err = run.communicate(timeout=600)
    assert run.returncode == 1
    assert "| requests |" in out
    assert "FAILED: server processes that died: " in err
    assert "FAILED: the server was not healthy afterwards" in err
    assert "Traceback" not in err
    assert result(tmp_path)["figures"]["requests"] > 0


@pytest.mark.command
def test_impossible_settings_are_refused(tmp_path):
    run = soak("--minutes", 0, "--output", tmp_path)
    assert run.returncode == 2
    assert "--minutes must be above 0" in run.stderr
    assert not any(tmp_path.iterdir())


def test_the_page_s_table_is_of_half_an_hour_in_which_nothing_failed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    measured = result(BENCHMARKS / "results")
    assert measured["settings"]["minutes"] >= 30
    assert measured["settings"]["clients"] == 8
    assert measured["failed"] == []
    table = importlib.import_module("soak").table(measured["figures"])
    assert table in (BENCHMARKS / "README.md").read_text("utf-8")
