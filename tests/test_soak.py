"""A short soak of the OpenAI endpoint, and what the long one, `make soak`, has measured."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

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


def listens(process: psutil.Process) -> bool:
    return any(each.status == psutil.CONN_LISTEN for each in process.net_connections("tcp"))


@pytest.mark.slow
def test_eight_clients_for_two_minutes_get_no_wrong_answer_leave_nothing_behind_and_nothing_grows(tmp_path):
    run = soak("--minutes", 2, *TINY, "--output", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    figures = result(tmp_path)["figures"]
    for name in ("wrong answers", "stack traces leaked", "answered 5xx", "server processes that died"):
        assert figures[name] == 0
    assert figures["requests left in progress"] == figures["processes left after SIGTERM"] == 0
    assert figures["compared with the greedy reference"] > 100
    assert figures["refused 4xx"] > 10
    assert figures["left by the client"] > 10
    parts = [figures[name] for name in ("answered 200", "refused 4xx", "left by the client")]
    assert sum(parts) == figures["requests"]  # each is counted once
    for name in ("whole answer, s", "streamed answer, s", "first streamed text, s"):
        assert 0 < figures[f"{name}: p50"] <= figures[f"{name}: p95"] <= figures[f"{name}: p99"]
    assert len(figures["memory, MB, by quarter"]) == len(figures["handles, by quarter"]) == 4
    for name in ("memory, MB", "handles"):
        assert 0 < figures[f"{name}, last ÷ first quarter"] <= 1.05


@pytest.mark.slow
def test_a_soak_that_finds_growth_fails_and_says_so(tmp_path):
    run = soak("--minutes", 0.2, *TINY, "--growth", 0.1, "--output", tmp_path)
    assert run.returncode == 1
    assert "FAILED: memory, MB, last ÷ first quarter: " in run.stderr
    assert result(tmp_path)["failed"]


@pytest.mark.slow
def test_a_server_that_dies_fails_the_soak_which_still_shows_its_table(tmp_path):
    run = subprocess.Popen(
        command("--minutes", 5, *TINY, "--output", tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (servers := [child for child in psutil.Process(run.pid).children() if listens(child)]):
        assert time.monotonic() < deadline, "no server came"
        time.sleep(0.5)
    time.sleep(5)  # the clients begin
    servers[0].kill()
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "| requests |" in out
    assert "FAILED: server processes that died: " in err
    assert "FAILED: the server was not healthy afterwards" in err
    assert "Traceback" not in err
    assert result(tmp_path)["figures"]["requests"] > 0


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
